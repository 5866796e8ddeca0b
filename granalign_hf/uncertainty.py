# Copyright 2026 The granalign authors. Licensed under the Apache License, Version 2.0.
"""How sure an image, a score and an answer are (GRM eq. 4-6).

B images, C captions, w words, K regions, d features. `image` and `text` are the outputs of `get_image_features` and
`get_text_features` of a model at inference. Tokens have length 1, so a variance is of the order 1 / d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from .calibration import answer_sets, first_answers, logistic
from .modeling.configuration_granalign import ERROR_MEASURES
from .modeling.pairwise import CPU_BUDGET, DEVICE_BUDGET
from .modeling.regions import sample_regions
from .modeling.similarity import level_similarities

# ----------------------------------------------------------------------------------------------------------- an image


def image_mixture(image: Any) -> MixtureSameFamily:
    """Each image as the mixture of its regions: weights pi_k, means mu_k, variances sigma_k^2; B mixtures over d features.

    Its `log_prob` is the log-likelihood of token embeddings (words times their saliency, see [`word_log_likelihoods`]), and
    `component_distribution.stddev` (B, K, d) are the standard deviations of the regions.

    Raises:
        ValueError: the regions have no variance.
    """
    _check_variances(image)
    regions = Normal(image.region_means, torch.exp(image.region_log_vars / 2))
    return MixtureSameFamily(Categorical(probs=image.region_weights), Independent(regions, 1))


def region_spreads(image: Any) -> Tensor:
    """(B, K): root of the mean squared distance of a region's draws from its mean; 1 is the length of a token."""
    _check_variances(image)
    return image.region_log_vars.exp().sum(-1).sqrt()


def word_log_likelihoods(image: Any, text: Any) -> Tensor:
    """(B, C, w): log-density of each word, times its saliency, under the mixture of each image, in nats; padding has 0.

    One image at a time, in memory for C x w x K x d numbers.
    """
    mixture, words = image_mixture(image), _salient_words(text)
    weights, regions = mixture.mixture_distribution, mixture.component_distribution
    rows = []
    for n in range(len(weights.probs)):
        region = Independent(Normal(regions.mean[n], regions.stddev[n]), 1)
        rows.append(MixtureSameFamily(Categorical(probs=weights.probs[n]), region).log_prob(words))
    return torch.stack(rows).masked_fill(~text.word_mask, 0)


def entropy_bounds(image: Any) -> tuple[Tensor, Tensor]:
    """Lower and upper bound, (B,) each, of the differential entropy of the mixture of each image, in nats.

    The entropy has no closed form. Its bounds by pairwise distances do (Kolchinsky and Tracey, Entropy 2017):

        sum_k pi_k H_k - sum_k pi_k log sum_j pi_j exp(-D(k, j)),

    below with the Bhattacharyya distance D, above with the Kullback-Leibler divergence. They meet where all regions are one
    and where none overlap. Memory: B x K x d, K times in a row.
    """
    mixture = image_mixture(image)
    log_weights, weights = mixture.mixture_distribution.logits, mixture.mixture_distribution.probs
    means, variances = image.region_means, image.region_log_vars.exp()
    within = (weights * mixture.component_distribution.entropy()).sum(1)
    lower, upper = within.clone(), within.clone()
    for k in range(weights.shape[1]):
        mean, variance = means[:, k : k + 1], variances[:, k : k + 1]
        squares, middle = (mean - means).square(), (variance + variances) / 2
        bhattacharyya = (squares / middle / 8 + (middle.log() - (variance * variances).log() / 2) / 2).sum(-1)
        divergence = ((variances / variance).log() + (variance + squares) / variances - 1).sum(-1) / 2
        lower -= weights[:, k] * torch.logsumexp(log_weights - bhattacharyya, dim=1)
        upper -= weights[:, k] * torch.logsumexp(log_weights - divergence, dim=1)
    return lower, upper


# ------------------------------------------------------------------------------------------------------------- a score


def has_standard_errors(config: Any) -> bool:
    """Whether regions with a variance take part in the scores of a model with this config."""
    return config.aligner == "grm" and config.use_region_uncertainty and config.level_weights[2] > 0


