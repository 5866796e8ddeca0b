# Copyright 2026 The granalign authors. Licensed under the Apache License, Version 2.0.
"""How far the noise of the regions moves a score. B images, C captions, K regions of width d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .pairwise import CPU_BUDGET, DEVICE_BUDGET


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
    check_variances(image)
    words, mask = salient_words(text), text.word_mask
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


def salient_words(text: Any) -> Tensor:
    """(C, w, d), 0 on padding."""
    return (text.word_embeds * text.word_saliency[..., None]).masked_fill(~text.word_mask[..., None], 0)


def check_variances(image: Any) -> None:
    if getattr(image, "region_log_vars", None) is None:
        raise ValueError(
            '`image` has no `region_log_vars`: only the aligner "grm" with `use_region_uncertainty=True` has regions with a '
            "variance."
        )
