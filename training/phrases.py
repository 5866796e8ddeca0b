"""Where the phrases of captions are: drawn scenes know it, photographs have a table of boxes beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from granalign_hf.training.columns import existing_column
from granalign_hf.training.data import CaptionedImages
from granalign_hf.training.tables import load_table

COLUMNS = ("filename", "caption", "phrases")


@dataclass(frozen=True)
class Phrase:
    """Characters `start` to `end` of a caption, and where they are in its image.

    Attributes:
        boxes: [x0, y0, x1, y1] in pixels of the image, end exclusive; at least one. types: of entity, maybe none.
    """

    start: int
    end: int
    boxes: tuple[tuple[float, float, float, float], ...]
    types: tuple[str, ...]


@dataclass(frozen=True)
class LocatedCaption:
    """A caption of image number `image` of a split, with its phrases that have boxes, in the order of the text."""

    image: int
    caption: str
    phrases: tuple[Phrase, ...]


def located_captions(data: CaptionedImages, source: str | None, split: str) -> list[LocatedCaption]:
    """The captions of a split whose phrases are located, in the order of its images.

    Args:
        source: Hub name or folder of a table with a row for each caption: `filename`, which is the id of the image,
            `caption` and `phrases`, mappings with `char_start`, `char_end`, `boxes` and maybe `types`. `None`: the data
            set has them itself, for each caption of an image, in its column `phrases`.
        split: of the table.

    Raises:
        ValueError: there is no such table or column, none of its images is in the data, or a phrase is no part of its
            caption.
    """
    if source is None:
        existing_column("phrases", "phrases", "the data set", data.table.features)
        rows: Iterable[tuple[int, str, list]] = (
            (number, caption, phrases)
            for number, captions in enumerate(data.captions)
            for caption, phrases in zip(captions, data.table[data.rows[number]]["phrases"], strict=True)
        )
    else:
        table = load_table(source, split, None, None, 0)
        for column in COLUMNS:
            existing_column(column, column, source, table.features)
        numbers = {image_id: number for number, image_id in enumerate(data.image_ids)}
        found = [(numbers[row["filename"]], row["caption"], row["phrases"]) for row in table if row["filename"] in numbers]
        if not found:
            raise ValueError(
                f"None of the images of {source} ({split}) is in the data: {table[0]['filename']!r} of `filename` is none "
                f"of its image ids, such as {data.image_ids[0]!r}. Name the column of the file names with `image_id_column`."
            )
        rows = sorted(found, key=lambda row: row[0])
    return [
        LocatedCaption(n, caption, tuple(_phrase(p, caption) for p in phrases)) for n, caption, phrases in rows if phrases
    ]


def _phrase(entry: dict[str, Any], caption: str) -> Phrase:
    start, end = entry["char_start"], entry["char_end"]
    if not 0 <= start < end <= len(caption) or not entry["boxes"]:
        raise ValueError(
            f"A phrase must be characters of its caption and have a box, got {start} to {end} of {caption!r} with "
            f"{len(entry['boxes'])} boxes."
        )
    return Phrase(start, end, tuple(tuple(box) for box in entry["boxes"]), tuple(entry.get("types") or ()))
