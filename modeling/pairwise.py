"""Runs a scoring rule over every image x caption pair by tiles: exact, differentiable, and never the 4-D tensor.

Letters as in `tiles.py`. A tile is the product of the words of some captions with the patches of some images, and what a
rule keeps besides counts towards its size.

Two things keep it exact and small. A padded token is never set to zero (zero would beat a negative product): a real token
of the same caption or image takes its place, which changes no maximum, and its weight in the mean is 0. The backward pass
keeps only the inputs and recomputes what receives a gradient: with hardest negatives, each image with a few captions of its
own, many images at a time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import Group, Layout, blocks, images_with_own_captions
from .product import all_products
from .tiles import Rule, Tile, Tokens

CPU_BUDGET, DEVICE_BUDGET = 2**24, 2**28  # bytes of a tile: caches matter on a CPU, few launches elsewhere
SPARSE_SHARE = 1 / 8  # below this share of pairs with a gradient, each image meets only the captions that need it
_NO_LIMIT = sys.maxsize
GRAPH_TILES = 4  # the graph of a tile keeps several tensors of its size, so tiles of the backward pass are smaller


_Walk = Callable[[Rule, Layout, Tokens], Tensor]


def score_all_pairs(
    rule: Rule, tokens: Tokens, word_mask: Tensor, patch_mask: Tensor | None, memory_budget: int | None = None
) -> Tensor:
    """Scores of every image with every caption, (levels, B, C), in at least float32.

    Products keep the dtype of the input, except float16 on a CPU (16 times slower there than float32). Autocast is off:
    its bfloat16 steps are too coarse for a ranking. An image without patches or a caption without words scores 0.

    `torch.compile` breaks its graph here, so `fullgraph=True` is refused; transforms of `torch.func` are not supported.
    An exported graph (torch.export, ONNX) has no loop over lengths but one tile, and takes any batch and length.
    """
    if torch.compiler.is_exporting():
        return _score(_as_one_tile, rule, tokens, word_mask, patch_mask)
    return _score_outside_graphs(rule, tokens, word_mask, patch_mask, memory_budget)


@torch.compiler.disable(reason="the tiles follow the lengths of the captions: a graph would be built anew for every batch")
def _score_outside_graphs(
    rule: Rule, tokens: Tokens, word_mask: Tensor, patch_mask: Tensor | None, memory_budget: int | None
) -> Tensor:
    if patch_mask is not None and patch_mask.all():
        patch_mask = None
    budget = memory_budget or (CPU_BUDGET if word_mask.device.type == "cpu" else DEVICE_BUDGET)

    # What has no token at all scores 0 without a gradient, for which autograd would put NaN.
    is_whole = bool(word_mask.any(1).all()) and (patch_mask is None or bool(patch_mask.any(1).all()))

    def by_tiles(rule: Rule, layout: Layout, tokens: Tokens) -> Tensor:
        num_words = int((layout.lengths + layout.extra_words).sum())
        is_small = num_words * tokens.patch_embeds[..., 0].numel() * tokens.patch_embeds.element_size() <= budget
        return (
            _as_one_block(rule, layout, tokens) if is_small and is_whole else _AllPairs.apply(rule, layout, budget, *tokens)
        )

    return _score(by_tiles, rule, tokens, word_mask, patch_mask)


def _score(walk: _Walk, rule: Rule, tokens: Tokens, word_mask: Tensor, patch_mask: Tensor | None) -> Tensor:
    device, dtype = tokens.patch_embeds.device.type, tokens.patch_embeds.dtype
    dtype = torch.float32 if device == "cpu" and dtype == torch.float16 else dtype
    tokens = tokens.map(lambda t: t.to(dtype).contiguous())
    with torch.autocast(device, enabled=False):
        scores = walk(rule, Layout.of(word_mask, patch_mask, tokens), tokens)
    scores = scores.masked_fill(~word_mask.any(1), 0)
    return scores if patch_mask is None else scores.masked_fill(~patch_mask.any(1)[:, None], 0)


def _as_one_tile(rule: Rule, layout: Layout, tokens: Tokens) -> Tensor:
    num_captions, max_words = layout.word_index.shape
    block = [Group(torch.arange(num_captions, device=layout.word_index.device), max_words)]
    return _score_block(rule, layout, block, slice(None), _pack(tokens, layout, block)[0])


def _as_one_block(rule: Rule, layout: Layout, tokens: Tokens) -> Tensor:
    """All pairs in one tile, which autograd keeps: where that is small, to compute it again would take longer."""
    captions = torch.arange(len(layout.lengths), device=layout.lengths.device)
    (block,) = blocks(layout, captions, _NO_LIMIT, _spread(captions))
    scores = _score_block(rule, layout, block, slice(None), _pack(tokens, layout, block)[0])
    return scores[..., torch.cat([group.captions for group in block]).argsort()]


def _spread(captions: Tensor) -> int:
    """By how much the lengths of a group may differ: few launches matter more than few repeated words on a GPU."""
    return 1 if captions.device.type == "cpu" else 4


def _pack(tokens: Tokens, layout: Layout, block: list[Group]) -> tuple[Tokens, Tensor]:
    """The words of a block one after the other: word_embeds (W, d), word_saliency (W,); and their places in (C * w)."""
    flat = torch.cat([layout.places(group.captions, group.num_words).flatten() for group in block])
    return _take_words(tokens, flat), flat


def _take_words(tokens: Tokens, flat: Tensor) -> Tokens:
    """The words at some places in (C * w), in the shape of those."""
    saliency = tokens.word_saliency
    return tokens._replace(
        word_embeds=tokens.word_embeds.flatten(0, 1)[flat],
        word_saliency=None if saliency is None else saliency.flatten()[flat],
    )


def _of_images(tokens: Tokens, images: slice | Tensor) -> Tokens:
    given = {name: t for name, t in tokens._asdict().items() if t is not None}
    return tokens._replace(**{name: t[images] for name, t in given.items() if not name.startswith("word")})


def _score_block(rule: Rule, layout: Layout, block: list[Group], images: slice | Tensor, tokens: Tokens) -> Tensor:
    """The packed words of a block with the images of a tile -> (levels, i, captions of the block)."""
    shapes = [(group.captions.shape[0], group.num_words) for group in block]
    word_weights = [layout.word_weights[group.captions, : group.num_words].flatten() for group in block]
    tokens = _with_real_patches(tokens, layout, images)
    return _score_tile(rule, tokens, layout.patch_weights[images], torch.cat(word_weights), shapes, all_products)


def _score_own_captions(rule: Rule, layout: Layout, captions: Tensor, images: Tensor, tokens: Tokens) -> Tensor:
    """Each image with n captions of its own, (i, n) numbers and packed words (i, n L, d) -> (levels, i, n)."""
    num_captions, num_words = captions.shape[1], tokens.word_embeds.shape[1] // captions.shape[1]

    def score(given: dict[str, Tensor], patch_weights: Tensor, word_weights: Tensor) -> Tensor:
        one = Tokens(**{name: t if name.startswith("word") else t[None] for name, t in given.items()})
        shapes = [(num_captions, num_words)]
        return _score_tile(rule, one, patch_weights[None], word_weights, shapes, lambda words, rows: words @ rows.T)[:, 0]

    given = {name: t for name, t in _with_real_patches(tokens, layout, images)._asdict().items() if t is not None}
    word_weights = layout.word_weights[captions, :num_words].flatten(1)
    return torch.vmap(score, out_dims=1)(given, layout.patch_weights[images], word_weights)


def _with_real_patches(tokens: Tokens, layout: Layout, images: slice | Tensor) -> Tokens:
    if layout.patch_index is None:
        return tokens
    index, saliency = layout.patch_index[images], tokens.patch_saliency
    return tokens._replace(
        patch_embeds=tokens.patch_embeds.gather(1, index[..., None].expand_as(tokens.patch_embeds)),
        patch_saliency=None if saliency is None else saliency.gather(1, index),
    )


def _score_tile(
    rule: Rule,
    tokens: Tokens,
    patch_weights: Tensor,
    word_weights: Tensor,
    shapes: list[tuple[int, int]],
    products: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Packed words (W, d) of weights (W,) with i images -> (levels, i, c)."""
    patches, words, patch_saliency, word_saliency, regions, patch_logits = tokens
    of_patches, of_regions = _products(products, words, patches, regions)
    levels = rule(
        Tile(
            of_patches,
            of_regions,
            word_weights[:, None],
            patch_weights,
            None if word_saliency is None else word_saliency[:, None, None],
            patch_saliency,
            patch_logits,
            words,
            patches,
            shapes,
        )
    )
    return torch.stack(levels).transpose(1, 2)


