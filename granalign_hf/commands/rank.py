"""`granalign rank`: the sentences for a picture, or the pictures for a sentence."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_command, add_model, columns, load, show


def add_parser(subparsers: Any) -> None:
    example = 'granalign rank --image dog.jpg --text "a dog" "a cat" --model runs/demo-scenes'
    summary = "the sentences for a picture, or the pictures for a sentence"
    parser = add_command(subparsers, "rank", run, summary, example)
    parser.add_argument("--image", nargs="+", required=True, help="one picture, or several for one sentence")
    parser.add_argument("--text", nargs="+", required=True, help="one sentence, or several for one picture")
    parser.add_argument("--top", type=int, metavar="N", help="show the best N (default: all)")
    add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    """Raises ValueError: several of both, or fewer than one to show."""
    from granalign_hf.modeling.pipelines import ImageTextRetrievalPipeline

    images, texts = arguments.image, arguments.text
    if len(images) > 1 and len(texts) > 1:
        raise ValueError(f"Pass one picture or one sentence, got {len(images)} pictures and {len(texts)} sentences.")
    if arguments.top is not None and arguments.top < 1:
        raise ValueError(f"--top must be at least 1, got {arguments.top}.")
    model, processor = load(arguments)
    ranker = ImageTextRetrievalPipeline(model=model, processor=processor)
    query = {"image": images[0], "candidates": texts} if len(images) == 1 else {"text": texts[0], "candidates": images}
    answer = ranker(**query, top_k=arguments.top)
    answer = [{"candidate": query["candidates"][one["index"]], **one} for one in answer]
    names = [name for name in ("score", "probability", "standard_error", "is_in_answer_set") if answer[0][name] is not None]
    rows = [(*(one[name] for name in names), one["candidate"]) for one in answer]
    show(arguments, answer, columns([(*(name.replace("_", " ") for name in names), ""), *rows]))
