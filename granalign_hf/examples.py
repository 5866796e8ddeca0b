"""Pictures to try a model with, on the demo page and in the widget of the Hub: drawn scenes, and free photographs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """A picture of the package `granalign_hf.model_cards`.

    Args:
        file: its name. title: a sentence that is true of it. labels: of which the first is true.
        credit: who made a photograph, and its licence; `None` for scenes, which this project draws.
    """

    file: str
    title: str
    labels: tuple[str, ...]
    credit: str | None = None


SCENES = (
    Example("widget-1.png", "A purple ring and a star", ("a red cross", "a blue cross", "two black circles")),
    Example("widget-2.png", "A red star and a circle", ("a pink triangle", "a green ring", "three yellow stars")),
)
PHOTOGRAPHS = (
    Example(
        "widget-3.jpg",
        "A cat with green eyes",
        ("a cat", "a dog on the grass", "two men on a boat"),
        "Chelsea, by Stefan van der Walt, CC0 1.0",
    ),
    Example(
        "widget-4.jpg",
        "A red cup and a spoon on a wooden table",
        ("a cup of coffee", "a glass of water", "children at the beach"),
        "Espresso at Pikolo Espresso Bar, by Rachel Michetti, CC0 1.0",
    ),
)


def examples_for(tokenizer: Any) -> list[Example]:
    """Those whose titles have no word that is unknown to the text encoder, as the words of photographs are to the demo's."""
    return [
        example
        for example in (*SCENES, *PHOTOGRAPHS)
        if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in tokenizer(example.title).input_ids
    ]


def credits(examples: list[Example] | tuple[Example, ...]) -> str:
    """A line on those that are photographs, or nothing."""
    made = [example.credit for example in examples if example.credit]
    return f"Photographs of the examples: {'; '.join(made)}." if made else ""
