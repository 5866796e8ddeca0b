"""Figures from scores: retrieval recall with its sampling error, and folds.

Arrays in (numpy, or torch tensors), numbers out; this file knows no model and imports nothing but numpy, because
`image_text_recall.py` takes a copy of it along when the `evaluate` library loads it without this package.

Recall follows the protocol of VSE++ (Faghri et al., BMVC 2018), which GRM (arXiv 2511.07710) reports: the rank of an
image is the rank of the best of its own captions among all captions of the gallery, the rank of a caption is the rank
of its image among all images. Two things are stricter here: which image a caption belongs to is data (any number of
captions an image), and ties count against the model, so that a constant score is never a hit by luck of the order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

RECALL_AT = (1, 5, 10)
RECALL_NAMES = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in RECALL_AT)
_BLOCK_ELEMENTS = 2**24
_BOOTSTRAP_ELEMENTS = 2**22


# ----------------------------------------------------------------------------------------------------------- retrieval


@dataclass(frozen=True)
class RetrievalRanks:
    """Where the right answers landed; rank 1 is the first place.

    Attributes:
        image_to_text: (num_images,) int, 1 + number of other images' captions that score at least as high as the
            image's best own caption. The image's other own captions are no competitors.
        text_to_image: (num_captions,) int, 1 + number of other images that score at least as high as the caption's.
        caption_image_index: (num_captions,) int, the image that each caption belongs to.
    """

    image_to_text: np.ndarray
    text_to_image: np.ndarray
    caption_image_index: np.ndarray


class RankAccumulator:
    """Exact ranks from blocks of scores, so that the whole score matrix never has to be in memory.

    A caption can only be ranked once its right score is known, so the right scores come first and the blocks follow,
    in any order and of any size. `ranks` equals `retrieval_ranks` of the whole matrix.

    Args:
        own_scores: (num_captions,) the score of each caption with its own image. Compute them with the same code and
            precision as the blocks: a rival within one rounding step of the right answer may otherwise change sides.
        caption_image_index: (num_captions,) int in [0, num_images), the image that each caption belongs to.
        num_images: images in the gallery.

    Raises:
        ValueError: if an image has no caption, an index is out of range, or a score is NaN.
    """

    def __init__(self, own_scores: Any, caption_image_index: Any, num_images: int):
        self._index = _check_caption_image_index(caption_image_index, num_images)
        self._own_scores = to_scores(own_scores, "own_scores", ndim=1)
        if len(self._own_scores) != len(self._index):
            raise ValueError(
                f"`own_scores` must have one score for each of the {len(self._index)} captions of "
                f"`caption_image_index`, got {len(self._own_scores)}."
            )
        by_image = np.argsort(self._index, kind="stable")
        first_caption = np.searchsorted(self._index[by_image], np.arange(num_images))
        self._best_own_scores = np.maximum.reduceat(self._own_scores[by_image], first_caption)
        self._scale = np.abs(self._own_scores[np.isfinite(self._own_scores)]).max(initial=0)
        self._image_to_text = np.zeros(num_images, dtype=np.int64)  # 0 = not seen yet
        self._text_to_image = np.ones(len(self._index), dtype=np.int64)

    def add(self, first_image: int, scores: Any) -> None:
        """Counts the rivals in one block.

        Args:
            first_image: the index of the block's first image in the gallery.
            scores: (num_block_images, num_captions), consecutive images with all captions.

        Raises:
            ValueError: if the block has another shape, reaches outside the gallery, repeats an image, holds a NaN, or
                contradicts `own_scores`.
        """
        block = to_scores(scores, "scores", ndim=2)
        num_images, num_captions = len(self._image_to_text), len(self._index)
        images = slice(first_image, first_image + len(block))
        if block.shape[1] != num_captions or not 0 <= images.start <= images.stop <= num_images:
            raise ValueError(
                f"A block must have shape (b, {num_captions}) and lie within {num_images} images, got shape "
                f"{block.shape} with `first_image` {first_image}."
            )
        if self._image_to_text[images].any():
            raise ValueError(f"Images {images.start} to {images.stop - 1} were partly added before; add each one once.")
        captions = np.flatnonzero((self._index >= images.start) & (self._index < images.stop))
        own = (self._index[captions] - images.start, captions)
        self._check_own_scores(block[own], captions)
        beats_own_caption = block >= self._best_own_scores[images, None]
        beats_own_caption[own] = False
        self._image_to_text[images] = 1 + np.count_nonzero(beats_own_caption, axis=1)
        beats_own_image = block >= self._own_scores
        beats_own_image[own] = False
        self._text_to_image += np.count_nonzero(beats_own_image, axis=0)

    def ranks(self) -> RetrievalRanks:
        """The ranks, once every image was added; a ValueError before."""
        missing = np.flatnonzero(self._image_to_text == 0)
        if len(missing):
            raise ValueError(
                f"{len(missing)} of {len(self._image_to_text)} images have no scores yet, the first is {missing[0]}; "
                "`add` every image before asking for the ranks."
            )
        return RetrievalRanks(self._image_to_text.copy(), self._text_to_image.copy(), self._index)

    def _check_own_scores(self, from_block: np.ndarray, captions: np.ndarray) -> None:
        # Loose on purpose: it is to find captions in another order, not a rounding error of half precision.
        given = self._own_scores[captions]
        wrong = np.flatnonzero(~np.isclose(from_block, given, rtol=0, atol=0.02 * self._scale))
        if len(wrong):
            raise ValueError(
                f"`own_scores` of caption {captions[wrong[0]]} is {given[wrong[0]]}, the block says "
                f"{from_block[wrong[0]]}; give both in the same order of captions and images."
            )


def retrieval_ranks(scores: Any, caption_image_index: Any, block_size: int | None = None) -> RetrievalRanks:
    """Ranks both ways from one score matrix (see `RetrievalRanks`).

    Args:
        scores: (num_images, num_captions), higher is better, of any real type; a `np.memmap` is read block by block.
        caption_image_index: (num_captions,) int in [0, num_images), the image that each caption belongs to.
        block_size: images compared at a time; it bounds the memory and never changes the result.

    Raises:
        ValueError: if a shape does not fit, an image has no caption, an index is out of range, or a score is NaN.
    """
    scores = to_array(scores, "scores")
    if scores.ndim != 2:
        raise ValueError(f"`scores` must have shape (num_images, num_captions), got {scores.shape}.")
    num_images, num_captions = scores.shape
    index = _check_caption_image_index(caption_image_index, num_images)
    if len(index) != num_captions:
        raise ValueError(
            f"`caption_image_index` must have one entry for each of the {num_captions} columns of `scores` "
            f"{scores.shape}, got {len(index)}. Rows are images, columns are captions: transpose `scores` if needed."
        )
    block_size = max(1, _BLOCK_ELEMENTS // num_captions) if block_size is None else block_size
    accumulator = RankAccumulator(scores[index, np.arange(num_captions)], index, num_images)
    for first_image in range(0, num_images, block_size):
        accumulator.add(first_image, scores[first_image : first_image + block_size])
    return accumulator.ranks()


def ranks_to_metrics(ranks: RetrievalRanks) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways in percent [0, 100], `rsum`, their sum [0, 600], and both median ranks (>= 1).

    Keys: `image_to_text_r1`, `_r5`, `_r10`, `text_to_image_r1`, `_r5`, `_r10`, `rsum`, `image_to_text_median_rank`,
    `text_to_image_median_rank`.
    """
    metrics = dict(zip((*RECALL_NAMES, "rsum"), _recalls(_count_hits(ranks).sum(axis=0)).tolist(), strict=True))
    metrics["image_to_text_median_rank"] = float(np.median(ranks.image_to_text))
    metrics["text_to_image_median_rank"] = float(np.median(ranks.text_to_image))
    return metrics


