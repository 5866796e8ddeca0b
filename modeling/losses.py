"""The training losses as pure functions (GRM eq. 8-13)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def contrastive_hinge(scores: Tensor, positives: Tensor, margin: float, use_hard_negatives: bool = True) -> Tensor:
    """Bidirectional hinge loss (GRM eq. 8; hardest negatives as in VSE++), averaged over the positive pairs.

        [margin - S_ic + S_ic-]+ + [margin - S_ic + S_i-c]+

    c- is the hardest caption that does not describe image i, i- the hardest image that c does not describe. With
    `use_hard_negatives=False` each hinge is averaged over all negatives instead. Without negatives it is 0.

    Args:
        scores: (B, C). positives: (B, C) bool, True where the caption describes the image.
        margin: > 0. A model that scores all pairs alike has a loss of 2 x margin.

    Raises:
        ValueError: shapes differ, or there is no positive pair.
    """
    if scores.shape != positives.shape:
        raise ValueError(
            f"`positives` must have the shape of `scores`, {tuple(scores.shape)}, got {tuple(positives.shape)}."
        )
    image, caption = positives.nonzero(as_tuple=True)
    if len(image) == 0:
        raise ValueError("`positives` has no positive pair. Check that `image_ids` and `caption_image_ids` share ids.")
    matched = scores[image, caption]
    if use_hard_negatives:
        negatives = scores.masked_fill(positives, -torch.inf)
        to_caption = (margin - matched + negatives.amax(1)[image]).relu()
        to_image = (margin - matched + negatives.amax(0)[caption]).relu()
    else:
        to_caption = _mean_hinge(margin - matched, scores, ~positives, image)
        to_image = _mean_hinge(margin - matched, scores.T, ~positives.T, caption)
    return (to_caption + to_image).mean()


def _mean_hinge(offset: Tensor, scores: Tensor, negatives: Tensor, rows: Tensor) -> Tensor:
    """offset (P,), scores and negatives (n, m), rows (P,) -> (P,) mean over the negatives of the row."""
    weights = negatives.to(scores.dtype) / negatives.sum(1, keepdim=True).clamp(min=1)
    return ((offset[:, None] + scores[rows]).relu() * weights[rows]).sum(1)


def reconstruction_loss(region_embeds: Tensor, patch_embeds: Tensor, patch_mask: Tensor) -> Tensor:
    """L_recon: mean over images and regions of || u_k - mean over patches of v^ ||^2.

    Args:
        region_embeds: (B, K, d). patch_embeds: (B, Lv, d), times their saliency. patch_mask: (B, Lv) bool.
    """
    return (region_embeds - _mean_of_real(patch_embeds, patch_mask)[:, None]).square().sum(-1).mean()


def gaussian_kl(region_means: Tensor, region_log_vars: Tensor) -> Tensor:
    """L_KL: KL( N(mu, sigma^2) || N(0, I / d) ), mean over images, regions and features.

    The paper's prior is N(0, I), for tokens whose features have unit variance. Tokens of unit length are 1 / sqrt(d) of
    that, and so is this prior: the value is that of -1/2 (1 + log sigma^2 - mu^2 - sigma^2) for mu and sigma times sqrt(d).
    A variance of 1 would pull the noise of a region to sqrt(d) times the length of a token.

    Args:
        region_means, region_log_vars: (B, K, d).
    """
    dim = region_means.shape[-1]
    log_vars = region_log_vars + math.log(dim)
    return -0.5 * (1 + log_vars - dim * region_means.square() - log_vars.exp()).mean()


def region_entropy(region_affinity: Tensor, patch_mask: Tensor) -> Tensor:
    """L_ent: -A log A, mean over regions and the real patches of each image, then over images; in [0, 1/e].

    Args:
        region_affinity: (B, Lv, K) in [0, 1]. patch_mask: (B, Lv) bool.
    """
    # The slope of -A log A is infinite at 0, where padding and underflow lie.
    affinity = region_affinity.masked_fill(~patch_mask[..., None], 1).clamp(min=torch.finfo(region_affinity.dtype).tiny)
    return _mean_of_real(torch.special.entr(affinity), patch_mask).mean()


def saliency_budget(patch_saliency: Tensor, patch_mask: Tensor, budget: float) -> Tensor:
    """Mean over images of (mean saliency of the real patches - budget)^2; in [0, 1]. An image without patches has mean 0.

    Not in GRM, where the key level gains by every patch that it keeps, and all saliencies become 1. With a budget patches
    compete. The ratio losses of DynamicViT (NeurIPS 2021) and LAPS (CVPR 2024) have this form.

    Args:
        patch_saliency: (B, Lv) in [0, 1]. patch_mask: (B, Lv) bool. budget: in (0, 1].
    """
    return (_mean_of_real(patch_saliency[..., None], patch_mask) - budget).square().mean()


def _mean_of_real(values: Tensor, mask: Tensor) -> Tensor:
    """(n, L, m) -> (n, m): the mean over real tokens, whatever stands in the others; 0 without any."""
    return values.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
