"""Any Hugging Face data set as images with their captions, and batches of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk
from PIL import Image as PILImage
from transformers import ProcessorMixin

from granalign_hf.modeling.processing_granalign import read_image
from granalign_hf.training.scenes import scene_dataset

CAPTION_COLUMNS = ("captions", "caption", "sentences", "sentence", "text", "raw")
IMAGE_ID_COLUMNS = ("image_id", "filename", "file_name", "cocoid", "img_id", "image_path")
SCENE_SEEDS = {"train": 1, "validation": 2, "test": 4}
NUM_EVAL_SCENES = 500


@dataclass
class CaptionedImages:
    """A split: image number n is row `rows[n]` of `table`, is called `image_ids[n]` and has the captions `captions[n]`."""

    table: Dataset
    image_column: str
    rows: list[int]
    image_ids: list[str]
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, number: int) -> PILImage.Image:
        """The picture in RGB, by the rules of `GranAlignProcessor`.

        Raises:
            ValueError: it cannot be decoded; the message names the image.
        """
        try:
            return read_image(self.table[self.rows[number]][self.image_column])
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"Image `{self.image_ids[number]}` (row {self.rows[number]}) cannot be read: {error}"
            ) from error

    def first(self, limit: int | None) -> CaptionedImages:
        """The first images only."""
        return CaptionedImages(
            self.table, self.image_column, self.rows[:limit], self.image_ids[:limit], self.captions[:limit]
        )

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
    image_column: str | None = None,
    caption_column: str | None = None,
    image_id_column: str | None = None,
    num_scenes: int = NUM_EVAL_SCENES,
) -> CaptionedImages:
    """A split of a Hub data set, of a folder, of a `save_to_disk` folder, or of the drawn `scenes`.

    A row is an image with a list of captions, an image with one caption, or one caption of an image that other rows repeat:
    rows with the same image id (or, without such a column, the same picture) are one image.

    Raises:
        ValueError: no such data set, split or column, or a row without a caption, image or image id; the message says which.
    """
    table = _load_table(name, split, config, num_scenes)
    image_column = image_column or next((n for n, kind in table.features.items() if isinstance(kind, Image)), None)
    caption_column = caption_column or next((n for n in CAPTION_COLUMNS if n in table.column_names), None)
    image_column = _existing("image", image_column, name, table)
    caption_column = _existing("caption", caption_column, name, table)
    values = list(table[caption_column])
    texts = [[value] if isinstance(value, str) else list(value or []) for value in values]
    for row, captions in enumerate(texts):
        if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
            raise ValueError(
                f"Row {row} of {name} ({split}) has an empty or missing caption in `{caption_column}`: {captions!r}."
            )
    image_id_column = image_id_column or next((n for n in IMAGE_ID_COLUMNS if n in table.column_names), None)
    ids = _image_ids(table, image_column, image_id_column, is_one_caption=isinstance(values[0], str))
    images: dict[str, tuple[int, list[str]]] = {}
    for row, (image_id, captions) in enumerate(zip(ids, texts, strict=True)):
        images.setdefault(image_id, (row, []))[1].extend(captions)
    rows, grouped = zip(*images.values(), strict=True)
    return CaptionedImages(table, image_column, list(rows), list(images), list(grouped))


def _existing(kind: str, column: str | None, name: str, table: Dataset) -> str:
    if column is None or column not in table.column_names:
        raise ValueError(
            f"The data set {name} has no {kind} column{'' if column is None else f' {column!r}'}; its columns are "
            f"{table.column_names}. Name it with `{kind}_column`."
        )
    return column


def _load_table(name: str, split: str, config: str | None, num_scenes: int) -> Dataset:
    if name == "scenes":
        if split not in SCENE_SEEDS:
            raise ValueError(f"The scenes have no split {split!r}; use one of {sorted(SCENE_SEEDS)}.")
        return scene_dataset(num_scenes, seed=SCENE_SEEDS[split])
    is_saved = (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file()
    try:
        tables = load_from_disk(name) if is_saved else load_dataset(name, config)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"The data set {name!r} is neither a folder nor on the Hub: {error}") from error
    tables = tables if isinstance(tables, DatasetDict) else {"train": tables}
    if split not in tables:
        raise ValueError(f"The data set {name} has no split {split!r}; its splits are {sorted(tables)}.")
    if len(tables[split]) == 0:
        raise ValueError(f"The split {split!r} of the data set {name} is empty.")
    return tables[split]


def _image_ids(table: Dataset, image_column: str, image_id_column: str | None, is_one_caption: bool) -> list[str]:
    if image_id_column is not None:
        ids = list(table[image_id_column])
        if None in ids:
            raise ValueError(f"Row {ids.index(None)} has no image id in `{image_id_column}`.")
        return [str(value) for value in ids]
    if not is_one_caption:
        return [str(row) for row in range(len(table))]
    encoded = table.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    return [_picture_id(row, value) for row, value in enumerate(encoded[image_column])]


def _picture_id(row: int, encoded: dict | None) -> str:
    """The hash of the bytes; a path only without them, as embedded pictures keep their last name, which others may share."""
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        raise ValueError(f"Row {row} has no image.")
    return encoded["path"] if encoded["bytes"] is None else hashlib.sha256(encoded["bytes"]).hexdigest()


class TrainingImages(torch.utils.data.Dataset):
    """Augmented images with some of their captions. An item depends on (seed, epoch, number) only, never on the order."""

    def __init__(self, data: CaptionedImages, captions_per_image: int, crop_scale: float, seed: int):
        self.data, self.captions_per_image, self.crop_scale, self.seed = data, captions_per_image, crop_scale, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> dict:
        rng = np.random.default_rng((self.seed, self.epoch, number))
        captions = draw_captions(rng, self.data.captions[number], self.captions_per_image)
        image = self.data.image(number)
        if self.crop_scale < 1:
            image = random_resized_crop(rng, image, self.crop_scale)
        return {
            "number": number,
            "image": image,
            "captions": [self.data.captions[number][c] for c in captions],
            "rng": rng,
        }


def draw_captions(rng: np.random.Generator, captions: list[str], count: int) -> np.ndarray:
    """Positions of `count` different captions (all of them for 0 or too few)."""
    return rng.permutation(len(captions))[: count or None]


def random_resized_crop(rng: np.random.Generator, image: PILImage.Image, min_scale: float) -> PILImage.Image:
    """A crop of min_scale..1 of the area, sides stretched by 3/4..4/3, resized back; flipped every second time."""
    width, height = image.size
    area = rng.uniform(min_scale, 1)
    stretch = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)) / 2)
    crop_width = min(width * np.sqrt(area) * stretch, width)
    crop_height = min(height * np.sqrt(area) / stretch, height)
    left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
    image = image.resize(image.size, PILImage.Resampling.BILINEAR, box=(left, top, left + crop_width, top + crop_height))
    return image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def augment_caption(rng: np.random.Generator, input_ids: list[int], tokenizer, share: float) -> list[int]:
    """Changes a share of the tokens: half [MASK], a tenth random, the rest deleted (LAPS's recipe). Special tokens stay."""
    kept = []
    for token in input_ids:
        fate = rng.random() / share if share > 0 and token not in tokenizer.all_special_ids else 1.0
        if fate < 0.5 and tokenizer.mask_token_id is not None:
            kept.append(tokenizer.mask_token_id)
        elif 0.5 <= fate < 0.6:
            kept.append(int(rng.integers(len(tokenizer))))
        elif fate >= 1:
            kept.append(token)
    has_word = any(token not in tokenizer.all_special_ids for token in kept)
    return kept if has_word else input_ids


@dataclass
class Collator:
    """Items of [`TrainingImages`] -> a batch of tensors for `GranAlignModel.forward`."""

    processor: ProcessorMixin
    caption_augmentation: float

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        captions, owners = [], []
        for item in items:
            for ids in tokenizer(item["captions"], truncation=True)["input_ids"]:
                captions.append(augment_caption(item["rng"], ids, tokenizer, self.caption_augmentation))
                owners.append(item["number"])
        batch = tokenizer.pad({"input_ids": captions}, return_tensors="pt")
        pixels = self.processor.image_processor([item["image"] for item in items], return_tensors="pt")
        return {
            **batch,
            "pixel_values": pixels["pixel_values"],
            "image_ids": torch.tensor([item["number"] for item in items]),
            "caption_image_ids": torch.tensor(owners),
        }