def retrieval_metrics(scores: Any, caption_image_index: Any) -> dict[str, float]:
    """`ranks_to_metrics` of a score matrix (num_images, num_captions); arguments and errors as `retrieval_ranks`."""
    return ranks_to_metrics(retrieval_ranks(scores, caption_image_index))


def fold_ranks(scores: Any, caption_image_index: Any, num_folds: int) -> list[RetrievalRanks]:
    """Ranks within consecutive folds of images, each fold a gallery of its own with its own images' captions.

    Args and errors as `retrieval_ranks`; also a ValueError if the images do not divide into `num_folds` equal folds,
    since recall in galleries of different sizes has no meaningful mean.
    """
    scores = to_array(scores, "scores")
    if num_folds < 1 or len(scores) % num_folds:
        raise ValueError(f"`num_folds` must divide the number of images, got {num_folds} for {len(scores)} images.")
    index = _check_caption_image_index(caption_image_index, len(scores))
    fold_size = len(scores) // num_folds
    folds = []
    for start in range(0, len(scores), fold_size):
        captions = np.flatnonzero((index >= start) & (index < start + fold_size))
        folds.append(retrieval_ranks(scores[start : start + fold_size, captions], index[captions] - start))
    return folds


def fold_metrics(scores: Any, caption_image_index: Any, num_folds: int) -> dict[str, float]:
    """Mean of `retrieval_metrics` over the folds of `fold_ranks` (MS-COCO 1K: 5 folds of the 5,000 test images)."""
    folds = [ranks_to_metrics(ranks) for ranks in fold_ranks(scores, caption_image_index, num_folds)]
    return {name: float(np.mean([fold[name] for fold in folds])) for name in folds[0]}


