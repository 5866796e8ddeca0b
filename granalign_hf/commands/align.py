"""`granalign align`: where in a picture each word of a sentence is."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_command, add_model, columns, load, show


def add_parser(subparsers: Any) -> None:
    example = 'granalign align dog.jpg "a dog catches a red ball" --model runs/demo-scenes --out words.png'
    parser = add_command(subparsers, "align", run, "where in a picture each word of a sentence is", example)
    parser.add_argument("image")
    parser.add_argument("sentence")
    parser.add_argument("--out", metavar="PNG", help="draw the map of each content word over the picture")
    add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    from granalign_hf.figure import figure
    from granalign_hf.modeling.alignment import align

    alignment = align(*load(arguments), arguments.image, arguments.sentence)
    if arguments.out:
        figure(alignment, arguments.out)
    words = [
        {"word": word.text, "start": word.start, "end": word.end, "box": word.box, "saliency": word.saliency}
        for word in alignment.words
    ]
    head = ("word", "characters", "box of its best patch")
    table = [(word.text, f"{word.start}-{word.end}", " ".join(map("{:.0f}".format, word.box))) for word in alignment.words]
    show(arguments, {"score": alignment.score, "words": words}, [f"score {alignment.score:.3f}", *columns([head, *table])])
