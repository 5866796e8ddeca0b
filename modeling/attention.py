"""Token similarities by attention: cross-attention (SCAN), and patches that a caption selects and aggregates (LAPS).

Pure functions of tokens and masks, as those of `similarity.py`. A weighted sum of patches, sum_l w_l v_l, is not built for
each pair, for only two numbers of it are needed: its product with a word, sum_l w_l <t, v_l>, and its squared length w' G w
with the Gram matrix G of the patches. (Where such sums are smaller than G, they are built instead.)
"""

from __future__ import annotations

import functools
from fractions import Fraction

import torch
from torch import Tensor, nn

from .pairwise import score_all_pairs
from .tiles import Tile, Tokens, check_tokens

WORD_INVERSE_TEMPERATURE, PATCH_INVERSE_TEMPERATURE = 9.0, 4.0  # SCAN's own, of words and of patches that attend


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

    Attention: leaky ReLU (0.1) of <query, context>, L2-normalised over the queries, softmax over the contexts.

    Args as in `level_similarities` of `similarity.py`. `direction`: `"t2i"` (words attend over patches, inverse temperature
    9) or `"i2t"` (patches attend over words, 4).

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
    tokens = Tokens(patch_embeds, word_embeds)
    check_tokens(tokens, word_mask, patch_mask)
    rule = functools.partial(rule, inverse_temperature=inverse_temperature)
    return score_all_pairs(rule, tokens, word_mask, patch_mask, memory_budget)[0]


def patch_slimming(
    patch_embeds: Tensor,
    word_embeds: Tensor,
    word_mask: Tensor,
    patch_logits: Tensor,
    *,
    patch_mask: Tensor | None = None,
    keep_share: float = 0.5,
    memory_budget: int | None = None,
) -> Tensor:
    """LAPS's patch slimming (CVPR 2024): each caption selects patches, and is matched with what those add up to.

    A patch scores its cosine with the mean patch of its image plus that with the mean word; no gradient flows through the
    score. The patches of highest score are kept, ceil(keep_share * number of patches), the first of equal ones. They make m
    tokens, weighted by a softmax of `patch_logits` over them; those left out make one more, by a softmax of their score.
    Words and the m + 1 tokens, scaled to length 1, are matched by the bidirectional max-mean of GRM eq. 7. Where no patch
    is left out, the last token is 0.

    Args as in `level_similarities` of `similarity.py`. patch_logits: (B, v, m). keep_share: in (0, 1]; read as the fraction
    it stands for, so that 0.07 of 100 patches are 7 in any precision.

    Returns:
        (B, C) scores, at least float32; in [-2, 2] for words of unit length.

    Raises:
        ValueError: a `keep_share` out of its range, or a shape or dtype that does not fit.
    """
    if not 0 < keep_share <= 1:
        raise ValueError(f"`keep_share` must lie in (0, 1], got {keep_share}.")
    tokens = Tokens(patch_embeds, word_embeds, patch_logits=patch_logits)
    check_tokens(tokens, word_mask, patch_mask)
    rule = functools.partial(_selected_patches, keep_share=keep_share)
    return score_all_pairs(rule, tokens, word_mask, patch_mask, memory_budget)[0]


def word_attention(tile: Tile, inverse_temperature: float = WORD_INVERSE_TEMPERATURE) -> tuple[Tensor, Tensor]:
    """Words attend over patches: the cosine of a word and its context is the sum over patches of terms, times a scale.

    Returns:
        The terms (W, i, v) and the scale (W, i).
    """
    products, words, patches = _at_least_float32(tile.products, tile.word_embeds, tile.patch_embeds)
    attention = nn.functional.leaky_relu(products, 0.1) * (tile.word_weights[..., None] > 0)
    attention = attention / tile.to_words(_norm(tile.over_words(torch.sum, attention.square())))
    attention = (inverse_temperature * attention).masked_fill(tile.patch_weights == 0, -torch.inf).softmax(2)
    context_squares = _squared_lengths(attention.transpose(0, 1), patches).T
    return attention * products, _inverse_root(words.square().sum(1)[:, None] * context_squares)


def patch_attention(tile: Tile, inverse_temperature: float = PATCH_INVERSE_TEMPERATURE) -> tuple[Tensor, Tensor]:
    """Patches attend over words: the cosine of a patch and its context is the sum over words of terms, times a scale.

    Returns:
        The terms (W, i, v) and the scale (c, i, v).
    """
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
    return attention * products, _inverse_root(patches.square().sum(2) * context_squares)


