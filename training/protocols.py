"""The protocols of the literature: which images, in which galleries. What a figure of one name stands for is data, here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from granalign_hf.evaluation import RetrievalRanks, fold_ranks, ranks_to_metrics, retrieval_ranks
from granalign_hf.training.data import CaptionedImages
from granalign_hf.whole_files import whole_file

NUM_CAPTIONS = 5


class Protocol(NamedTuple):
    """A split of Karpathy and Fei-Fei (CVPR 2015), five captions of each image, and the galleries that are ranked.

    A few images of MS-COCO have more, which the literature since VSE++ (BMVC 2018) leaves out. Several galleries are folds
    of consecutive images, in the order of the data set; the figure is the mean over them.
    """

    name: str
    split: str
    num_images: int
    num_folds: int = 1

    def select(self, data: CaptionedImages, dataset: str, split: str) -> CaptionedImages:
        """The images with the captions that count.

        Raises:
            ValueError: it is not the split, or not the number of images or captions, that the protocol is defined on.
        """
        if split != self.split or len(data) != self.num_images:
            raise ValueError(
                f"The protocol {self.name} is defined on the {self.num_images} images of the split {self.split!r} "
                f"(Karpathy), got {len(data)} images of {split!r} of {dataset}. Name that split, or leave `protocol` out."
            )
        for image_id, captions in zip(data.image_ids, data.captions, strict=True):
            if len(captions) < NUM_CAPTIONS:
                raise ValueError(
                    f"The protocol {self.name} is defined on {NUM_CAPTIONS} captions an image, but {image_id!r} of "
                    f"{dataset} has {len(captions)}. Use a data set with all of them, or leave `protocol` out."
                )
        return dataclasses.replace(data, captions=[captions[:NUM_CAPTIONS] for captions in data.captions])

    def describe(self, num_captions: int) -> str:
        """In words, with the name."""
        galleries = "one gallery"
        if self.num_folds > 1:
            size = self.num_images // self.num_folds
            galleries = f"mean over {self.num_folds} folds of {size:,} consecutive images with their captions"
        return f"{self.name}: {self.num_images:,} images, {num_captions:,} captions, all pairs, {galleries}"


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("flickr30k-1k", "test", 1000),
        Protocol("coco-1k-5fold", "test", 5000, num_folds=5),
        Protocol("coco-5k", "test", 5000),
        Protocol("flickr8k-1k", "test", 1000),
    )
}


def gallery_ranks(scores: np.ndarray, caption_image_index: np.ndarray, protocol: Protocol | None) -> list[RetrievalRanks]:
    """The ranks in each gallery of a protocol, or in one of all images; arguments as `retrieval_ranks`."""
    if protocol is None or protocol.num_folds == 1:
        return [retrieval_ranks(scores, caption_image_index)]
    return fold_ranks(scores, caption_image_index, protocol.num_folds)


def mean_metrics(galleries: Sequence[RetrievalRanks]) -> dict[str, float]:
    """Mean of `ranks_to_metrics` over the galleries."""
    metrics = [ranks_to_metrics(ranks) for ranks in galleries]
    return {name: float(np.mean([gallery[name] for gallery in metrics])) for name in metrics[0]}


def save_ranks(path: Path, galleries: Sequence[RetrievalRanks]) -> None:
    """The rank of every query, for `paired_bootstrap`: the fields of `RetrievalRanks`, with `_0`, `_1`, ... for folds."""
    arrays: dict[str, Any] = {}
    for number, ranks in enumerate(galleries):
        suffix = f"_{number}" if len(galleries) > 1 else ""
        arrays |= {f"{name}{suffix}": values for name, values in dataclasses.asdict(ranks).items()}
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_ranks(path: Path) -> RetrievalRanks:
    """What [`save_ranks`] wrote of one gallery."""
    with np.load(path) as arrays:
        return RetrievalRanks(**arrays)
