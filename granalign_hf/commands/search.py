"""`granalign search`: the pictures of an index for a sentence."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_command, add_model, columns, load, show


def add_parser(subparsers: Any) -> None:
    summary = "the pictures of an index for a sentence"
    parser = add_command(
        subparsers, "search", run, summary, 'granalign search my.index "two dogs on a beach" --top 5 --show'
    )
    parser.add_argument("index", help="a folder that `granalign index` has made, or http://HOST:PORT/COLLECTION")
    parser.add_argument("sentence")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many (default: 10)")
    parser.add_argument("--candidates", type=int, default=100, metavar="N", help="that get an exact score (default: 100)")
    parser.add_argument("--exact", action="store_true", help="all pictures get one")
    parser.add_argument("--token-folder", metavar="FOLDER", help="of the tokens, if they are not in the folder of the index")
    parser.add_argument("--show", action="store_true", help="open the pictures that were found")
    add_model(parser, default="the one that the index was built with")


def run(arguments: argparse.Namespace) -> None:
    """Raises ValueError: no program shows pictures."""
    from PIL import ImageShow

    from granalign_hf.modeling.processing_granalign import read_image
    from granalign_hf.retrieval import GranAlignIndex
    from granalign_hf.storage import checkpoint_of

    arguments.model = arguments.model or checkpoint_of(arguments.index)
    with GranAlignIndex.open(arguments.index, *load(arguments), token_folder=arguments.token_folder) as index:
        found = index.search(
            text=arguments.sentence, top_k=arguments.top, candidates=arguments.candidates, exact=arguments.exact
        )
    names = ("score", "standard_error", "is_in_answer_set")
    answer = [{"id": one.id, "payload": one.payload, **{name: getattr(one, name) for name in names}} for one in found]
    shown = [name for name in names if answer and answer[0][name] is not None]
    rows = [(*(one[name] for name in shown), one["id"]) for one in answer]
    show(arguments, answer, columns([(*(name.replace("_", " ") for name in shown), ""), *rows]))
    if arguments.show:
        for one in found:
            if not ImageShow.show(read_image(one.payload.get("path", one.id)), one.id):
                raise ValueError("`--show` found no program that shows pictures, such as `xdg-open`. Their names are above.")
