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
from .modeling.regions import sample_regions
from .modeling.similarity import level_similarities
from .modeling.standard_errors import check_variances, salient_words, standard_errors

# ----------------------------------------------------------------------------------------------------------- an image


def image_mixture(image: Any) -> MixtureSameFamily:
    """Each image as the mixture of its regions: weights pi_k, means mu_k, variances sigma_k^2; B mixtures over d features.

    Its `log_prob` is the log-likelihood of token embeddings (words times their saliency, see [`word_log_likelihoods`]), and
    `component_distribution.stddev` (B, K, d) are the standard deviations of the regions.

    Raises:
        ValueError: the regions have no variance.
    """
    check_variances(image)
    regions = Normal(image.region_means, torch.exp(image.region_log_vars / 2))
    return MixtureSameFamily(Categorical(probs=image.region_weights), Independent(regions, 1))


def region_spreads(image: Any) -> Tensor:
    """(B, K): root of the mean squared distance of a region's draws from its mean; 1 is the length of a token."""
    check_variances(image)
    return image.region_log_vars.exp().sum(-1).sqrt()


def word_log_likelihoods(image: Any, text: Any) -> Tensor:
    """(B, C, w): log-density of each word, times its saliency, under the mixture of each image, in nats; padding has 0.

    One image at a time, in memory for C x w x K x d numbers.
    """
    mixture, words = image_mixture(image), salient_words(text)
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


@torch.no_grad()
def sampled_standard_errors(model: Any, image: Any, text: Any, num_samples: int = 100, seed: int = 0) -> Tensor:
    """(B, C): what [`standard_errors`] approximates, from `num_samples` draws of all regions; memory for as many (B, C).

    Its own relative error is 1 / sqrt(2 (num_samples - 1)) a pair, 7 % for 100.

    Raises:
        ValueError: fewer than two draws, or the regions have no variance.
    """
    if num_samples < 2:
        raise ValueError(f"`num_samples` must be at least 2, got {num_samples}: one draw has no spread.")
    check_variances(image)
    words, regions = salient_words(text), (image.region_assignment, image.region_means, image.region_log_vars)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draws = [level_similarities(sample_regions(*regions), words, text.word_mask)[0] for _ in range(num_samples)]
    return model.config.level_weights[2] * torch.stack(draws).std(0)


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
