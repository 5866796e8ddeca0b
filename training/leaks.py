"""Whether the photographs of a test were among those of the training: by what they look like, not by their names.

Data sets overlap under other names and sizes: most of Flickr8k's test photographs are in Flickr30K's training split.
Features of regions are known again by their numbers, which must be the same to the last bit.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from granalign_hf.training.data import CaptionedImages

FILE = "training_images.npz"
SIDE = 16  # rows of a hash, and its steps from left to right
MAX_DIFFERENT = 30  # of 256 bits: another size and JPEG quality change up to 27 of a photograph, another one at least 42
_BLOCK = 2**24


class Leak(NamedTuple):
    """A test image and the training image that looks the same."""

    image_id: str
    training_image_id: str


def difference_hash(image: Image.Image) -> np.ndarray:
    """(32,) uint8: 256 bits, whether the grey picture grows brighter from one cell to the next, on a 16 x 17 grid.

    The grid covers the whole picture, so that neither its size nor its proportions matter.
    """
    grey = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX), dtype=np.int16)
    return np.packbits(grey[:, 1:] > grey[:, :-1])


def features_hash(features: np.ndarray) -> np.ndarray:
    """(32,) uint8: SHA-256, of which two differ in about 128 of the 256 bits unless the features are the same."""
    return np.frombuffer(hashlib.sha256(features.tobytes()).digest(), dtype=np.uint8)


def image_hashes(data: CaptionedImages, is_quiet: bool = False) -> np.ndarray:
    """(images, 32) uint8."""
    hash_of = difference_hash if data.has_pictures else features_hash
    numbers = tqdm(range(len(data)), desc="hashes", leave=False, disable=is_quiet)
    return np.stack([hash_of(data.image(number)) for number in numbers])


def save_training_images(data: CaptionedImages, folder: Path, before: Path | None = None, is_quiet: bool = False) -> None:
    """Records beside a checkpoint what it was trained on, and what the one `before` was that it started from."""
    image_ids, hashes = np.array(data.image_ids), image_hashes(data, is_quiet)
    if before is not None and (record := _read(before)) is not None:
        image_ids, hashes = np.concatenate([image_ids, record[0]]), np.concatenate([hashes, record[1]])
        hashes, first = np.unique(hashes, axis=0, return_index=True)
        image_ids = image_ids[first]
    np.savez(folder / FILE, image_ids=image_ids, hashes=hashes)


def find_leaks(data: CaptionedImages, folder: Path) -> list[Leak] | None:
    """The images of a split that a checkpoint was trained on; `None` where no record stands beside it.

    Raises:
        ValueError: the record cannot be read.
    """
    record = _read(folder)
    if record is None:
        return None
    image_ids, trained = record
    return [
        Leak(data.image_ids[number], str(image_ids[match]))
        for number, match in nearest(image_hashes(data, is_quiet=True), trained)
    ]


def _read(folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """(images,) ids and (images, 32) hashes."""
    if not (folder / FILE).is_file():
        return None
    try:
        with np.load(folder / FILE, allow_pickle=False) as record:
            return record["image_ids"], record["hashes"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{folder / FILE} cannot be read ({error}). Remove it to do without the check.") from error


def nearest(hashes: np.ndarray, others: np.ndarray) -> list[tuple[int, int]]:
    """(n, 32) and (m, 32) uint8 -> (row, nearest other row) of each row that has one within `MAX_DIFFERENT` bits."""
    bits = np.unpackbits(others, axis=1).astype(np.float32)
    pairs = []
    step = max(_BLOCK // len(others), 1)
    for start in range(0, len(hashes), step):
        block = np.unpackbits(hashes[start : start + step], axis=1).astype(np.float32)
        different = block.sum(1)[:, None] + bits.sum(1) - 2 * block @ bits.T
        best = different.argmin(1)
        close = np.flatnonzero(different[np.arange(len(block)), best] <= MAX_DIFFERENT)
        pairs += [(int(start + row), int(best[row])) for row in close]
    return pairs


def leak_warning(leaks: list[Leak], num_images: int) -> str:
    """One sentence with the number and up to three examples."""
    examples = ", ".join(f"{leak.image_id} (trained on as {leak.training_image_id})" for leak in leaks[:3])
    return (
        f"{len(leaks)} of the {num_images} images were among the training images of this checkpoint, for example "
        f"{examples}. The figures say nothing about new images."
    )