def selected_tokens(tile: Tile, keep_share: float) -> tuple[Tensor, Tensor]:
    """The m + 1 tokens that LAPS makes of the patches for each caption, see [`patch_slimming`].

    Returns:
        The weights of the patches in each token (i, c, m + 1, v), and 1 / length of each token (i, c, m + 1), 0 for a token
        that is 0.
    """
    assert tile.patch_logits is not None
    patches, logits = _at_least_float32(tile.patch_embeds, tile.patch_logits)
    is_kept, weights_of_rest = _select(tile, Fraction(keep_share).limit_denominator(10**6))
    weights = logits.mT[:, None].masked_fill(~is_kept[:, :, None], -torch.inf).softmax(3)  # (i, c, m, v)
    weights = torch.cat([weights, weights_of_rest[:, :, None]], dim=2)
    squares = _squared_lengths(weights.flatten(1, 2), patches).unflatten(1, weights.shape[1:3])
    return weights, _inverse_root(squares)


def _words_attend(tile: Tile, inverse_temperature: float) -> list[Tensor]:
    terms, scale = word_attention(tile, inverse_temperature)
    return [tile.over_words(torch.sum, terms.sum(2) * scale * tile.word_weights)]


def _patches_attend(tile: Tile, inverse_temperature: float) -> list[Tensor]:
    terms, scale = patch_attention(tile, inverse_temperature)
    return [(tile.over_words(torch.sum, terms) * scale * tile.patch_weights).sum(2)]


def _selected_patches(tile: Tile, keep_share: float) -> list[Tensor]:
    (products,) = _at_least_float32(tile.products)
    weights, inverse_lengths = selected_tokens(tile, keep_share)
    by_group = zip(
        tile.by_length(products),
        tile.by_group(weights.transpose(0, 1)),
        tile.by_group(inverse_lengths.transpose(0, 1)),
        strict=True,
    )
    cosines = [  # (n, i, L, m + 1) -> (n L, i, m + 1)
        ((p.transpose(1, 2) @ w.mT) * r[:, :, None]).transpose(1, 2).flatten(0, 1) for p, w, r in by_group
    ]
    return [tile.max_mean(torch.cat(cosines), 1 / weights.shape[2])]


@torch.no_grad()
def _select(tile: Tile, keep_share: Fraction) -> tuple[Tensor, Tensor]:
    """Which patches each caption keeps, (i, c, v) bool, and weights of the others, which sum to 1 if there are any."""
    products, words, patches = _at_least_float32(tile.products, tile.word_embeds, tile.patch_embeds)
    mean_word = tile.over_words(torch.sum, words * tile.word_weights)
    mean_patch = (patches * tile.patch_weights[..., None]).sum(1, keepdim=True)
    by_words = tile.over_words(torch.sum, products * tile.word_weights[..., None])
    by_words = by_words / _norm(mean_word.square().sum(1))[:, None, None]
    by_patches = (patches * mean_patch).sum(2) / _norm(mean_patch.square().sum(2))
    is_real = tile.patch_weights > 0
    score = (by_words + by_patches).masked_fill(~is_real, -torch.inf).transpose(0, 1)
    num_kept = (is_real.sum(1) * keep_share.numerator + keep_share.denominator - 1) // keep_share.denominator
    # Ties by position, but in ONNX, which has no stable sort.
    order = score.argsort(dim=2, descending=True, **({} if torch.compiler.is_exporting() else {"stable": True}))
    is_first = torch.arange(score.shape[2], device=score.device) < num_kept.clamp(min=1)[:, None]
    is_kept = torch.zeros_like(score, dtype=torch.bool).scatter(2, order, is_first[:, None].expand_as(order))
    is_left_out = is_real[:, None] & ~is_kept
    weights = score.masked_fill(~is_left_out, -torch.inf).softmax(2)
    return is_kept, weights.masked_fill(~is_left_out, 0)  # where none is left out the softmax is NaN


def _squared_lengths(weights: Tensor, patches: Tensor) -> Tensor:
    """(i, n, v) weights of the (i, v, d) patches -> (i, n): of each weighted sum of patches."""
    (_, num_sums, num_patches), dim = weights.shape, patches.shape[2]
    # Few sums are smaller than the Gram matrix; an exported graph cannot choose by size.
    if not torch.compiler.is_exporting() and num_sums * dim < num_patches * num_patches:
        return (weights @ patches).square().sum(2)
    return ((weights @ (patches @ patches.mT)) * weights).sum(2)


def _at_least_float32(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _norm(squares: Tensor) -> Tensor:
    """Square root, and 1 for 0: a zero vector stays zero, and its gradient finite."""
    return squares.masked_fill(squares == 0, 1).sqrt()


def _inverse_root(squares: Tensor) -> Tensor:
    """1 over the square root; 0 for 0, so that a zero vector has no direction and no gradient."""
    is_zero = squares <= 0
    return squares.masked_fill(is_zero, 1).rsqrt().masked_fill(is_zero, 0)


_CROSS_ATTENTION = {
    "t2i": (_words_attend, WORD_INVERSE_TEMPERATURE),
    "i2t": (_patches_attend, PATCH_INVERSE_TEMPERATURE),
}
