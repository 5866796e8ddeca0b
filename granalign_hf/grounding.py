"""Figures from maps and boxes: the pointing game, with its baselines and its sampling error. Arrays in, numbers out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .evaluation import quantiles, resampled_sums, to_array, to_scores


@dataclass(frozen=True)
class PointingHits:
    """Per phrase, in phrase order, each (num_phrases,) float64 in [0, 1].

    Attributes:
        hit: 1 if the centre of the highest patch lies in a box of the phrase, else 0; the mean over tied patches.
        random_patch: the share of patch centres that lie in a box: what a patch drawn at random would score.
        image_center: 1 if the centre of the image lies in a box, else 0.
    """

    hit: np.ndarray
    random_patch: np.ndarray
    image_center: np.ndarray


class GroupAccuracy(NamedTuple):
    """Mean of a group in percent with its bootstrap interval over images, and how many phrases it has."""

    accuracy: float
    low: float
    high: float
    num_phrases: int


def patch_centers(grid: tuple[int, int], image_size: tuple[float, float]) -> np.ndarray:
    """Patch centres (rows, columns, 2) of a grid (rows, columns), as (x, y) in pixels of an image (height, width)."""
    (rows, columns), (height, width) = grid, image_size
    y, x = (np.arange(rows) + 0.5) * height / rows, (np.arange(columns) + 0.5) * width / columns
    return np.stack(np.meshgrid(x, y), axis=-1)


def points_in_boxes(points: Any, boxes: Any) -> np.ndarray:
    """Whether points (..., 2) as (x, y) lie in any of the boxes (num_boxes, 4) [x0, y0, x1, y1], end exclusive."""
    points, boxes = np.asarray(points)[..., None, :], np.asarray(boxes)
    return ((points >= boxes[:, :2]) & (points < boxes[:, 2:])).all(axis=-1).any(axis=-1)


def pointing_game(maps: Sequence[Any], boxes: Sequence[Any], image_sizes: Any) -> PointingHits:
    """The pointing game (Zhang et al., ECCV 2016) on patch grids: does the highest patch of a phrase lie in its boxes?

    A map with several equal maxima scores the mean over them, its expected hit under a random choice, so that a
    constant map scores exactly as a random patch.

    Args:
        maps: per phrase a map (rows, columns), of any grid, rectangular too.
        boxes: per phrase at least one box, (num_boxes, 4) [x0, y0, x1, y1] in pixels of the image, end exclusive.
        image_sizes: (num_phrases, 2) the (height, width) of each phrase's image in the pixels of the boxes, or one
            pair for all.

    Raises:
        ValueError: if the counts differ, a map is not 2-D, empty or has a NaN, a phrase has no box, or a box is empty.
    """
    if len(maps) != len(boxes):
        raise ValueError(f"`maps` and `boxes` must have one entry for each phrase, got {len(maps)} and {len(boxes)}.")
    sizes = _check_image_sizes(image_sizes, len(maps))
    hits = np.zeros((3, len(maps)))
    for n, size in enumerate(sizes):
        phrase_map, phrase_boxes = _to_map(maps[n], n), _to_boxes(boxes[n], n)
        inside = points_in_boxes(patch_centers(phrase_map.shape, size), phrase_boxes)
        center = points_in_boxes(size[::-1] / 2, phrase_boxes)
        hits[:, n] = inside[phrase_map == phrase_map.max()].mean(), inside.mean(), center
    return PointingHits(*hits)


def summarize_hits(
    hits: Any,
    image_index: Sequence[Any],
    groups: Sequence[str | Sequence[str]] | None = None,
    num_samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, GroupAccuracy]:
    """Accuracy of all phrases ("all", first) and of each group (sorted), with an interval over images.

    Images that have a phrase of the group are drawn with replacement, with all their phrases of that group.

    Args:
        hits: (num_phrases,) in [0, 1], one of the arrays of `PointingHits`.
        image_index: per phrase the image it belongs to: an index, a name, anything that can be sorted.
        groups: per phrase the name of its group, or several names: the phrase then counts in each.
        num_samples, seed, confidence: as `bootstrap_interval`.

    Raises:
        ValueError: if there are no phrases, the lengths differ, or a group is called "all".
    """
    hits = to_scores(hits, "hits", ndim=1)
    groups = [()] * len(hits) if groups is None else groups
    if not len(hits) == len(image_index) == len(groups) or len(hits) == 0:
        raise ValueError(
            "`hits`, `image_index` and `groups` must have one entry for each phrase and at least one phrase, got "
            f"{len(hits)}, {len(image_index)} and {len(groups)}."
        )
    members: dict[str, list[int]] = {}
    for phrase, names in enumerate(groups):
        for name in {names} if isinstance(names, str) else set(names):
            members.setdefault(name, []).append(phrase)
    if "all" in members:
        raise ValueError('`groups` must not hold the name "all", which stands for all phrases; rename that group.')
    image = np.unique(np.asarray(image_index), return_inverse=True)[1]
    summary = {}
    for name, phrases in [("all", list(range(len(hits)))), *sorted(members.items())]:
        own_image = np.unique(image[phrases], return_inverse=True)[1]
        counts = np.stack([np.bincount(own_image, weights=hits[phrases]), np.bincount(own_image)], axis=1)
        sums = resampled_sums(counts, num_samples, np.random.default_rng(seed))
        low, high = quantiles(100.0 * sums[:, 0] / sums[:, 1], confidence)
        summary[name] = GroupAccuracy(float(100.0 * hits[phrases].mean()), float(low), float(high), len(phrases))
    return summary


def _check_image_sizes(image_sizes: Any, num_phrases: int) -> np.ndarray:
    sizes = to_array(image_sizes, "image_sizes").astype(np.float64)
    if sizes.shape not in ((2,), (num_phrases, 2)) or not (sizes > 0).all():
        raise ValueError(
            f"`image_sizes` must be (height, width) in pixels, one pair for all or ({num_phrases}, 2), all positive; "
            f"got shape {sizes.shape}{f' with minimum {sizes.min()}' if sizes.size else ''}."
        )
    return np.broadcast_to(sizes, (num_phrases, 2))


def _to_map(values: Any, phrase: int) -> np.ndarray:
    phrase_map = to_scores(values, f"maps[{phrase}]", ndim=2)
    if phrase_map.size == 0:
        raise ValueError(f"`maps[{phrase}]` must have at least one patch, got shape {phrase_map.shape}.")
    return phrase_map


def _to_boxes(values: Any, phrase: int) -> np.ndarray:
    boxes = to_array(values, f"boxes[{phrase}]")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) == 0:
        raise ValueError(
            f"`boxes[{phrase}]` must have shape (num_boxes, 4) with at least one box, got {boxes.shape}; leave out "
            "phrases without boxes."
        )
    if not (boxes[:, :2] < boxes[:, 2:]).all():
        raise ValueError(f"`boxes[{phrase}]` must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1, got {boxes.tolist()}.")
    return boxes
