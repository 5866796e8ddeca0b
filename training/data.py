"""Any Hugging Face data set as images with their captions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from datasets import Dataset, Image
from PIL import Image as PILImage

from granalign_hf.training.columns import (
    FOLDER_COLUMN,
    Columns,
    captions_of,
    features_id,
    find_columns,
    find_picture,
    picture_id,
)
from granalign_hf.training.pictures import read_value
from granalign_hf.training.scenes import scene_dataset
from granalign_hf.training.tables import load_table, picture_roots, read_stream

NUM_EVAL_SCENES = 500


@dataclass
class CaptionedImages:
    """A split: image number n is row `rows[n]` of `table`, is called `image_ids[n]` and has the captions `captions[n]`."""

    table: Dataset
    image_column: str  # of pictures, or of the features of their regions
    rows: list[int]
    image_ids: list[str]
    captions: list[list[str]]
    roots: tuple[str, ...] = ()  # folders that pictures may lie in, where the table has paths instead of bytes
    corrupt: list[str] = field(default_factory=list)  # images left out, see `without_corrupt`

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def has_pictures(self) -> bool:
        """Whether the images are pictures; otherwise they are features of regions."""
        return isinstance(self.table.features[self.image_column], Image)

    @cached_property
    def _encoded(self) -> Dataset:
        """The column of the images alone, pictures as they are stored: `datasets` would decode every column of a row."""
        column = self.table.select_columns([self.image_column])
        return column.cast_column(self.image_column, Image(decode=False)) if self.has_pictures else column

    def image(self, number: int) -> PILImage.Image | np.ndarray:
        """The picture in RGB, by the rules of `GranAlignProcessor`, or the features (boxes, features) float32.

        Raises:
            UnreadableImageError: it cannot be decoded, or has no such features; the message names the image.
            ValueError: its path leads out of the data set.
        """
        value = self._encoded[self.rows[number]][self.image_column]
        name = f"Image `{self.image_ids[number]}` (row {self.rows[number]})"
        return read_value(value, self.roots, self.has_pictures, name)

    def first(self, limit: int | None) -> CaptionedImages:
        """The first images only."""
        return self.only(range(len(self))[:limit])

    def only(self, numbers: Iterable[int]) -> CaptionedImages:
        """Some of the images."""
        numbers = list(numbers)
        return replace(
            self,
            rows=[self.rows[n] for n in numbers],
            image_ids=[self.image_ids[n] for n in numbers],
            captions=[self.captions[n] for n in numbers],
        )

    def reordered(self, order: np.ndarray) -> CaptionedImages:
        """The images with other captions: place p of [`all_captions`] gets what stands in place `order[p]`."""
        moved = np.array(self.all_captions, dtype=object)[order]
        ends = np.cumsum([len(captions) for captions in self.captions])
        return replace(self, captions=[list(part) for part in np.split(moved, ends[:-1])])

    @property
    def all_captions(self) -> list[str]:
        """The captions of every image, one after the other."""
        return [caption for captions in self.captions for caption in captions]

    @property
    def caption_image_index(self) -> np.ndarray:
        """For every caption, in order, the number of its image."""
        return np.repeat(np.arange(len(self)), [len(captions) for captions in self.captions])


def load_split(
    name: str,
    split: str,
    config: str | None = None,
    split_column: str | None = None,
    num_scenes: int = NUM_EVAL_SCENES,
    streaming: bool = False,
    **columns: str | None,
) -> CaptionedImages:
    """A split of a Hub data set, of a folder, of a `save_to_disk` folder, or of the drawn `scenes`.

    A row is an image with a list of captions, an image with one caption, or one caption of an image that other rows repeat:
    rows with the same image id (or, without such a column, the same picture) are one image. A caption is a string, or a
    mapping that has it as `raw` (the form of Karpathy's files). In the place of an image may stand the features of its
    regions, (boxes, features) numbers.

    Args:
        name: Hub name or folder. split: its name; `train+restval` joins two. config: where the data set has several.
        split_column: names the split of each row, in a data set of one table. Default: `split`, where that has the split.
        num_scenes: images of the drawn scenes.
        streaming: read into memory as a stream, without a copy on disk.
        columns: `image_column`, `caption_column` and so on, see [`find_columns`].

    Raises:
        ValueError: no such data set, split or column, a column of another type, or a row without a caption, image or image
            id; the message says which.
    """
    if streaming:
        table = read_stream(name, split, config, split_column)
    else:
        table = load_table(name, split, config, split_column, num_scenes)
    found = find_columns(table.features, name, **columns)
    roots = picture_roots(name)
    if (image_folder := columns.get("image_folder")) is not None:
        table, found = _with_pictures(table, name, image_folder, found)
        roots = (image_folder,)
    values = list(table[found.caption])
    texts = [captions_of(value, row, f"`{found.caption}` of {name} ({split})") for row, value in enumerate(values)]
    ids = _image_ids(table, found.image, found.image_id, is_one_caption=isinstance(values[0], str))
    images: dict[str, tuple[int, list[str]]] = {}
    for row, (image_id, captions) in enumerate(zip(ids, texts, strict=True)):
        images.setdefault(image_id, (row, []))[1].extend(captions)
    rows, grouped = zip(*images.values(), strict=True)
    if not isinstance(table.features[found.image], Image):
        table = table.with_format("numpy", columns=[found.image])  # as Python lists they take several times as long
    return CaptionedImages(table, found.image, list(rows), list(images), list(grouped), roots)


def drawn_scenes(num_scenes: int, seed: int, num_distractors: int) -> CaptionedImages:
    """Scenes of a seed (see `scene_dataset`), each with the same number of objects that no caption names."""
    table = scene_dataset(num_scenes, seed, num_distractors)
    return CaptionedImages(table, "image", list(range(num_scenes)), list(table["image_id"]), list(table["captions"]))


def _with_pictures(table: Dataset, name: str, folder: str, columns: Columns) -> tuple[Dataset, Columns]:
    """The table with the pictures of a folder in a further column, which takes the place of that of their names."""
    inner = table[FOLDER_COLUMN] if FOLDER_COLUMN in table.column_names else [None] * len(table)
    files = enumerate(zip(table[columns.image], inner, strict=True))
    paths = [find_picture(folder, file, within, row, f"`{columns.image}` of {name}") for row, (file, within) in files]
    new = f"{columns.image} in image_folder"
    return table.add_column(new, paths).cast_column(new, Image()), columns._replace(image=new)


def _image_ids(table: Dataset, image_column: str, image_id_column: str | None, is_one_caption: bool) -> list[str]:
    if image_id_column is not None:
        ids = list(table[image_id_column])
        if None in ids:
            raise ValueError(f"Row {ids.index(None)} has no image id in `{image_id_column}`.")
        return [str(value) for value in ids]
    if not is_one_caption:
        return [str(row) for row in range(len(table))]
    if not isinstance(table.features[image_column], Image):
        features = table.with_format("numpy", columns=[image_column])
        return [features_id(row, values[image_column]) for row, values in enumerate(features)]
    encoded = table.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    return [picture_id(row, value) for row, value in enumerate(encoded[image_column])]
