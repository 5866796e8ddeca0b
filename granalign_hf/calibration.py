"""From scores to probabilities that hold, and what an uncertainty is worth. Arrays in, numbers out; no model.

Queries are the rows of a matrix of scores, candidates its columns. Where it is known which candidate is right, the matrix is
a square gallery with the right answers on its diagonal: one caption an image (see [`one_caption_galleries`]), so that a
softmax over the candidates can be a probability.

Every uncertainty is turned so that more means less sure.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .evaluation import to_scores

WAYS = ("image_to_text", "text_to_image")
COVERAGE = 0.9  # of the answer sets
LOGIT_SCALES = (1e-2, 1e4)  # without a single error in a gallery there is no largest likelihood
_BLOCK_ELEMENTS = 2**22


def one_caption_galleries(caption_image_index: Any) -> np.ndarray:
    """(galleries, images): the number of the g-th caption of each image, for as many g as every image has captions.

    Args:
        caption_image_index: (captions,) int in [0, images), the image of each caption; every image has one.
    """
    index = np.asarray(caption_image_index)
    order, counts = np.argsort(index, kind="stable"), np.bincount(index)
    return order[np.cumsum(counts) - counts + np.arange(counts.min())[:, None]]


# ------------------------------------------------------------------------------------------------------- first answers


@dataclass(frozen=True)
class FirstAnswers:
    """The candidates with the highest score, and how unsure they are.

    Attributes:
        first: (queries,) int. top: (queries,) its score.
        uncertainties: name -> (queries,): `margin`, second minus first score; `probability`, minus the log-odds of the first
            in the softmax; `entropy` of the softmax in nats; with standard errors, `standard_error` of the first, and
            `margin_in_errors`, the margin over the root of the sum of both variances.
    """

    first: np.ndarray
    top: np.ndarray
    uncertainties: dict[str, np.ndarray]

    @property
    def probability(self) -> np.ndarray:
        """(queries,): that of the first answer in the softmax over the candidates."""
        return _sigmoid(-self.uncertainties["probability"])

    @classmethod
    def joined(cls, parts: Sequence["FirstAnswers"]) -> "FirstAnswers":
        """The queries of several, one after the other."""
        return cls(
            np.concatenate([part.first for part in parts]),
            np.concatenate([part.top for part in parts]),
            {name: np.concatenate([part.uncertainties[name] for part in parts]) for name in parts[0].uncertainties},
        )


def first_answers(scores: Any, logit_scale: float, standard_errors: Any = None) -> FirstAnswers:
    """
    Args:
        scores: (queries, candidates), at least two candidates.
        logit_scale: factor on the scores before the softmax.
        standard_errors: of each score.

    Raises:
        ValueError: there are fewer than two candidates, a score is NaN, or the shapes differ.
    """
    scores = to_scores(scores, "scores", ndim=2)
    if scores.shape[1] < 2:
        raise ValueError(f"`scores` must have at least two candidates, got shape {scores.shape}: one has no rival.")
    if standard_errors is not None:
        standard_errors = to_scores(standard_errors, "standard_errors", ndim=2)
        if standard_errors.shape != scores.shape:
            raise ValueError(f"`standard_errors` must have shape {scores.shape}, got {standard_errors.shape}.")
    parts = []
    for rows in _row_blocks(scores.shape):
        errors = None if standard_errors is None else standard_errors[rows]
        parts.append(_first_answers(scores[rows].astype(np.float64), logit_scale, errors))
    return FirstAnswers.joined(parts)


def _first_answers(scores: np.ndarray, logit_scale: float, standard_errors: np.ndarray | None) -> FirstAnswers:
    rows, first = np.arange(len(scores)), scores.argmax(axis=1)
    top = scores[rows, first]
    scores[rows, first] = -np.inf
    second = scores.argmax(axis=1)
    margin = top - scores[rows, second]
    others = logit_scale * (scores - scores[rows, second][:, None])
    log_others = np.log(np.exp(others).sum(axis=1)) - logit_scale * margin  # over the exponential of the first
    below = logit_scale * (scores - top[:, None])
    below[rows, first] = 0
    log_total = np.logaddexp(0, log_others)
    entropy = log_total - (np.exp(below) * below).sum(axis=1) / np.exp(log_total)
    values = {"margin": -margin, "probability": log_others, "entropy": entropy}
    if standard_errors is not None:
        error, rival = standard_errors[rows, first].astype(np.float64), standard_errors[rows, second].astype(np.float64)
        both = np.hypot(error, rival)
        values["standard_error"] = error
        values["margin_in_errors"] = -margin / np.where(both > 0, both, np.finfo(np.float64).tiny ** 0.5)
    return FirstAnswers(first, top, values)


def is_right(gallery: Any) -> np.ndarray:
    """(n,) bool: whether the right answer scores higher than any other; a tie is wrong.

    Args:
        gallery: (n, n), the right answers on the diagonal.
    """
    return (np.asarray(gallery) >= np.diagonal(gallery)[:, None]).sum(axis=1) == 1


# ------------------------------------------------------------------------------------------------------------ fitting


def fit_logit_scale(galleries: Sequence[Any]) -> float:
    """The factor of the scores with which the softmax over candidates has the largest likelihood, both ways together.

    The mean log-likelihood of the right answers is concave in the factor; its maximum within `LOGIT_SCALES` is found by
    halving (Guo et al., ICML 2017, call 1 / factor the temperature).

    Args:
        galleries: each (n, n), the right answers on the diagonal.
    """
    low, high = np.log(LOGIT_SCALES)
    for _ in range(30):
        middle = (low + high) / 2
        excess = sum(
            _excess(gallery, np.exp(middle)) + _excess(np.asarray(gallery).T, np.exp(middle)) for gallery in galleries
        )
        low, high = (middle, high) if excess <= 0 else (low, middle)
    return float(np.exp((low + high) / 2))


def _excess(gallery: Any, logit_scale: float) -> float:
    """Sum over queries of the expected score under the softmax minus the score of the right answer."""
    gallery, total = np.asarray(gallery), 0.0
    for rows in _row_blocks(gallery.shape):
        scores = gallery[rows].astype(np.float64)
        weights = np.exp(logit_scale * (scores - scores.max(axis=1, keepdims=True)))
        total += ((weights * scores).sum(axis=1) / weights.sum(axis=1)).sum()
    return float(total - np.diagonal(gallery).sum(dtype=np.float64))


def fit_logistic(values: Any, outcomes: Any, num_steps: int = 50) -> tuple[float, float]:
    """Intercept a and slope b of P(outcome) = 1 / (1 + exp(-a - b value)) with the largest likelihood.

    The outcomes are softened as in Platt (1999), so that the slope is finite where a threshold separates them.
    """
    values, outcomes = np.asarray(values, np.float64), np.asarray(outcomes, bool)
    centre, spread = values.mean(), values.std() or 1.0
    design = np.stack([np.ones_like(values), (values - centre) / spread], axis=1)
    positives = outcomes.sum()
    targets = np.where(outcomes, (positives + 1) / (positives + 2), 1 / (len(outcomes) - positives + 2))
    weights = np.zeros(2)
    for _ in range(num_steps):  # Newton's method with the step halved until the likelihood grows
        probability = _sigmoid(design @ weights)
        hessian = (design * (probability * (1 - probability))[:, None]).T @ design + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, design.T @ (targets - probability))
        while _cross_entropy(design @ (weights + step), targets) > _cross_entropy(design @ weights, targets) + 1e-12:
            step = step / 2
        weights = weights + step
    return float(weights[0] - weights[1] * centre / spread), float(weights[1] / spread)


def logistic(values: Any, coefficients: Sequence[float]) -> np.ndarray:
    """1 / (1 + exp(-a - b value)) for `coefficients` (a, b)."""
    intercept, slope = coefficients
    return _sigmoid(intercept + slope * np.asarray(values, np.float64))


def conformal_threshold(nonconformity: Any, coverage: float = COVERAGE) -> float:
    """What the nonconformity of a new right answer stays at or below with probability `coverage` at least.

    Split conformal prediction (Vovk et al. 2005; Angelopoulos and Bates 2021): the ceil((n + 1) coverage)-th smallest of n
    values, infinite where n is too small. It takes the values to be exchangeable with those to come: several captions of one
    image are so with each other, but they carry less than as many images would.
    """
    values = np.sort(np.asarray(nonconformity, np.float64))
    place = int(np.ceil((len(values) + 1) * coverage - 1e-9))
    return float(values[place - 1]) if place <= len(values) else float("inf")


def answer_sets(scores: Any, threshold: float) -> np.ndarray:
    """(queries, candidates) bool: those that score at most `threshold` below the first, which is always among them."""
    scores = np.asarray(scores, np.float64)
    return scores >= scores.max(axis=1, keepdims=True) - threshold


# ---------------------------------------------------------------------------------------------------------- measuring


def expected_calibration_error(probability: Any, outcomes: Any, num_bins: int = 15) -> float:
    """Mean distance of probability and frequency over bins of equal width, in [0, 1] (Guo et al., ICML 2017)."""
    probability, outcomes = np.asarray(probability, np.float64), np.asarray(outcomes, np.float64)
    bins = np.minimum((probability * num_bins).astype(np.int64), num_bins - 1)
    return float(np.abs(np.bincount(bins, weights=probability - outcomes, minlength=num_bins)).sum() / len(bins))


def log_loss(probability: Any, outcomes: Any) -> float:
    """Mean of minus the log of the probability of what happened, in nats."""
    probability = np.clip(np.asarray(probability, np.float64), 1e-12, 1 - 1e-12)
    return float(-np.log(np.where(outcomes, probability, 1 - probability)).mean())


def auroc(uncertainty: Any, is_wrong: Any) -> float:
    """Probability that a wrong answer is less sure than a right one, ties counted half; NaN without one of either kind."""
    is_wrong = np.asarray(is_wrong, bool)
    num_wrong, num_right = int(is_wrong.sum()), int((~is_wrong).sum())
    if 0 in (num_wrong, num_right):
        return float("nan")
    rank_sum = _mean_ranks(uncertainty)[is_wrong].sum()
    return float((rank_sum - num_wrong * (num_wrong + 1) / 2) / (num_wrong * num_right))


def risk_coverage(uncertainty: Any, is_wrong: Any) -> np.ndarray:
    """(n,): the share of wrong answers among the 1, 2, ... n surest; of equally sure ones, the mean over their orders.

    The mean of these is the area under the risk-coverage curve (Geifman and El-Yaniv, NeurIPS 2017).
    """
    _, group, sizes = np.unique(np.asarray(uncertainty), return_inverse=True, return_counts=True)
    rate = np.bincount(group, weights=np.asarray(is_wrong, np.float64)) / sizes
    return np.cumsum(np.repeat(rate, sizes)) / np.arange(1, len(group) + 1)


def recall_by_level(uncertainty: Any, is_wrong: Any, num_levels: int = 10) -> tuple[np.ndarray, float]:
    """R@1 in percent at levels of rising uncertainty with equally many queries, and -S R^2 of level and R@1.

    S is Spearman's correlation, R^2 that of the straight line; 1: recall falls with uncertainty, in a line
    (Ji et al., CVPR 2023; Upadhyay et al., ICCV 2023).
    """
    order = np.argsort(np.asarray(uncertainty), kind="stable")
    right = 100.0 * ~np.asarray(is_wrong, bool)[order]
    recalls = np.array([part.mean() for part in np.array_split(right, num_levels)])
    levels = np.arange(num_levels)
    if np.ptp(recalls) == 0:
        return recalls, 0.0
    line, spearman = np.corrcoef(levels, recalls)[0, 1], np.corrcoef(levels, _mean_ranks(recalls))[0, 1]
    return recalls, float(-spearman * line**2)


def resampled_queries(image_index: Any, num_samples: int = 1000, seed: int = 0) -> Iterator[np.ndarray]:
    """Positions of queries for a bootstrap: as many images as there are, drawn with replacement, with all their queries.

    Args:
        image_index: (queries,) int, the image of each query.
    """
    index = np.asarray(image_index)
    order = np.argsort(index, kind="stable")
    queries = np.split(order, np.flatnonzero(np.diff(index[order])) + 1)
    rng = np.random.default_rng(seed)
    for _ in range(num_samples):
        yield np.concatenate([queries[n] for n in rng.integers(len(queries), size=len(queries))])


def _row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // shape[1])
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _mean_ranks(values: Any) -> np.ndarray:
    """(n,) ranks from 1, equal values at the mean of their places."""
    _, group, sizes = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -values))


def _cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    return float((np.logaddexp(0, logits) - targets * logits).sum())
