"""What a scoring rule is given, a tile of the products of words with patches, and the tokens that tiles are cut from.

Letters: B images, C captions, v patches, w words, k regions, m tokens that a rule makes of the patches, d features; in a
tile: i images, c captions with W words in all, in groups of n captions of nearly equal length L.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Packed words (the captions of a block, one after the other) against i images, and all that a rule needs."""

    products: Tensor  # (W, i, v)
    region_products: Tensor | None  # (W, i, k)
    word_weights: Tensor  # (W, 1): 1 / number of words; 0 on repeated words
    patch_weights: Tensor  # (i, v): 1 / number of patches; 0 on repeated patches
    word_saliency: Tensor | None  # (W, 1, 1)
    patch_saliency: Tensor | None  # (i, v)
    patch_logits: Tensor | None  # (i, v, m), anything on repeated patches
    word_embeds: Tensor  # (W, d)
    patch_embeds: Tensor  # (i, v, d)
    shapes: list[tuple[int, int]]  # (n, L) of each group of captions, in order

    def by_length(self, values: Tensor) -> list[Tensor]:
        """(W, ...) -> for each group of captions a view (n, L, ...)."""
        parts = values.split([num_captions * num_words for num_captions, num_words in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def by_group(self, values: Tensor) -> list[Tensor]:
        """(c, ...) -> for each group of captions a view (n, ...)."""
        return list(values.split([num_captions for num_captions, _ in self.shapes]))

    def over_words(self, reduce: Callable[..., Tensor], values: Tensor) -> Tensor:
        """(W, ...) -> (c, ...): `torch.amax`, `torch.sum` or the like over the words of each caption."""
        return torch.cat([reduce(part, dim=1) for part in self.by_length(values)])

    def to_words(self, values: Tensor) -> Tensor:
        """(c, ...) -> (W, ...): to each word what its caption has."""
        parts = zip(self.by_group(values), self.shapes, strict=True)
        return torch.cat([part.repeat_interleave(length, 0) for part, (_, length) in parts])

    def max_mean(self, products: Tensor, patch_weights: Tensor | float) -> Tensor:
        """(W, i, v) -> (c, i): the mean over words of the maximum over patches, and the mean of the other direction.

        A maximum is exact in any dtype; the means run in the dtype of the weights.
        """
        best_patch = products.amax(2) * self.word_weights
        best_word = self.over_words(torch.amax, products).to(self.word_weights.dtype) * patch_weights
        return self.over_words(torch.sum, best_patch) + best_word.sum(2)


Rule = Callable[[Tile], list[Tensor]]  # -> one (c, i) score per level


class Tokens(NamedTuple):
    """The differentiable inputs, in the order in which autograd sees them. All but those of words have a row an image."""

    patch_embeds: Tensor  # (B, v, d)
    word_embeds: Tensor  # (C, w, d)
    patch_saliency: Tensor | None = None  # (B, v)
    word_saliency: Tensor | None = None  # (C, w)
    region_embeds: Tensor | None = None  # (B, k, d)
    patch_logits: Tensor | None = None  # (B, v, m)

    def map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """The same tokens, each of them changed; what is absent stays so."""
        optional = [None if t is None else change(t) for t in self[2:]]
        return Tokens(change(self.patch_embeds), change(self.word_embeds), *optional)


def check_tokens(tokens: Tokens, word_mask: Tensor, patch_mask: Tensor | None) -> None:
    """Raises ValueError for a shape or dtype that does not fit; the message names the argument."""
    patch_embeds, word_embeds, patch_saliency, word_saliency, regions, logits = tokens
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
    if logits is not None and (logits.ndim != 3 or logits.shape[:2] != patch_shape or logits.shape[2] == 0):
        raise ValueError(f"`patch_logits` must have shape ({num_images}, {num_patches}, tokens), got {tuple(logits.shape)}.")
    if patch_embeds.dtype != word_embeds.dtype:
        raise ValueError(
            f"`patch_embeds` and `word_embeds` must share a dtype, got {patch_embeds.dtype}, {word_embeds.dtype}."
        )
