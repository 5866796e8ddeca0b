"""Token similarities: bidirectional max-mean at three levels (GRM eq. 7), hard alignment (CHAN), cross-attention (SCAN).

Pure functions of tokens and masks; the walk over all pairs is in `pairwise.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .pairwise import Rule, Tile, Tokens, score_all_pairs

PAPER_LEVEL_WEIGHTS = (0.4, 0.4, 0.2)


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
    _check(patch_embeds, word_embeds, word_mask, patch_mask, patch_saliency, word_saliency, region_embeds)
    if patch_saliency is None and word_saliency is not None:
        patch_saliency = patch_embeds.new_ones(patch_embeds.shape[:2])
    if word_saliency is None and patch_saliency is not None:
        word_saliency = word_embeds.new_ones(word_embeds.shape[:2])
    tokens = Tokens(patch_embeds, word_embeds, patch_saliency, word_saliency, region_embeds)
    return score_all_pairs(_bidirectional, tokens, word_mask, patch_mask, memory_budget)


def hard_alignment(
    patch_embeds: Tensor,
    word_embeds: Tensor,
    word_mask: Tensor,
    *,
    patch_mask: Tensor | None = None,
    pooling: str = "mean",
    temperature: float = 0.1,
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
    _check(patch_embeds, word_embeds, word_mask, patch_mask)
    return score_all_pairs(rules[pooling], Tokens(patch_embeds, word_embeds), word_mask, patch_mask, memory_budget)[0]


def cross_attention(
    patch_embeds: Tensor,
    word_embeds: Tensor,
    word_mask: Tensor,
    *,
    patch_mask: Tensor | None = None,
    direction: str = "t2i",
    inverse_temperature: float | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """SCAN's stacked cross-attention (ECCV 2018): each query attends over all contexts; mean cosine of the two.

    Attention: leaky ReLU (0.1) of <query, context>, L2-normalised over the queries, softmax over the contexts. Of the
    attended context c = sum_j a_j x_j only two numbers are needed: <q, c> = sum_j a_j <q, x_j>, and |c|^2 = a' G a with the
    Gram matrix G of the contexts. For few words c itself is smaller than G, and is built instead.

    Args as in [`level_similarities`]. `direction`: `"t2i"` (words attend over patches, inverse temperature 9) or `"i2t"`
    (patches attend over words, 4).

    Returns:
        (B, C) scores in [-1, 1], at least float32.

    Raises:
        ValueError: unknown `direction`, an `inverse_temperature` of 0 or less, or a shape or dtype that does not fit.
    """
    if direction not in _CROSS_ATTENTION:
        raise ValueError(f"`direction` of the cross-attention must be one of {sorted(_CROSS_ATTENTION)}, got {direction!r}.")
    rule, default = _CROSS_ATTENTION[direction]
    inverse_temperature = default if inverse_temperature is None else inverse_temperature
    if inverse_temperature <= 0:
        raise ValueError(f"`inverse_temperature` must be greater than 0, got {inverse_temperature}.")
    _check(patch_embeds, word_embeds, word_mask, patch_mask)
    rule = functools.partial(rule, inverse_temperature=inverse_temperature)
    return score_all_pairs(rule, Tokens(patch_embeds, word_embeds), word_mask, patch_mask, memory_budget)[0]


def _max_mean(tile: Tile, products: Tensor, patch_weights: Tensor | float) -> Tensor:
    """(W, i, v) -> (c, i). A maximum is exact in any dtype; the means run in the dtype of the weights."""
    best_patch = products.amax(2) * tile.word_weights
    best_word = tile.over_words(torch.amax, products).to(tile.word_weights.dtype) * patch_weights
    return tile.over_words(torch.sum, best_patch) + best_word.sum(2)


def _scaled(products: Tensor, *factors: Tensor) -> Tensor:
    """Products times broadcast factors: in place, while the tile is in cache, unless a graph needs the original."""
    for factor in factors:
        products = products * factor if torch.is_grad_enabled() else products.mul_(factor)
    return products


def _bidirectional(tile: Tile) -> list[Tensor]:
    levels = [_max_mean(tile, tile.products, tile.patch_weights)]
    if tile.patch_saliency is not None and tile.word_saliency is not None:
        scaled = _scaled(tile.products, tile.patch_saliency, tile.word_saliency)
        levels.append(_max_mean(tile, scaled, tile.patch_weights))
    if tile.region_products is not None:
        regions = tile.region_products
        scaled = regions if tile.word_saliency is None else _scaled(regions, tile.word_saliency)
        levels.append(_max_mean(tile, scaled, 1 / regions.shape[2]))
    return levels


def _mean_of_best_patch(tile: Tile) -> list[Tensor]:
    return [tile.over_words(torch.sum, tile.products.amax(2) * tile.word_weights)]


def _logsumexp_of_best_patch(tile: Tile, temperature: float) -> list[Tensor]:
    best_patch = tile.products.amax(2).to(tile.word_weights.dtype)
    logits = (best_patch / temperature).masked_fill(tile.word_weights == 0, -torch.inf)
    return [temperature * tile.over_words(torch.logsumexp, logits)]


def _words_attend(tile: Tile, inverse_temperature: float) -> list[Tensor]:
    products, words, patches = _at_least_float32(tile.products, tile.word_embeds, tile.patch_embeds)
    attention = nn.functional.leaky_relu(products, 0.1) * (tile.word_weights[..., None] > 0)
    attention = attention / tile.to_words(_norm(tile.over_words(torch.sum, attention.square())))
    attention = (inverse_temperature * attention).masked_fill(tile.patch_weights == 0, -torch.inf).softmax(2)
    by_image, (_, num_patches, dim) = attention.transpose(0, 1), patches.shape
    # The contexts of few words are smaller than the Gram matrix; an exported graph cannot choose by size.
    if not torch.compiler.is_exporting() and len(words) * dim < num_patches * num_patches:
        context_squares = (by_image @ patches).square().sum(2).T
    else:
        context_squares = ((by_image @ (patches @ patches.mT)) * by_image).sum(2).T
    cosines = _cosine((attention * products).sum(2), words.square().sum(1)[:, None] * context_squares)
    return [tile.over_words(torch.sum, cosines * tile.word_weights)]


def _patches_attend(tile: Tile, inverse_temperature: float) -> list[Tensor]:
    products, words, patches = _at_least_float32(tile.products, tile.word_embeds, tile.patch_embeds)
    attention = nn.functional.leaky_relu(products, 0.1) * (tile.patch_weights > 0)
    attention = attention / _norm(attention.square().sum(2, keepdim=True))
    logits = (inverse_temperature * attention).masked_fill(tile.word_weights[..., None] == 0, -torch.inf)
    attention = torch.cat([part.softmax(1).flatten(0, 1) for part in tile.by_length(logits)])
    attended = [  # G a within each caption
        (of_words @ of_words.mT @ a.flatten(2)).view_as(a)
        for of_words, a in zip(tile.by_length(words), tile.by_length(attention), strict=True)
    ]
    context_squares = torch.cat([(g * a).sum(1) for g, a in zip(attended, tile.by_length(attention), strict=True)])
    cosines = _cosine(tile.over_words(torch.sum, attention * products), patches.square().sum(2) * context_squares)
    return [(cosines * tile.patch_weights).sum(2)]


def _at_least_float32(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _norm(squares: Tensor) -> Tensor:
    """Square root, and 1 for 0: a zero vector stays zero, and its gradient finite."""
    return squares.masked_fill(squares == 0, 1).sqrt()


def _cosine(overlaps: Tensor, squares: Tensor) -> Tensor:
    """Inner products over the root of the product of both squared lengths; 0 where a length is 0."""
    is_zero = squares <= 0
    return (overlaps * squares.masked_fill(is_zero, 1).rsqrt()).masked_fill(is_zero, 0)


_CROSS_ATTENTION = {"t2i": (_words_attend, 9.0), "i2t": (_patches_attend, 4.0)}


def _check(patch_embeds, word_embeds, word_mask, patch_mask=None, patch_saliency=None, word_saliency=None, regions=None):
    if patch_embeds.ndim != 3:
        raise ValueError(f"`patch_embeds` must have shape (images, patches, features), got {tuple(patch_embeds.shape)}.")
    num_images, num_patches, dim = patch_embeds.shape
    if word_embeds.ndim != 3 or word_embeds.shape[2] != dim:
        raise ValueError(
            f"`word_embeds` must have shape (captions, words, {dim}) to match `patch_embeds`, "
            f"got {tuple(word_embeds.shape)}."
        )
    if num_images == 0 or num_patches == 0 or 0 in word_embeds.shape[:2]:
        raise ValueError(
            "At least one image with a patch and one caption with a word are needed, got `patch_embeds` "
            f"{tuple(patch_embeds.shape)} and `word_embeds` {tuple(word_embeds.shape)}."
        )
    word_shape, patch_shape = tuple(word_embeds.shape[:2]), (num_images, num_patches)
    expected = (
        ("word_mask", word_mask, word_shape, "Pass the `attention_mask` returned by GranAlignProcessor as bool."),
        ("patch_mask", patch_mask, patch_shape, "It has one value for each patch."),
        ("patch_saliency", patch_saliency, patch_shape, "It has one value for each patch."),
        ("word_saliency", word_saliency, word_shape, "It has one value for each word."),
    )
    for name, tensor, shape, advice in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}. {advice}")
        if tensor is not None and name.endswith("mask") and tensor.dtype != torch.bool:
            raise ValueError(f"`{name}` must be boolean (True = real token), got {tensor.dtype}. {advice}")
    if regions is not None and (regions.ndim != 3 or regions.shape[::2] != (num_images, dim) or regions.shape[1] == 0):
        raise ValueError(f"`region_embeds` must have shape ({num_images}, regions, {dim}), got {tuple(regions.shape)}.")
    if patch_embeds.dtype != word_embeds.dtype:
        raise ValueError(
            f"`patch_embeds` and `word_embeds` must share a dtype, got {patch_embeds.dtype}, {word_embeds.dtype}."
        )