@torch.no_grad()
def standard_errors(model: Any, image: Any, text: Any, memory_budget: int | None = None) -> Tensor:
    """(B, C): the standard deviation of every score under the noise of the regions, in closed form.

    With the arg-maxes of eq. 7 fixed, the uncertain level is linear in the region samples u_k, which are independent with
    variances sigma_k^2 sum_l a_lk^2 (eq. 5-6). With g_k = sum over the words whose best region is k of t_w / Lt, plus t / K
    of the best word of k, the variance of the score is

        c^2 sum_k (sum_l a_lk^2) sum_d g_kd^2 sigma_kd^2

    with the level weight c. Arg-maxes that switch make the true value smaller; `config.standard_error_factor`, fitted on
    validation, is the factor to it. All pairs cost B x C x K x d operations a word, in tiles.

    Args:
        memory_budget: bytes of the largest tensor of a tile; up to three of its size are alive at a time. `None`: as for
            the scores, 16 MiB on a CPU and 256 MiB elsewhere. It changes the speed alone.

    Raises:
        ValueError: the regions have no variance.
    """
    _check_variances(image)
    words, mask = _salient_words(text), text.word_mask
    variances = image.region_log_vars.exp() * image.region_assignment.square().sum(1)[..., None]
    budget = memory_budget or (CPU_BUDGET if words.device.type == "cpu" else DEVICE_BUDGET)
    pairs = max(budget // (variances.element_size() * variances[0].numel()), 1)
    num_images = min(len(variances), pairs)
    rows = []
    with torch.autocast(words.device.type, enabled=False):
        for means, own in zip(image.region_means.split(num_images), variances.split(num_images), strict=True):
            tiles = zip(words.split(pairs // num_images), mask.split(pairs // num_images), strict=True)
            rows.append(torch.cat([_uncertain_variances(means, own, *tile) for tile in tiles], dim=1))
    return model.config.standard_error_factor * model.config.level_weights[2] * torch.cat(rows).sqrt()


def _uncertain_variances(means: Tensor, variances: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """Regions (i, k, d), variances of their samples (i, k, d), words (t, w, d), mask (t, w) -> (i, t)."""
    products = torch.einsum("twd,ikd->tiwk", words, means)
    weights = mask.to(words.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
    # How much of word w is in the gradient by region k: 1 / Lt if k is its best region, 1 / K if it is the best word of k.
    best_region, best_word = (
        products.argmax(3, keepdim=True),
        products.masked_fill(~mask[:, None, :, None], -torch.inf).argmax(2, keepdim=True),
    )
    share = torch.zeros_like(products).scatter_(3, best_region, weights[:, None, :, None].expand(best_region.shape))
    share.scatter_add_(2, best_word, share.new_full((1,), 1 / means.shape[1]).expand(best_word.shape))
    gradients = torch.einsum("tiwk,twd->tikd", share, words)
    return torch.einsum("tikd,ikd->it", gradients.square_(), variances)


@torch.no_grad()
def sampled_standard_errors(model: Any, image: Any, text: Any, num_samples: int = 100, seed: int = 0) -> Tensor:
    """(B, C): what [`standard_errors`] approximates, from `num_samples` draws of all regions; memory for as many (B, C).

    Its own relative error is 1 / sqrt(2 (num_samples - 1)) a pair, 7 % for 100.
    """
    _check_variances(image)
    words, regions = _salient_words(text), (image.region_assignment, image.region_means, image.region_log_vars)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draws = [level_similarities(sample_regions(*regions), words, text.word_mask)[0] for _ in range(num_samples)]
    return model.config.level_weights[2] * torch.stack(draws).std(0)


def _salient_words(text: Any) -> Tensor:
    """(C, w, d), 0 on padding."""
    return (text.word_embeds * text.word_saliency[..., None]).masked_fill(~text.word_mask[..., None], 0)


def _check_variances(image: Any) -> None:
    if getattr(image, "region_log_vars", None) is None:
        raise ValueError(
            '`image` has no `region_log_vars`: only the aligner "grm" with `use_region_uncertainty=True` has regions with a '
            "variance."
        )


# ----------------------------------------------------------------------------------------------------------- an answer


@dataclass(frozen=True)
class Answers:
    """To each query the best candidates, from a calibrated model; numpy arrays.

    Attributes:
        first: (queries,) int, the candidate with the highest score.
        confidence: (queries,) in [0, 1], the probability that the first is right.
        sets: (queries, candidates) bool; the right one is among them for 90 % of the queries.
    """

    first: np.ndarray
    confidence: np.ndarray
    sets: np.ndarray


@torch.no_grad()
def answer(model: Any, image: Any, text: Any, query: str = "image") -> Answers:
    """The captions for each image (`query="image"`), or the images for each caption (`query="text"`), and how sure they are.

    Probabilities and coverage hold for queries like those of the validation split that the model was calibrated on, with
    galleries of about its size and one right candidate among them.

    Raises:
        ValueError: the model is not calibrated, is in training mode, or `query` is neither.
    """
    config = model.config
    if query not in ("image", "text"):
        raise ValueError(f'`query` must be "image" or "text", got {query!r}.')
    if model.training:
        raise ValueError("`model` is in training mode, where scores are drawn at random. Call `model.eval()` first.")
    if config.confidence_coefficients is None or config.conformal_thresholds is None:
        raise ValueError("`model` is not calibrated: run training/calibrate.py on its folder, then load it again.")
    way = ("image", "text").index(query)
    scores, errors = model.score(image, text).cpu().numpy(), None
    if config.confidence_measure in ERROR_MEASURES:
        errors = standard_errors(model, image, text).cpu().numpy()
    if query == "text":
        scores, errors = scores.T, None if errors is None else errors.T
    answers = first_answers(scores, config.logit_scale, errors)
    coefficients = config.confidence_coefficients[2 * way : 2 * way + 2]
    confidence = logistic(answers.uncertainties[config.confidence_measure], coefficients)
    return Answers(answers.first, confidence, answer_sets(scores, config.conformal_thresholds[way]))
