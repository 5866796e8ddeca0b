"""The pictures of a data set as they lie there: bytes, or a path that must not lead out of the data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import fsspec
import numpy as np
from PIL import Image as PILImage

from granalign_hf.modeling.processing_granalign import read_image
from granalign_hf.modeling.region_features import read_features


class UnreadableImageError(ValueError):
    """An image that cannot be read; the message names it."""


def read_picture(value: dict | None, roots: Sequence[str]) -> PILImage.Image:
    """A picture in RGB, by the rules of `GranAlignProcessor`.

    `datasets` itself would open whatever path or address a data set names.

    Args:
        value: `bytes` and `path` of `datasets.Image(decode=False)`. roots: folders that a path may lie in; one that is
            relative starts in the first.

    Raises:
        UnreadableImageError: there is no such picture, or it cannot be decoded.
        ValueError: the path leads out of the folders.
    """
    value = value or {}
    encoded, path = value.get("bytes"), value.get("path")
    if encoded is None and path is None:
        raise UnreadableImageError("there is no picture")
    place = within(path, roots) if encoded is None and path is not None else None
    if encoded is None and place is None:
        raise ValueError(f"the path {path!r} leads out of the data set ({', '.join(roots) or 'which has no folder'})")
    try:
        if place is not None and "://" in place:
            with fsspec.open(place, "rb") as file:
                encoded = file.read()
        return read_image(place if encoded is None else encoded)
    except (OSError, ValueError) as error:
        raise UnreadableImageError(str(error)) from error


def read_value(value, roots: Sequence[str], has_pictures: bool, name: str) -> PILImage.Image | np.ndarray:
    """The picture, or the features (boxes, features) float32, that stand in a row; `name` is for the message.

    Raises:
        UnreadableImageError: it cannot be read. ValueError: its path leads out of the data set.
    """
    file = f" (file {value['path']})" if isinstance(value, dict) and value.get("path") else ""
    try:
        return read_picture(value, roots) if has_pictures else read_features(value).numpy()
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{name}{file} cannot be read: {error}") from error
    except ValueError as error:
        raise (ValueError if has_pictures else UnreadableImageError)(f"{name} cannot be read: {error}") from error


def within(path: str, roots: Sequence[str]) -> str | None:
    """The path of a file in one of some folders, in full; nothing where it leads out of them, be it by a link.

    A folder may be an address (`hf://datasets/...`), a path one of a file in an archive (`zip://FILE::ARCHIVE`).
    """
    inner, _, place = path.rpartition("::")
    if "://" in place:
        is_plain = ".." not in PurePosixPath(place).parts
        is_inside = any(place.startswith((f"{root}/", f"{root}@")) for root in roots if "://" in root)
        return path if is_plain and is_inside else None
    folders = [Path(root).resolve() for root in roots if "://" not in root]
    if not folders:
        return None
    found = (folders[0] / place).resolve()
    if not any(found.is_relative_to(folder) for folder in folders):
        return None
    return f"{inner}::{found}" if inner else str(found)
