"""`granalign app`: the demo page."""

from __future__ import annotations

import argparse
from typing import Any

from .common import load


def add_parser(subparsers: Any) -> None:
    summary = "the demo page, in a browser"
    parser = subparsers.add_parser(
        "app",
        help=summary,
        description=summary,
        epilog="example:\n  granalign app runs/demo-scenes --port 7860",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="CHECKPOINT", help="a folder, or a name on the Hub")
    parser.add_argument("--index", help="pictures to search: a folder that `granalign index` has made, or a server")
    parser.add_argument("--token-folder", metavar="FOLDER", help="of its tokens, if they are not in the folder of the index")
    parser.add_argument("--device", default="cpu", help="where the model runs, such as cuda (default: cpu)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Serves until it is interrupted. Raises ImportError: Gradio is missing."""
    try:
        from granalign_hf.app import build, launch
    except ImportError as error:
        raise ImportError(f"The demo page needs Gradio ({error}): pip install 'granalign-hf[app]'.") from error
    from granalign_hf.retrieval import GranAlignIndex

    parts = load(arguments)
    index = None
    if arguments.index:
        index = GranAlignIndex.open(arguments.index, *parts, token_folder=arguments.token_folder)
    launch(build(*parts, index), server_name=arguments.host, server_port=arguments.port)
