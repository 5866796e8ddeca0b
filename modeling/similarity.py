"""Token similarities by maxima: bidirectional max-mean at three levels (GRM eq. 7) and hard alignment (CHAN).

Pure functions of tokens and masks; those with attention are in `attention.py`, the walk over all pairs in `pairwise.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .pairwise import score_all_pairs
from .tiles import Rule, Tile, Tokens, check_tokens

PAPER_LEVEL_WEIGHTS = (0.4, 0.4, 0.2)
HARD_ALIGNMENT_TEMPERATURE = 0.1  # CHAN's own, of its logsumexp


def token_similarity(
    patch_embeds: Tensor,
    word_embeds: Tensor,
    word_mask: Tensor,
    *,
    patch_mask: Tensor | None = None,
    patch_saliency: Tensor | None = None,
    word_saliency: Tensor | None = None,
    region_embeds: Tensor | None = None,
    level_weights: Sequence[float] | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Weighted sum of the levels of [`level_similarities`]; same arguments, same errors.

    Args:
        level_weights: one weight for each level present. `None`: the paper's (0.4, 0.4, 0.2) for the levels that are
            present, scaled to sum to 1, so that one level alone is the plain bidirectional max-mean.

    Returns:
        (B, C) scores, at least float32. With unit-length tokens and weights that sum to 1 they lie in [-2, 2].

    Raises:
        ValueError: a shape or dtype does not fit, or `level_weights` has the wrong length.
    """
    levels = level_similarities(
        patch_embeds,
        word_embeds,
        word_mask,
        patch_mask=patch_mask,
        patch_saliency=patch_saliency,
        word_saliency=word_saliency,
        region_embeds=region_embeds,
        memory_budget=memory_budget,
    )
    if level_weights is None:
        has_key = patch_saliency is not None or word_saliency is not None
        is_present = (True, has_key, region_embeds is not None)
        present = [weight for weight, here in zip(PAPER_LEVEL_WEIGHTS, is_present, strict=True) if here]
        level_weights = [weight / sum(present) for weight in present]
    if len(level_weights) != len(levels):
        raise ValueError(
            f"`level_weights` must have one weight for each of the {len(levels)} levels that the other arguments "
            f"define, got {len(level_weights)}: {tuple(level_weights)}."
        )
    return (levels.new_tensor(level_weights)[:, None, None] * levels).sum(0)  # no product that autocast could round


def level_similarities(
    patch_embeds: Tensor,
    word_embeds: Tensor,
    word_mask: Tensor,
    *,
    patch_mask: Tensor | None = None,
    patch_saliency: Tensor | None = None,
    word_saliency: Tensor | None = None,
    region_embeds: Tensor | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Bidirectional max-mean similarity of every image with every caption, level by level (GRM eq. 7).

        S = mean over words of (max over patches of s) + mean over patches of (max over words of s),  s = <word, patch>

    Level "original" takes the tokens as given. Level "key" scales s by both saliencies (present if either is given).
    Level "uncertain" matches the words, scaled by their saliency, with the regions (present if those are given).

    Args:
        patch_embeds: (B, v, d). word_embeds: (C, w, d), same dtype and device.
        word_mask: (C, w) bool, True = real word; holes are allowed.
        patch_mask: (B, v) bool, True = real patch. `None`: all are real.
        patch_saliency: (B, v), word_saliency: (C, w), in [0, 1]. `None` next to the other one: all 1.
        region_embeds: (B, k, d).
        memory_budget: bytes of one tile of products; `None`: 16 MiB on a CPU, whose caches it has to suit, and 256 MiB
            elsewhere. It changes the speed, and the result by no more than the rounding of a product.

    Returns:
        (levels, B, C), at least float32. A caption without words or an image without patches scores 0.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    tokens = Tokens(patch_embeds, word_embeds, patch_saliency, word_saliency, region_embeds)
    check_tokens(tokens, word_mask, patch_mask)
    if patch_saliency is None and word_saliency is not None:
        tokens = tokens._replace(patch_saliency=patch_embeds.new_ones(patch_embeds.shape[:2]))
    if word_saliency is None and patch_saliency is not None:
        tokens = tokens._replace(word_saliency=word_embeds.new_ones(word_embeds.shape[:2]))
    return score_all_pairs(_bidirectional, tokens, word_mask, patch_mask, memory_budget)


def hard_alignment(
    patch_embeds: Tensor,
    word_embeds: Tensor,
    word_mask: Tensor,
    *,
    patch_mask: Tensor | None = None,
    pooling: str = "mean",
    temperature: float = HARD_ALIGNMENT_TEMPERATURE,
    memory_budget: int | None = None,
) -> Tensor:
    """CHAN's hard alignment (CVPR 2023): only the best patch of each word counts, then the words are pooled.

    Args as in [`level_similarities`]. `pooling="mean"` averages over the words; `"logsumexp"` is
    `temperature * log(sum over words of exp(s / temperature))`.

    Returns:
        (B, C) scores, at least float32.

    Raises:
        ValueError: unknown `pooling`, a `temperature` of 0 or less, or a shape or dtype that does not fit.
    """
    if temperature <= 0:
        raise ValueError(f"`temperature` of the hard alignment must be greater than 0, got {temperature}.")
    rules: dict[str, Rule] = {
        "mean": _mean_of_best_patch,
        "logsumexp": functools.partial(_logsumexp_of_best_patch, temperature=temperature),
    }
    if pooling not in rules:
        raise ValueError(f"`pooling` of the hard alignment must be one of {sorted(rules)}, got {pooling!r}.")
    tokens = Tokens(patch_embeds, word_embeds)
    check_tokens(tokens, word_mask, patch_mask)
    return score_all_pairs(rules[pooling], tokens, word_mask, patch_mask, memory_budget)[0]


def _scaled(products: Tensor, *factors: Tensor) -> Tensor:
    """Products times broadcast factors: in place, while the tile is in cache, unless a graph needs the original."""
    for factor in factors:
        products = products * factor if torch.is_grad_enabled() else products.mul_(factor)
    return products


def _bidirectional(tile: Tile) -> list[Tensor]:
    levels = [tile.max_mean(tile.products, tile.patch_weights)]
    if tile.patch_saliency is not None and tile.word_saliency is not None:
        scaled = _scaled(tile.products, tile.patch_saliency, tile.word_saliency)
        levels.append(tile.max_mean(scaled, tile.patch_weights))
    if tile.region_products is not None:
        regions = tile.region_products
        scaled = regions if tile.word_saliency is None else _scaled(regions, tile.word_saliency)
        levels.append(tile.max_mean(scaled, 1 / regions.shape[2]))
    return levels


def _mean_of_best_patch(tile: Tile) -> list[Tensor]:
    return [tile.over_words(torch.sum, tile.products.amax(2) * tile.word_weights)]


def _logsumexp_of_best_patch(tile: Tile, temperature: float) -> list[Tensor]:
    best_patch = tile.products.amax(2).to(tile.word_weights.dtype)
    logits = (best_patch / temperature).masked_fill(tile.word_weights == 0, -torch.inf)
    return [temperature * tile.over_words(torch.logsumexp, logits)]
