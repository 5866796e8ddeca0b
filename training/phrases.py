"""Where the phrases of captions are: drawn scenes know it, photographs have a table of boxes beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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
        if "phrases" not in data.table.features:
            raise ValueError(
                "The data set has no column `phrases` of boxes. Name a table that has them with `phrase_boxes`."
            )
        column = data.table.select_columns(["phrases"])  # a whole row would decode its picture
        rows: Iterable[tuple[int, str, list]] = (
            (number, caption, phrases)
            for number, captions in enumerate(data.captions)
            for caption, phrases in zip(captions, column[data.rows[number]]["phrases"], strict=True)
        )
    else:
        table = load_table(source, split, None, None, 0)
        if missing := [name for name in COLUMNS if name not in table.features]:
            raise ValueError(
                f"`phrase_boxes` {source} must have the columns {', '.join(COLUMNS)}; it lacks {', '.join(missing)}."
            )
        numbers = {image_id: number for number, image_id in enumerate(data.image_ids)}
        found = [(numbers[row["filename"]], row["caption"], row["phrases"]) for row in table if row["filename"] in numbers]
        if not found:
            raise ValueError(
                f"None of the images of {source} ({split}) is in the data: {table[0]['filename']!r} of `filename` is none "
                f"of its image ids, such as {data.image_ids[0]!r}. Name the column of the file names with `image_id_column`."
            )
        rows = sorted(found, key=lambda row: row[0])
    located = [
        LocatedCaption(n, caption, tuple(_phrase(p, caption) for p in phrases)) for n, caption, phrases in rows if phrases
    ]
    if not located:
        raise ValueError("No caption of these images has a phrase with boxes.")
    return located


def _phrase(entry: dict[str, Any], caption: str) -> Phrase:
    start, end = entry["char_start"], entry["char_end"]
    is_box = [len(box) == 4 and box[0] < box[2] and box[1] < box[3] for box in entry["boxes"]]
    if not 0 <= start < end <= len(caption) or not is_box or not all(is_box):
        raise ValueError(
            f"A phrase must be characters of its caption and have boxes [x0, y0, x1, y1], got {start} to {end} of "
            f"{caption!r} with the boxes {entry['boxes']}."
        )
    return Phrase(start, end, tuple(tuple(box) for box in entry["boxes"]), tuple(entry.get("types") or ()))
