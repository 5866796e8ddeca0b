"""What several commands share: the checkpoint, and answers as text or as JSON."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def add_command(subparsers: Any, name: str, run: Callable, summary: str, example: str) -> argparse.ArgumentParser:
    """The parser of a command, with `--json`; `run(arguments)` gives what is shown with it."""
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="write the answer as JSON")
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """`default`: what stands in for the checkpoint, in words; without it, the checkpoint must be given."""
    about = "a folder, or a name on the Hub" + ("" if default is None else f" (default: {default})")
    parser.add_argument("--model", required=default is None, metavar="CHECKPOINT", help=about)
    parser.add_argument("--device", default="cpu", help="where the model runs, such as cuda or cuda:1 (default: cpu)")


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model, ready to score, and its processor.

    Raises:
        OSError, ValueError: there is no such checkpoint, it is broken or of another model, or there is no such device.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    from granalign_hf import GranAlignConfig, GranAlignModel, GranAlignProcessor

    if not Path(arguments.model).is_dir() and not HUB_ID.fullmatch(arguments.model):
        raise ValueError(f"`--model` must be a folder or a name on the Hub (owner/name), {arguments.model} is neither.")
    try:
        config = AutoConfig.from_pretrained(arguments.model)
    except OSError as error:
        if Path(arguments.model).exists():
            raise
        raise OSError(f"{arguments.model} is no folder here, and does not come from the Hub: {error}") from error
    if not isinstance(config, GranAlignConfig):
        raise ValueError(f"`--model` must be a GranAlign checkpoint, {arguments.model} is of type {config.model_type!r}.")
    try:
        model = GranAlignModel.from_pretrained(arguments.model).eval()
    except SafetensorError as error:
        raise OSError(f"The weights of {arguments.model} are broken: {error}") from error
    try:
        model.to(arguments.device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        told = str(error).splitlines()[0]
        raise ValueError(f"`--device` must be one that torch can use here, got {arguments.device!r}: {told}") from error
    return model, GranAlignProcessor.from_pretrained(arguments.model)


def show(arguments: argparse.Namespace, answer: Any, lines: list[str]) -> None:
    """The lines for people, or the answer as one line of JSON; what is no UTF-8 in the name of a file, as escapes."""
    told = json.dumps(answer, ensure_ascii=False) if arguments.json else "\n".join(lines)
    print(told.encode(errors="backslashreplace").decode())


def columns(rows: list[tuple]) -> list[str]:
    """Rows of cells as lines: text to the left, numbers to the right."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    numbers = [isinstance(cell, int | float) for cell in rows[-1]]
    return [
        "  ".join(
            cell.rjust(width) if is_number else cell.ljust(width) for cell, width, is_number in zip(row, widths, numbers)
        ).rstrip()
        for row in cells
    ]
