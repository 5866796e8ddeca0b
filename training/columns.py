"""Which columns of a data set hold what, and what a row says in them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from datasets import Features, Image

from granalign_hf.modeling.region_features import read_features
from granalign_hf.training.pictures import within

CAPTION_COLUMNS = ("captions", "caption", "sentences", "sentence", "text", "raw")
FEATURES_COLUMN = "features"
IMAGE_ID_COLUMNS = ("image_id", "filename", "file_name", "cocoid", "img_id", "image_path")
FILE_NAME_COLUMNS = ("filename", "file_name")  # in `image_folder`, some also in the folder that `filepath` names
FOLDER_COLUMN = "filepath"


class Columns(NamedTuple):
    """Names of columns."""

    image: str  # pictures, features of regions, or file names of pictures in `image_folder`
    caption: str
    image_id: str | None


def find_columns(
    features: Features,
    name: str,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_id_column: str | None = None,
    image_folder: str | None = None,
    features_column: str | None = None,
) -> Columns:
    """The columns of a data set, each as named or found by type and name.

    Args:
        image_column: of pictures, or of their names. caption_column: of a caption or several. image_id_column: what tells
            images apart.
        image_folder: where the pictures lie if the data set has their names only, in `image_column`, `filename` or
            `file_name`, and maybe their folder in there as `filepath`.
        features_column: of the features of regions. Default: `features`, where there is no column of images.

    Raises:
        ValueError: no such column, or one of another type.
    """
    if features_column is not None and (image_column or image_folder):
        raise ValueError(
            f"`features_column` {features_column!r} replaces pictures: leave out `image_column` and `image_folder`."
        )
    if image_folder is not None:
        image = image_column or next((n for n in FILE_NAME_COLUMNS if n in features), None)
        image = existing_column("image", image, name, features)
    else:
        image = _image_column(features, name, image_column, features_column)
    caption = caption_column or next((n for n in CAPTION_COLUMNS if n in features), None)
    caption = existing_column("caption", caption, name, features)
    if image_id_column is None:
        image_id_column = next((n for n in IMAGE_ID_COLUMNS if n in features), None)
    if image_id_column is not None:
        existing_column("image_id", image_id_column, name, features)
    return Columns(image, caption, image_id_column)


def existing_column(kind: str, column: str | None, name: str, features: Features) -> str:
    """The column, if there is one of that name; pictures are images and nothing else."""
    if column is None or column not in features:
        has_file_names = kind == "image" and any(n in features for n in FILE_NAME_COLUMNS)
        folder = ", the folder of the files that it names with `image_folder`" if has_file_names else ""
        raise ValueError(
            f"The data set {name} has no {kind} column{'' if column is None else f' {column!r}'}; its columns are "
            f"{list(features)}. Name it with `{kind}_column`{folder}"
            + (", or that of the features of regions with `features_column`." if kind == "image" else ".")
        )
    if isinstance(features[column], Image) and kind != "image":
        hint = "it with `image_column`" if kind == "features" else f"another one with `{kind}_column`"
        raise ValueError(f"The column {column!r} of {name} holds pictures: name {hint}.")
    return column


def _image_column(features: Features, name: str, column: str | None, features_column: str | None) -> str:
    """The column of the pictures, or of what stands in their place."""
    column = column or next((n for n, kind in features.items() if isinstance(kind, Image)), None)
    if column is None and features_column is None and FEATURES_COLUMN in features:
        features_column = FEATURES_COLUMN
    if features_column is not None:
        return existing_column("features", features_column, name, features)
    column = existing_column("image", column, name, features)
    if not isinstance(features[column], Image):
        raise ValueError(
            f"The column {column!r} of {name} holds {features[column]}, no images. Cast it to `datasets.Image`, or "
            "name the folder of the pictures with `image_folder`."
        )
    return column


def captions_of(value, row: int | str, where: str) -> list[str]:
    """The captions of a row: a string or several, each as it is or as `raw` of a mapping.

    Raises:
        ValueError: there is none, or one is empty or no string; the message names the row.
    """
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


def find_picture(folder: str, file, inner, row: int | str, where: str) -> str:
    """The path of a picture in `image_folder`, there or in its folder `inner`.

    Raises:
        ValueError: it is not there, or not within the folder, be it by a link.
    """
    places = [Path(folder) / str(file), Path(folder) / str(inner or "") / str(file)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(f"`image_folder` {folder} has no picture {file!r}, which row {row} of {where} names.")
    path = within(str(found.absolute()), (folder,))
    if path is None:
        raise ValueError(f"Row {row} of {where} names {file!r}, which leads out of `image_folder` {folder}.")
    return path


def picture_id(row: int | str, encoded: dict | None) -> str:
    """The hash of the bytes; a path only without them, as embedded pictures keep their last name, which others may share."""
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        raise ValueError(f"Row {row} has no image.")
    return encoded["path"] if encoded["bytes"] is None else hashlib.sha256(encoded["bytes"]).hexdigest()


def features_id(row: int | str, features) -> str:
    """The hash of the numbers."""
    try:
        return hashlib.sha256(read_features(features).numpy().tobytes()).hexdigest()
    except ValueError as error:
        raise ValueError(f"Row {row} cannot be read: {error}") from error
