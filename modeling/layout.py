"""Which pairs are computed together: captions sorted by length and cut into blocks, images with captions of their own.

Letters as in `tiles.py`. Sizes are numbers of words times images; what a rule keeps besides products counts as words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .tiles import Tokens


class Layout(NamedTuple):
    """Which real token fills each slot, what it weighs, and the captions sorted by length."""

    patch_index: Tensor | None  # (B, v)
    patch_weights: Tensor  # (B, v)
    word_index: Tensor  # (C, w): real words first, then the last real word repeated
    word_weights: Tensor  # (C, w)
    lengths: Tensor  # (C,), 1 for a caption without words
    extra_words: int  # as many products of words take the memory of what a rule keeps for a caption besides its products

    @classmethod
    def of(cls, word_mask: Tensor, patch_mask: Tensor | None, tokens: Tokens) -> Layout:
        num_images, num_patches, _ = tokens.patch_embeds.shape
        dtype = torch.promote_types(tokens.patch_embeds.dtype, torch.float32)
        lengths = word_mask.sum(1, keepdim=True)
        slots = torch.arange(word_mask.shape[1], device=word_mask.device)
        # Not a stable sort of the mask, which ONNX does not have.
        real_first = torch.where(word_mask, slots, slots + word_mask.shape[1]).argsort(dim=1)
        word_index = real_first.gather(1, torch.minimum(slots, lengths - 1).clamp(min=0))
        word_weights = (slots < lengths).to(dtype) / lengths.clamp(min=1)
        if patch_mask is None:
            patch_index = None
            patch_weights = torch.full((num_images, num_patches), 1 / num_patches, dtype=dtype, device=slots.device)
        else:
            slots = torch.arange(num_patches, device=patch_mask.device)
            patch_index = torch.where(patch_mask, slots, patch_mask.to(torch.int8).argmax(1, keepdim=True))
            patch_weights = patch_mask.to(dtype) / patch_mask.sum(1, keepdim=True).clamp(min=1)
        extra_words = 0 if tokens.patch_logits is None else tokens.patch_logits.shape[2] + 1  # weights of each patch
        return cls(patch_index, patch_weights, word_index, word_weights, lengths[:, 0].clamp(min=1), extra_words)

    def places(self, captions: Tensor, num_words: int) -> Tensor:
        """(...,) caption numbers -> (..., num_words): where their first words stand among all words (C * w)."""
        return captions[..., None] * self.word_index.shape[1] + self.word_index[captions, :num_words]


class Group(NamedTuple):
    captions: Tensor  # (n,) caption numbers
    num_words: int  # L, the longest of them


def blocks(layout: Layout, captions: Tensor, max_words: int, spread: int) -> Iterator[list[Group]]:
    """Cuts captions (numbers) into groups whose lengths differ by `spread` at most, and those into blocks of words."""
    captions = captions[layout.lengths[captions].argsort(stable=True)]
    lengths = layout.lengths[captions].tolist()
    block: list[Group] = []
    words = first = 0
    for stop in range(1, len(lengths) + 1):
        is_end = stop == len(lengths)
        is_full = not is_end and words + (stop - first + 1) * (lengths[stop] + layout.extra_words) > max_words
        if is_end or is_full or lengths[stop] > lengths[first] + spread:
            block.append(Group(captions[first:stop], lengths[stop - 1]))
            words += (stop - first) * (lengths[stop - 1] + layout.extra_words)
            first = stop
        if is_end or is_full:
            yield block
            block, words = [], 0


def images_with_own_captions(layout: Layout, has_grad: Tensor, columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cuts the pairs with a gradient, (B, C) bool, into tiles: images (i,) and the captions of each (i, n).

    Images with about as many captions stand together; where one has fewer, captions of others fill up. A caption that no
    image needs is left out: without words, its scores would be NaN here.
    """
    used = has_grad.any(0).nonzero()[:, 0]
    counts = has_grad.sum(1)
    order = counts.argsort(stable=True)
    order = order[counts[order] > 0]
    numbers = counts[order].tolist()
    longest = int(layout.lengths.max()) + layout.extra_words
    first = 0
    for stop in range(1, len(numbers) + 1):
        if stop == len(numbers) or (stop - first + 1) * numbers[stop] * longest > columns:
            images, first = order[first:stop], stop
            captions = used[has_grad[images][:, used].to(torch.int8).argsort(dim=1, descending=True, stable=True)]
            for part in captions[:, : numbers[stop - 1]].split(max(columns // longest, 1), dim=1):
                yield images, part
