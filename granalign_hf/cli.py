"""The command line: `granalign align IMAGE "a sentence" --model CHECKPOINT` and its relatives."""

from __future__ import annotations

import argparse
import sys

from transformers.utils import logging

from granalign_hf import __version__
from granalign_hf.commands import align, app, doctor, explain, export, index, push, rank, search

COMMANDS = (align, rank, explain, index, search, push, export, app, doctor)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="granalign", description="Fine-grained image-text alignment.")
    parser.add_argument("--version", action="version", version=f"granalign {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs a command; what the user can put right is one line on stderr and exit status 1."""
    arguments = build_parser().parse_args(argv)
    logging.disable_progress_bar()  # of loading weights; a command that takes long shows its own
    try:
        arguments.run(arguments)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"granalign: {error}")


if __name__ == "__main__":
    main()