def _products(
    products: Callable[[Tensor, Tensor], Tensor], words: Tensor, patches: Tensor, regions: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(W, d) words -> (W, i, v) with patches and (W, i, k) with regions.

    The graph of one product is the cheaper one; without a graph, maxima over what lies in one piece are worth a second.
    """

    def with_all(rows: Tensor) -> Tensor:
        return products(words, rows.flatten(0, 1)).unflatten(1, rows.shape[:2])

    if regions is None or not torch.is_grad_enabled():
        return with_all(patches), None if regions is None else with_all(regions)
    both = with_all(torch.cat([patches, regions], dim=1))
    return both[..., : patches.shape[1]], both[..., patches.shape[1] :]


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]


class _AllPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rule: Rule, layout: Layout, memory_budget: int, *inputs: Tensor | None) -> Tensor:
        tokens = Tokens._make(inputs)
        num_images, num_patches, _ = tokens.patch_embeds.shape
        columns = max(memory_budget // (tokens.patch_embeds.element_size() * num_patches), 1)  # words x images of a tile
        captions = torch.arange(len(layout.lengths), device=layout.lengths.device)
        scores, order = [], []
        square = math.isqrt(columns * num_patches)  # a product of a square tile is faster than that of a long one
        spread = _spread(captions)
        for block in blocks(layout, captions, min(square, columns), spread):
            packed, _ = _pack(tokens, layout, block)
            num_words = sum(len(group.captions) * (group.num_words + layout.extra_words) for group in block)
            tiles = _slices(num_images, max(columns // num_words, 1))
            parts = [_score_block(rule, layout, block, images, _of_images(packed, images)) for images in tiles]
            scores.append(torch.cat(parts, dim=1))
            order += [group.captions for group in block]
        ctx.save_for_backward(*tokens)
        ctx.rule, ctx.layout, ctx.columns, ctx.spread = rule, layout, columns, spread
        return torch.cat(scores, dim=2)[..., torch.cat(order).argsort()]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        tokens, layout = Tokens._make(ctx.saved_tensors), ctx.layout
        is_wanted = dict(zip(Tokens._fields, ctx.needs_input_grad[3:], strict=True))
        totals = {
            name: torch.zeros_like(t, dtype=grad.dtype)
            for name, t in tokens._asdict().items()
            if t is not None and is_wanted[name]
        }
        columns, has_grad = max(ctx.columns // GRAPH_TILES, 1), (grad != 0).any(0)
        gradients = _Gradients(ctx.rule, layout, tokens, grad, totals)
        with torch.autocast(grad.device.type, enabled=False):
            if has_grad.sum() < SPARSE_SHARE * has_grad.numel():
                for images, captions in images_with_own_captions(layout, has_grad, columns):
                    gradients.add_own_captions(images, captions)
            else:
                wanted = has_grad.any(1).nonzero()[:, 0]  # none without patches: NaN there would reach the words
                images_per_tile = max(columns // int((layout.lengths + layout.extra_words).sum()), 1)
                captions = has_grad.any(0).nonzero()[:, 0]
                for images in wanted.split(images_per_tile):
                    for block in blocks(layout, captions, max(columns // images_per_tile, 1), ctx.spread):
                        gradients.add_block(images, block)
        by_input = (totals[n].to(t.dtype) if n in totals else None for n, t in tokens._asdict().items())
        return (None, None, None, *by_input)


class _Gradients(NamedTuple):
    """Recomputes tiles with a graph and adds their gradients in place to `totals`, which names the wanted inputs."""

    rule: Rule
    layout: Layout
    tokens: Tokens
    grad: Tensor  # (levels, B, C)
    totals: dict[str, Tensor]

    def add_block(self, images: Tensor, block: list[Group]) -> None:
        """Every caption of the block with every image, (i,) numbers."""
        packed, flat = _pack(self.tokens, self.layout, block)
        leaves = self._leaves(_of_images(packed, images))
        with torch.enable_grad():
            scores = _score_block(self.rule, self.layout, block, images, leaves)
        captions = torch.cat([group.captions for group in block])
        self._add(scores, self.grad[:, images][..., captions], leaves, images, flat)

    def add_own_captions(self, images: Tensor, captions: Tensor) -> None:
        """Each image, (i,) numbers, with captions of its own, (i, n)."""
        flat = self.layout.places(captions, int(self.layout.lengths[captions].max())).flatten(1)
        leaves = self._leaves(_of_images(_take_words(self.tokens, flat), images))
        with torch.enable_grad():
            scores = _score_own_captions(self.rule, self.layout, captions, images, leaves)
        self._add(scores, self.grad[:, images[:, None], captions], leaves, images, flat)

    def _leaves(self, tokens: Tokens) -> Tokens:
        leaves = tokens.map(lambda t: t.detach().to(self.grad.dtype))
        for name in self.totals:
            getattr(leaves, name).requires_grad_()
        return leaves

    def _add(self, scores: Tensor, grad: Tensor, leaves: Tokens, images: Tensor, flat: Tensor) -> None:
        parts = torch.autograd.grad(scores, [getattr(leaves, name) for name in self.totals], grad, allow_unused=True)
        for (name, total), part in zip(self.totals.items(), parts, strict=True):
            if part is None:
                continue
            if name.startswith("word"):
                total.flatten(0, 1).index_add_(0, flat.flatten(), part.flatten(0, flat.ndim - 1))
            else:
                total[images] += part