# ------------------------------------------------------------------------------------------------------ sampling error


class PairedDifference(NamedTuple):
    """First minus second system, its bootstrap interval, and the two-sided p-value of a difference of 0."""

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap_interval(
    ranks: RetrievalRanks | Sequence[RetrievalRanks], num_samples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap interval of the six recalls and rsum over images.

    Images are drawn with replacement and bring their captions along, for the captions of an image are not independent;
    the gallery stays as it is, so the ranks need not be computed again. It is the error of the sample of queries, not
    that of another training run.

    Args:
        ranks: of one gallery, or a list of folds (`fold_ranks`), whose mean is the metric; each fold is drawn anew.
        num_samples, seed, confidence: number of draws, seed of numpy's generator, coverage in (0, 1).

    Returns:
        name of the metric (`RECALL_NAMES`, "rsum") -> (low, high), in percent.
    """
    samples = _resampled_recalls(_as_folds(ranks), num_samples, seed)
    low, high = quantiles(samples, confidence)
    return {name: (float(low[m]), float(high[m])) for m, name in enumerate((*RECALL_NAMES, "rsum"))}


def paired_bootstrap(
    first: RetrievalRanks | Sequence[RetrievalRanks],
    second: RetrievalRanks | Sequence[RetrievalRanks],
    num_samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, PairedDifference]:
    """Bootstrap of the difference of two systems on the same images, both read on the same draws.

    The p-value is twice the smaller share of draws on either side of 0, draws at 0 counted on both, each count plus
    one: never below 2 / (num_samples + 1), 1 for equal systems.

    Args and keys as `bootstrap_interval`.

    Raises:
        ValueError: if the two were not ranked on the same images and captions.
    """
    first, second = _as_folds(first), _as_folds(second)
    if len(first) != len(second) or not all(
        np.array_equal(a.caption_image_index, b.caption_image_index) for a, b in zip(first, second, strict=True)
    ):
        raise ValueError("`first` and `second` must rank the same images and captions in the same order and folds.")
    difference = _mean_recalls(first) - _mean_recalls(second)
    samples = _resampled_recalls(first, num_samples, seed) - _resampled_recalls(second, num_samples, seed)
    return _paired_differences(difference, samples, confidence)


def paired_bootstrap_of_runs(
    first: Sequence[RetrievalRanks],
    second: Sequence[RetrievalRanks],
    num_samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, PairedDifference]:
    """Bootstrap of the mean difference of two methods, each trained several times: over images and over training runs.

    Every draw takes images with replacement, the same for all runs, and runs of each method with replacement, since
    another training would have given other ones; what n runs deviate is scaled by sqrt(n / (n - 1)), as drawing from so
    few understates it. With one run a method it is `paired_bootstrap`, and says nothing of another training.

    Args:
        first, second: the ranks of each training run of a method, all on the same images and captions.

    Keys and p-value as `paired_bootstrap`.

    Raises:
        ValueError: if the runs were not ranked on the same images and captions.
    """
    runs = [*first, *second]
    if not all(np.array_equal(run.caption_image_index, runs[0].caption_image_index) for run in runs):
        raise ValueError("All runs must rank the same images and captions in the same order.")
    rng = np.random.default_rng(seed)
    drawn, means = [], []
    for method in (first, second):
        recalls = np.stack([_resampled_recalls([run], num_samples, seed) for run in method])
        chosen = rng.integers(len(method), size=(len(method), num_samples))
        deviation = recalls[chosen, np.arange(num_samples)].mean(axis=0) - recalls.mean(axis=0)
        drawn.append(recalls.mean(axis=0) + deviation * np.sqrt(len(method) / max(len(method) - 1, 1)))
        means.append(_mean_recalls(list(method)))
    return _paired_differences(means[0] - means[1], drawn[0] - drawn[1], confidence)


def _paired_differences(difference: np.ndarray, samples: np.ndarray, confidence: float) -> dict[str, PairedDifference]:
    """(7,) and its draws (num_samples, 7) -> the difference of each metric."""
    low, high = quantiles(samples, confidence)
    one_sided = 1 + np.minimum((samples <= 0).sum(axis=0), (samples >= 0).sum(axis=0))
    p_value = np.minimum(1.0, 2.0 * one_sided / (len(samples) + 1))
    return {
        name: PairedDifference(float(difference[m]), float(low[m]), float(high[m]), float(p_value[m]))
        for m, name in enumerate((*RECALL_NAMES, "rsum"))
    }


def _as_folds(ranks: RetrievalRanks | Sequence[RetrievalRanks]) -> list[RetrievalRanks]:
    return [ranks] if isinstance(ranks, RetrievalRanks) else list(ranks)


def _count_hits(ranks: RetrievalRanks) -> np.ndarray:
    """(num_images, 2, 4) float64 per image and way: queries with rank <= 1, 5, 10, and queries at all."""
    limits = np.array([*RECALL_AT, np.inf])
    num_images = len(ranks.image_to_text)
    counts = np.zeros((num_images, 2, len(limits)))
    counts[:, 0] = ranks.image_to_text[:, None] <= limits
    for column, limit in enumerate(limits):
        hits = ranks.text_to_image <= limit
        counts[:, 1, column] = np.bincount(ranks.caption_image_index, weights=hits, minlength=num_images)
    return counts


def _recalls(counts: np.ndarray) -> np.ndarray:
    """Summed counts (..., 2, 4) -> (..., 7): the six recalls in percent and their sum."""
    recalls = (100.0 * counts[..., :-1] / counts[..., -1:]).reshape(*counts.shape[:-2], len(RECALL_NAMES))
    return np.concatenate([recalls, recalls.sum(axis=-1, keepdims=True)], axis=-1)


def _mean_recalls(folds: list[RetrievalRanks]) -> np.ndarray:
    return np.mean([_recalls(_count_hits(ranks).sum(axis=0)) for ranks in folds], axis=0)


def _resampled_recalls(folds: list[RetrievalRanks], num_samples: int, seed: int) -> np.ndarray:
    """(num_samples, 7); equal seeds and gallery sizes give the same draws, which is what makes a pair comparable."""
    rng = np.random.default_rng(seed)
    return np.mean([_recalls(resampled_sums(_count_hits(ranks), num_samples, rng)) for ranks in folds], axis=0)


def resampled_sums(counts: np.ndarray, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Sums of (num_units, ...) over units drawn with replacement -> (num_samples, ...)."""
    flat = counts.reshape(len(counts), -1)
    sums = [draws @ flat for draws in _draw_units(len(counts), num_samples, rng)]
    return np.concatenate(sums).reshape(num_samples, *counts.shape[1:])


def _draw_units(num_units: int, num_samples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Chunks (n, num_units) of how often each unit is drawn in num_units draws; n is bounded by memory."""
    chunk = max(1, _BOOTSTRAP_ELEMENTS // num_units)
    for start in range(0, num_samples, chunk):
        n = min(chunk, num_samples - start)
        drawn = rng.integers(num_units, size=(n, num_units)) + num_units * np.arange(n)[:, None]
        yield np.bincount(drawn.ravel(), minlength=n * num_units).reshape(n, num_units).astype(np.float64)


def quantiles(samples: np.ndarray, confidence: float) -> np.ndarray:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie between 0 and 1, got {confidence}. Pass 0.95 for a 95 % interval.")
    return np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)


# -------------------------------------------------------------------------------------------------------------- inputs


def to_array(values: Any, name: str) -> np.ndarray:
    if hasattr(values, "detach"):  # a torch tensor, on any device, told without importing torch
        values = values.detach().cpu()
        values = (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()  # numpy has no bfloat16
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"`{name}` must be rectangular, but its rows have different lengths.") from error


def to_scores(values: Any, name: str, ndim: int) -> np.ndarray:
    scores = to_array(values, name)
    if scores.ndim != ndim or scores.dtype.kind not in "fiu":
        raise ValueError(f"`{name}` must be {ndim}-D and real, got shape {scores.shape} of type {scores.dtype}.")
    is_nan = np.isnan(scores)
    if is_nan.any():
        position = tuple(int(p) for p in np.argwhere(is_nan)[0])
        raise ValueError(
            f"`{name}` has {is_nan.sum()} NaN, the first at {position}, and a NaN has no rank; look for overflow or a "
            "division by 0 in the model."
        )
    return scores


def _check_caption_image_index(caption_image_index: Any, num_images: int) -> np.ndarray:
    index = to_array(caption_image_index, "caption_image_index")
    if num_images < 1 or index.ndim != 1 or index.size == 0 or index.dtype.kind not in "iu":
        raise ValueError(
            "`caption_image_index` must be a 1-D array of integers, the image of each caption, for at least one image "
            f"and one caption; got shape {index.shape} of type {index.dtype} for {num_images} images."
        )
    index = index.astype(np.int64)
    if index.min() < 0 or index.max() >= num_images:
        raise ValueError(
            f"`caption_image_index` must lie in [0, {num_images}), got values from {index.min()} to {index.max()}."
        )
    without = np.flatnonzero(np.bincount(index, minlength=num_images) == 0)
    if len(without):
        raise ValueError(
            f"`caption_image_index` names no caption for {len(without)} of {num_images} images, the first is image "
            f"{without[0]}; an image without captions cannot be ranked, leave it out of the gallery."
        )
    return index
