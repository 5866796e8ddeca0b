"""`granalign explain`: the score of a pair as shares of its words and patches, or what puts one sentence above another."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_command, add_model, columns, load, show

NUM_PLACES = 3  # patches and regions that are shown of a word


def add_parser(subparsers: Any) -> None:
    example = 'granalign explain dog.jpg "a black dog" --against "a brown dog" --model runs/demo-scenes --out why.png'
    summary = "a score as the shares of its words, which add up to it"
    parser = add_command(subparsers, "explain", run, summary, example)
    parser.add_argument("image")
    parser.add_argument("sentence")
    parser.add_argument("--against", metavar="SENTENCE", help="tell what puts the first sentence above or below this one")
    parser.add_argument("--out", metavar="PNG", help="draw it")
    add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    from granalign_hf.explanation import compare, explain
    from granalign_hf.figure import comparison_figure, explanation_figure

    model, processor = load(arguments)
    explanation = explain(model, processor, arguments.image, arguments.sentence)
    if arguments.against is None:
        if arguments.out:
            explanation_figure(explanation, arguments.out)
        _show_shares(arguments, explanation)
    else:
        comparison = compare(explanation, explain(model, processor, arguments.image, arguments.against))
        if arguments.out:
            comparison_figure(comparison, arguments.out)
        _show_comparison(arguments, comparison)


def _show_shares(arguments: argparse.Namespace, explanation: Any) -> None:
    words = []
    for word, share in explanation.word_shares:
        places = [
            {"kind": place.kind, "index": place.index, "box": place.box, "share": part}
            for place, part in explanation.top_places(word)[:NUM_PLACES]
        ]
        told = {"word": word.text, "start": word.start, "end": word.end, "is_special": word.is_special}
        words.append(told | {"share": share, "places": places})
    table = [(word["word"], word["share"], ", ".join(_place(place) for place in word["places"])) for word in words]
    lines = [f"score {explanation.score:.3f}", *columns([("word", "share", "where, the largest share first"), *table])]
    show(arguments, {"score": explanation.score, "words": words}, lines)


def _place(place: dict[str, Any]) -> str:
    box = "" if place["box"] is None else f" ({' '.join(map('{:.0f}'.format, place['box']))})"
    return f"{place['kind']} {place['index']}{box}"


def _show_comparison(arguments: argparse.Namespace, comparison: Any) -> None:
    words = [
        {"word": word, "share": first, "share_against": second, "difference": first - second}
        for word, first, second in comparison.words
    ]
    head = ("word", "first", "second", "difference")
    lines = [f"difference {comparison.score:.3f}", *columns([head, *(tuple(word.values()) for word in words)])]
    show(arguments, {"difference": comparison.score, "words": words}, lines)
