"""Training images that come as a stream: in the order of their files, shuffled in a buffer, shared by process and worker."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import fsspec.asyn
import numpy as np
import torch
from datasets import Image
from datasets import IterableDataset as Stream
from datasets.distributed import split_dataset_by_node
from PIL import Image as PILImage
from torch.utils.data import IterableDataset, get_worker_info

from granalign_hf.training.batches import TrainingSet, hint_at_corrupt_share
from granalign_hf.training.columns import (
    FOLDER_COLUMN,
    Columns,
    captions_of,
    features_id,
    find_columns,
    find_picture,
    picture_id,
)
from granalign_hf.training.pictures import UnreadableImageError, read_value
from granalign_hf.training.tables import open_stream, picture_roots

logger = logging.getLogger(__name__)


class StreamedImages(TrainingSet, IterableDataset):
    """Augmented images with some of their captions, of which an epoch takes a stated number and the next one goes on.

    Every process and worker reads a part of its own: whole files where these can be shared evenly, else every n-th row. The
    end of a part is followed by its beginning, shuffled anew. A row is an image with its caption or captions; rows with the
    same image id (without such a column, the same content) are one image wherever they meet in a batch.

    Args:
        stream: of encoded pictures. has_pictures: whether `columns.image` holds pictures, and not features of regions.
        batch_size, steps_per_epoch: of a process. shuffle_buffer: rows that each part draws from.
        max_corrupt_share: share of the images of an epoch that may be unreadable; those are skipped and counted.
        process: number of this process, and how many there are.
    """

    def __init__(
        self,
        stream: Stream,
        columns: Columns,
        has_pictures: bool,
        name: str,
        *,
        seed: int,
        batch_size: int,
        steps_per_epoch: int,
        shuffle_buffer: int,
        num_workers: int = 0,
        captions_per_image: int = 1,
        crop_scale: float = 1.0,
        max_corrupt_share: float = 0.0,
        image_folder: str | None = None,
        process: tuple[int, int] = (0, 1),
    ):
        super().__init__(seed, captions_per_image, crop_scale, has_pictures)
        self.stream, self.columns, self.has_pictures, self.name = stream, columns, has_pictures, name
        self.image_folder = image_folder
        self.roots = picture_roots(name) if image_folder is None else (image_folder,)
        self.batch_size, self.steps_per_epoch, self.shuffle_buffer = batch_size, steps_per_epoch, shuffle_buffer
        self.max_corrupt_share, self.process = max_corrupt_share, process
        self._num_corrupt = torch.zeros(max(num_workers, 1), dtype=torch.int64).share_memory_()  # each worker has its own
        self._images: Iterator[_Image] = iter(())
        self._next_epoch: int | None = None  # that the images stand at the beginning of

    @classmethod
    def open(
        cls,
        name: str,
        split: str,
        config: str | None = None,
        split_column: str | None = None,
        columns: dict[str, str | None] | None = None,
        **settings,
    ) -> StreamedImages:
        """The images of a split of a Hub data set or folder. Arguments as of `load_split`; `settings` of the class.

        Raises:
            ValueError: no such data set, split or column, or nothing to stream.
        """
        columns = columns or {}
        stream, features = open_stream(name, split, config, split_column)
        found, image_folder = find_columns(features, name, **columns), columns.get("image_folder")
        has_pictures = image_folder is not None or isinstance(features[found.image], Image)
        return cls(stream, found, has_pictures, name, image_folder=image_folder, **settings)

    def __len__(self) -> int:
        return self.batch_size * self.steps_per_epoch

    @property
    def num_corrupt(self) -> int:
        return int(self._num_corrupt.sum())

    def first_image(self) -> PILImage.Image | np.ndarray:
        """Of the first row that can be read, to see whether the model can take it."""
        return next(self._readable(iter(self.stream), worker=0)).image

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        number, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # The loader takes whole batches from the workers in turn.
        count = self.batch_size * len(range(number, self.steps_per_epoch, num_workers))
        if self._next_epoch != self.epoch:
            part = self.process[0] * num_workers + number
            self._images = self._images_from(self.epoch, count, part, self.process[1] * num_workers, number)
        self._num_corrupt[number] = 0
        self._next_epoch = None
        for image in itertools.islice(self._images, count):
            yield self.item(*image)
        self._next_epoch = self.epoch + 1

    def _images_from(self, epoch: int, count: int, part: int, parts: int, worker: int) -> Iterator[_Image]:
        """The images of a part after those of earlier epochs, which are read again."""
        rows = self._rows(part, parts)
        if self.max_corrupt_share == 0:
            # No row is left out, so that none needs to be decoded to be counted.
            return self._all(itertools.islice(rows, epoch * count, None))
        images = self._readable(rows, worker)
        for _ in range(epoch):
            self._num_corrupt[worker] = 0
            deque(itertools.islice(images, count), maxlen=0)
        return images

    def _rows(self, part: int, parts: int) -> Iterator[dict]:
        if get_worker_info() is not None:
            fsspec.asyn.reset_lock()  # its thread did not survive the fork
        for number in itertools.count():
            # Not by `set_epoch`, which would reach the other workers too.
            shuffled = self.stream.shuffle(seed=self.seed * 100_003 + number, buffer_size=self.shuffle_buffer)
            is_empty = True
            # By `iter`, since the plain iterator would share the rows between the workers once more.
            for batch in split_dataset_by_node(shuffled, part, parts).iter(batch_size=1):
                is_empty = False
                yield {column: values[0] for column, values in batch.items()}
            if is_empty:
                raise ValueError(
                    f"The stream of {self.name} has no row for one of {parts} processes and workers. Lower `num_workers`."
                )

    def _all(self, rows: Iterator[dict]) -> Iterator[_Image]:
        for row in rows:
            with hint_at_corrupt_share():
                image = self._decode(row)
            yield image

    def _readable(self, rows: Iterator[dict], worker: int) -> Iterator[_Image]:
        """Without those that cannot be read.

        Raises:
            ValueError: they are too many.
        """
        for row in rows:
            try:
                yield self._decode(row)
            except UnreadableImageError as error:
                logger.warning("left out: %s", error)
                self._num_corrupt[worker] += 1
                if self.num_corrupt > self.max_corrupt_share * len(self):
                    raise ValueError(
                        f"{self.num_corrupt} images cannot be read, more than `max_corrupt_share` {self.max_corrupt_share} "
                        f"of the {len(self)} images of an epoch. The last: {error}"
                    ) from error

    def _decode(self, row: dict) -> _Image:
        """
        Raises:
            UnreadableImageError: the image cannot be decoded. ValueError: the row lacks a caption or an image id, or its
                picture lies outside of the data set. The message names the image.
        """
        value, image_id = self._picture(row), None
        if self.columns.image_id is not None:
            image_id = row[self.columns.image_id]
        elif self.has_pictures:
            image_id = picture_id("of the stream", value)
        else:
            image_id = features_id("of the stream", value)
        if image_id is None:
            raise ValueError(f"A row of {self.name} has no image id in `{self.columns.image_id}`.")
        captions = captions_of(
            row[self.columns.caption], f"of image `{image_id}`", f"`{self.columns.caption}` of {self.name}"
        )
        # A number of 63 bits, the same in every process.
        number = int.from_bytes(hashlib.sha256(str(image_id).encode()).digest()[:8], "big") >> 1
        image = read_value(value, self.roots, self.has_pictures, f"Image `{image_id}`")
        return _Image(number, str(image_id), image, captions)

    def _picture(self, row: dict):
        """The encoded picture of a row, or what stands in its place."""
        value = row[self.columns.image]
        if self.image_folder is None:
            return value
        where = f"`{self.columns.image}` of {self.name}"
        return {
            "bytes": None,
            "path": find_picture(self.image_folder, value, row.get(FOLDER_COLUMN), "of the stream", where),
        }


class _Image(NamedTuple):
    """Arguments of `TrainingSet.item`."""

    number: int
    name: str
    image: PILImage.Image | np.ndarray
    captions: list[str]
