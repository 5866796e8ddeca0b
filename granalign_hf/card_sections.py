"""What a model card says beside its recalls, each section from the files that measured it."""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BASELINES = ("random_patch", "image_center", "largest_box")
FOIL_FIGURES = {
    "preferred": "true caption higher",
    "found": "edited word lowest",
    "was_lowest": "lowest before the edit",
}
WAYS = {"image_to_text": "Image to text", "text_to_image": "Text to image"}


def measured_sections(folder: Path) -> str:
    """A section for each KIND-SPLIT.json of whole splits, of the kinds in [`SECTIONS`].

    Raises:
        ValueError: a file is no JSON or lacks a figure, or a figure is not a finite number.
    """
    sections = []
    for kind, (title, explained, table) in SECTIONS.items():
        files = [path for path in sorted(folder.glob(f"{kind}-*.json")) if not is_part(path)]
        if files:
            sections += [f"## {title}", explained, *(_described(path, table) for path in files)]
    return "\n\n".join(sections)


def is_part(path: Path) -> bool:
    """Whether it was measured on the first images of a split only: such figures are no result."""
    return re.search(r"-first-\d+$", path.stem) is not None


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def finite(value: Any, name: str) -> float:
    """Raises ValueError unless the value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}. Measure it again before it goes into a card.")
    return float(value)


def mean_and_spread(values: list[float]) -> str:
    """ "12.3 ± 0.4", or "12.3" of one value."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def _described(path: Path, table: Callable[[dict[str, Any]], str]) -> str:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return f"On {Path(result['dataset']).name}, split {result['split']} ({result['date']}):\n\n{table(result)}"
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}. Write it anew with training/evaluate.py or calibrate.py.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. Write it again.") from error


def _percent(row: dict[str, Any], name: str, bounds: tuple[str, str] | None = None) -> str:
    value = f"{finite(row[name], name):.1f}"
    if bounds is None:
        return value
    low, high = (finite(row[bound], bound) for bound in bounds)
    return f"{value} [{low:.1f}, {high:.1f}]"


def _grounding(result: dict[str, Any]) -> str:
    others = [name for name in ("densest", *BASELINES) if all(name in row for row in result["pointing"].values())]
    head = ["phrases", "number", "in the box", *(name.replace("_", " ") for name in others)]
    rows = [
        [
            *(group, row["num_phrases"], _percent(row, "accuracy", ("low", "high"))),
            *(_percent(row, name) for name in others),
        ]
        for group, row in result["pointing"].items()
    ]
    told = [markdown_table(head, rows), f"{_percent(result, 'corner_share')} % of the phrases point at a corner patch."]
    if "densest" in others:
        told.append("The densest place is where neighbours that agree count, and what all words find counts less.")
    for name, area in result["auroc"].items():
        told.append(f"AUROC of {name.replace('_', ' ')}: {finite(area['mean'], name):.3f}.")
    return "\n\n".join([told[0], " ".join(told[1:])])


def _foils(result: dict[str, Any]) -> str:
    before = ["was_lowest"] if all("was_lowest" in row for row in result["foils"].values()) else []
    head = ["edited", "number", *(FOIL_FIGURES[name] for name in ("preferred", "found", *before)), "by chance"]
    rows = [
        [
            *(kind, row["number"], _percent(row, "preferred", ("low", "high"))),
            *(_percent(row, "found", ("found_low", "found_high")), *(_percent(row, name) for name in [*before, "chance"])),
        ]
        for kind, row in result["foils"].items()
    ]
    return markdown_table(head, rows)


def _uncertainty(result: dict[str, Any]) -> str:
    head = ["", *WAYS.values()]
    ways = [result[way] for way in WAYS]

    def row(title: str, *keys: str, digits: int = 3) -> list[str]:
        values = [functools.reduce(lambda figures, key: figures[key], keys, way) for way in ways]
        return [title, *(f"{finite(value, title):.{digits}f}" for value in values)]

    rows = [
        row("expected calibration error of the softmax, before", "softmax", "ece_before"),
        row("the same, after", "softmax", "ece"),
        row("expected calibration error of P(first is right)", "confidence", "ece"),
        row("coverage of answer sets (%)", "answer_sets", "coverage", digits=1),
        row("candidates in an answer set, mean", "answer_sets", "mean_size", digits=1),
    ]
    for name in dict.fromkeys(name for way in ways for name in way["is_the_first_wrong"]):
        title = f"AUROC of {name.replace('_', ' ')} for a wrong first answer"
        told = [way["is_the_first_wrong"].get(name) for way in ways]  # without a wrong answer there is none
        rows.append([title, *("-" if of_way is None else f"{finite(of_way['auroc'], title):.3f}" for of_way in told)])
    return markdown_table(head, rows)


def _comparison(result: dict[str, Any]) -> str:
    columns = {"rsum": "rSum", "image_to_text_r1": "image to text R@1", "text_to_image_r1": "text to image R@1"}
    rows = []
    for name, run in result["runs"].items():
        figures = [[finite(value, column) for value in run[column]] for column in columns]
        rows.append([f"**{name}**" if name == result["own"] else name, len(figures[0]), *map(mean_and_spread, figures)])
    return f"{markdown_table(['run', 'seeds', *columns.values()], rows)}\n\n`{result['command']}`"


SECTIONS = {
    "comparison": (
        "Beside other aligners",
        "Trained under one budget on the same encoders; mean and standard deviation over the seeds. This model is one of "
        "those in bold letters.",
        _comparison,
    ),
    "grounding": (
        "Where words point",
        "The pointing game, in percent: is the patch with the highest mean score of a phrase's words in a box of the "
        "phrase? Beside it what needs no model. An AUROC of 0.5 is that of chance.",
        _grounding,
    ),
    "foils": (
        "Which word is wrong",
        "Captions with one thing edited, in percent: does the true caption score higher, and has the edited word the lowest "
        "share of the score?",
        _foils,
    ),
    "uncertainty": (
        "How sure it is",
        "Fitted on the validation split, for queries like those and galleries of that size with one right candidate.",
        _uncertainty,
    ),
}
