"""Any Hugging Face data set as images with their captions, and batches of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image, concatenate_datasets, load_dataset, load_from_disk
from PIL import Image as PILImage
from transformers import ProcessorMixin

from granalign_hf.modeling.processing_granalign import read_image
from granalign_hf.modeling.region_features import read_features
from granalign_hf.training.scenes import scene_dataset

CAPTION_COLUMNS = ("captions", "caption", "sentences", "sentence", "text", "raw")
FEATURES_COLUMN = "features"
IMAGE_ID_COLUMNS = ("image_id", "filename", "file_name", "cocoid", "img_id", "image_path")
FILE_NAME_COLUMNS = ("filename", "file_name")  # in `image_folder`, some also in the folder that `filepath` names
SPLIT_COLUMN = "split"
SCENE_SEEDS = {"train": 1, "validation": 2, "test": 4}
NUM_EVAL_SCENES = 500


@dataclass
class CaptionedImages:
    """A split: image number n is row `rows[n]` of `table`, is called `image_ids[n]` and has the captions `captions[n]`."""

    table: Dataset
    image_column: str  # of pictures, or of the features of their regions
    rows: list[int]
    image_ids: list[str]
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def has_pictures(self) -> bool:
        """Whether the images are pictures; otherwise they are features of regions."""
        return isinstance(self.table.features[self.image_column], Image)

    def image(self, number: int) -> PILImage.Image | np.ndarray:
        """The picture in RGB, by the rules of `GranAlignProcessor`, or the features (boxes, features) float32.

        Raises:
            ValueError: it cannot be decoded, or has no such features; the message names the image.
        """
        try:
            value = self.table[self.rows[number]][self.image_column]
            return read_image(value) if self.has_pictures else read_features(value).numpy()
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"Image `{self.image_ids[number]}` (row {self.rows[number]}) cannot be read: {error}"
            ) from error

    def first(self, limit: int | None) -> CaptionedImages:
        """The first images only."""
        return CaptionedImages(
            self.table, self.image_column, self.rows[:limit], self.image_ids[:limit], self.captions[:limit]
        )

    def reordered(self, order: np.ndarray) -> CaptionedImages:
        """The images with other captions: place p of [`all_captions`] gets what stands in place `order[p]`."""
        moved = np.array(self.all_captions, dtype=object)[order]
        ends = np.cumsum([len(captions) for captions in self.captions])
        captions = [list(part) for part in np.split(moved, ends[:-1])]
        return CaptionedImages(self.table, self.image_column, self.rows, self.image_ids, captions)

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
    split_column: str | None = None,
    image_folder: str | None = None,
    features_column: str | None = None,
    num_scenes: int = NUM_EVAL_SCENES,
) -> CaptionedImages:
    """A split of a Hub data set, of a folder, of a `save_to_disk` folder, or of the drawn `scenes`.

    A row is an image with a list of captions, an image with one caption, or one caption of an image that other rows repeat:
    rows with the same image id (or, without such a column, the same picture) are one image. A caption is a string, or a
    mapping that has it as `raw` (the form of Karpathy's files). In the place of an image may stand the features of its
    regions, (boxes, features) numbers.

    Args:
        name: Hub name or folder. split: its name; `train+restval` joins two. config: where the data set has several.
        image_column, caption_column, image_id_column: default: found by type and name.
        split_column: names the split of each row, in a data set of one table. Default: `split`, where that has the split.
        image_folder: where the pictures lie if the data set has their names only, in `image_column`, `filename` or
            `file_name`, and maybe their folder in there as `filepath`.
        features_column: of the features of regions. Default: `features`, where there is no column of images.
        num_scenes: images of the drawn scenes.

    Raises:
        ValueError: no such data set, split or column, a column of another type, or a row without a caption, image or image
            id; the message says which.
    """
    table = _load_table(name, split, config, split_column, num_scenes)
    if features_column is not None and (image_column or image_folder):
        raise ValueError(
            f"`features_column` {features_column!r} replaces pictures: leave out `image_column` and `image_folder`."
        )
    if image_folder is not None:
        table, image_column = _with_pictures(table, name, image_folder, image_column)
    image_column = _image_column(table, name, image_column, features_column)
    caption_column = caption_column or next((n for n in CAPTION_COLUMNS if n in table.column_names), None)
    caption_column = _existing("caption", caption_column, name, table)
    if image_id_column is None:
        image_id_column = next((n for n in IMAGE_ID_COLUMNS if n in table.column_names), None)
    else:
        _existing("image_id", image_id_column, name, table)
    values = list(table[caption_column])
    texts = [_captions(value, row, f"`{caption_column}` of {name} ({split})") for row, value in enumerate(values)]
    ids = _image_ids(table, image_column, image_id_column, is_one_caption=isinstance(values[0], str))
    images: dict[str, tuple[int, list[str]]] = {}
    for row, (image_id, captions) in enumerate(zip(ids, texts, strict=True)):
        images.setdefault(image_id, (row, []))[1].extend(captions)
    rows, grouped = zip(*images.values(), strict=True)
    if not isinstance(table.features[image_column], Image):
        table = table.with_format("numpy", columns=[image_column])  # as Python lists they take several times as long
    return CaptionedImages(table, image_column, list(rows), list(images), list(grouped))


def drawn_scenes(num_scenes: int, seed: int, num_distractors: int) -> CaptionedImages:
    """Scenes of a seed (see `scene_dataset`), each with the same number of objects that no caption names."""
    table = scene_dataset(num_scenes, seed, num_distractors)
    return CaptionedImages(table, "image", list(range(num_scenes)), list(table["image_id"]), list(table["captions"]))


def _image_column(table: Dataset, name: str, column: str | None, features_column: str | None) -> str:
    """The column of the pictures, or of what stands in their place."""
    column = column or next((n for n, kind in table.features.items() if isinstance(kind, Image)), None)
    if column is None and features_column is None and FEATURES_COLUMN in table.column_names:
        features_column = FEATURES_COLUMN
    if features_column is not None:
        features_column = _existing("features", features_column, name, table)
        if isinstance(table.features[features_column], Image):
            raise ValueError(f"The column {features_column!r} of {name} holds pictures: name it with `image_column`.")
        return features_column
    column = _existing("image", column, name, table)
    if not isinstance(table.features[column], Image):
        raise ValueError(
            f"The column {column!r} of {name} holds {table.features[column]}, no images. Cast it to `datasets.Image`, or "
            "name the folder of the pictures with `image_folder`."
        )
    return column


def _captions(value, row: int, where: str) -> list[str]:
    """The captions of a row: a string or several, each as it is or as `raw` of a mapping."""
    if isinstance(value, dict) and isinstance(value.get("raw"), list):  # how `datasets` stores some lists of mappings
        value = value["raw"]
    captions = value if isinstance(value, list) else [value]
    captions = [caption.get("raw") if isinstance(caption, dict) else caption for caption in captions]
    wrong = next((c for c in captions if not isinstance(c, str | None)), None)
    if wrong is not None:
        raise ValueError(
            f"Row {row} has no caption (a string, or a list of them) in {where}: {wrong!r}. Name the column of the captions "
            "with `caption_column`."
        )
    if not captions or not all(caption and caption.strip() for caption in captions):
        raise ValueError(f"Row {row} has an empty or missing caption in {where}: {captions!r}.")
    return captions


def _with_pictures(table: Dataset, name: str, folder: str, column: str | None) -> tuple[Dataset, str]:
    """The table with the pictures of a folder in a further column, and the name of that column.

    Raises:
        ValueError: there is no column of file names, or a picture is not there.
    """
    column = _existing("image", column or next((n for n in FILE_NAME_COLUMNS if n in table.column_names), None), name, table)
    inner = table["filepath"] if "filepath" in table.column_names else [""] * len(table)
    paths = []
    for file, within in zip(table[column], inner, strict=True):
        places = [Path(folder) / str(file), Path(folder) / str(within) / str(file)]
        found = next((str(place) for place in places if place.is_file()), None)
        if found is None:
            raise ValueError(f"`image_folder` {folder} has no picture {file!r}, which `{column}` of {name} names.")
        paths.append(found)
    new = f"{column} in image_folder"
    return table.add_column(new, paths).cast_column(new, Image()), new


def _existing(kind: str, column: str | None, name: str, table: Dataset) -> str:
    if column is None or column not in table.column_names:
        raise ValueError(
            f"The data set {name} has no {kind} column{'' if column is None else f' {column!r}'}; its columns are "
            f"{table.column_names}. Name it with `{kind}_column`"
            + (", or that of the features of regions with `features_column`." if kind == "image" else ".")
        )
    return column


def _load_table(name: str, split: str, config: str | None, split_column: str | None, num_scenes: int) -> Dataset:
    if name == "scenes":
        if split not in SCENE_SEEDS:
            raise ValueError(f"The scenes have no split {split!r}; use one of {sorted(SCENE_SEEDS)}.")
        return scene_dataset(num_scenes, seed=SCENE_SEEDS[split])
    is_saved = (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file()
    try:
        tables = load_from_disk(name) if is_saved else load_dataset(name, config)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"The data set {name!r} is neither a folder nor on the Hub: {error}") from error
    except RuntimeError as error:  # `datasets` 4 runs no loading scripts
        raise ValueError(
            f"The data set {name!r} cannot be loaded: {error} Name a copy in Parquet, or a folder of `save_to_disk`."
        ) from error
    tables = dict(tables) if isinstance(tables, DatasetDict) else {"train": tables}
    rows_of = _rows_by_column(tables, name, split_column)
    parts = []
    for part in split.split("+"):
        if part in rows_of:
            (whole,) = tables.values()
            parts.append(whole.select(rows_of[part]))
        elif part in tables and split_column is None:
            parts.append(tables[part])
        else:
            raise ValueError(
                f"The data set {name} has no split {part!r}; its splits are {sorted(rows_of or tables)}. Name one of them "
                "with `split` in evaluation, with `train_split` and `validation_split` in training."
            )
    table = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    if len(table) == 0:
        raise ValueError(f"The split {split!r} of the data set {name} is empty.")
    return table


def _rows_by_column(tables: dict[str, Dataset], name: str, column: str | None) -> dict[str, list[int]]:
    """Split -> its rows, as a column of the only table says; nothing where there is no such column.

    Raises:
        ValueError: the column `column` was asked for and is not there, or there are several tables.
    """
    (table, *others) = tables.values()
    if column is not None:
        if others:
            raise ValueError(f"`split_column` is for a data set of one table; {name} has the splits {sorted(tables)}.")
        _existing("split", column, name, table)
    elif others or SPLIT_COLUMN not in table.column_names:
        return {}
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(table[column or SPLIT_COLUMN]):
        rows.setdefault(str(value), []).append(row)
    return rows


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
        return [_features_id(row, values[image_column]) for row, values in enumerate(features)]
    encoded = table.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    return [_picture_id(row, value) for row, value in enumerate(encoded[image_column])]


def _picture_id(row: int, encoded: dict | None) -> str:
    """The hash of the bytes; a path only without them, as embedded pictures keep their last name, which others may share."""
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        raise ValueError(f"Row {row} has no image.")
    return encoded["path"] if encoded["bytes"] is None else hashlib.sha256(encoded["bytes"]).hexdigest()


def _features_id(row: int, features) -> str:
    """The hash of the numbers."""
    try:
        return hashlib.sha256(read_features(features).numpy().tobytes()).hexdigest()
    except ValueError as error:
        raise ValueError(f"Row {row} cannot be read: {error}") from error


class TrainingImages(torch.utils.data.Dataset):
    """Augmented images with some of their captions. An item depends on (seed, epoch, number) only, never on the order."""

    def __init__(self, data: CaptionedImages, captions_per_image: int, crop_scale: float, seed: int):
        if crop_scale < 1 and not data.has_pictures:
            raise ValueError(
                f"`crop_scale` {crop_scale} crops pictures, but the images of this data set are features of regions. Set it "
                "to 1."
            )
        self.data, self.captions_per_image, self.crop_scale, self.seed = data, captions_per_image, crop_scale, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> dict:
        rng = np.random.default_rng((self.seed, self.epoch, number))
        captions = draw_captions(rng, self.data.captions[number], self.captions_per_image)
        image = self.data.image(number)
        if self.crop_scale < 1:
            assert isinstance(image, PILImage.Image)  # features are refused above
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


def noisy_order(num_captions: int, share: float, seed: int) -> np.ndarray:
    """An order of captions in which a share of them, drawn at random, have changed places with each other."""
    order = np.arange(num_captions)
    moved = np.random.default_rng(seed).permutation(num_captions)[: round(share * num_captions)]
    order[moved] = np.roll(moved, 1)
    return order


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
