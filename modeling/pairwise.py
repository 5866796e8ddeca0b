"""Runs a scoring rule over every image x caption pair by tiles: exact, differentiable, and never the 4-D tensor.

Letters as in `tiles.py`. A tile is the product of the words of some captions with the patches of some images, and what a
rule keeps besides counts towards its size.

Two things keep it exact and small. A padded token is never set to zero (zero would beat a negative product): a real token
of the same caption or image takes its place, which changes no maximum, and its weight in the mean is 0. The backward pass
keeps only the inputs and recomputes the tiles that receive a gradient: with hardest negatives, a few captions per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .product import all_products
from .tiles import Rule, Tile, Tokens

CPU_BUDGET, DEVICE_BUDGET = 2**24, 2**28  # bytes of a tile: caches matter on a CPU, few launches elsewhere
SPARSE_SHARE = 1 / 8  # below this share of pairs with a gradient, each image meets only the captions that need it
GRAPH_TILES = 4  # the graph of a tile keeps several tensors of its size, so tiles of the backward pass are smaller


_Walk = Callable[[Rule, "_Layout", Tokens], Tensor]


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

    def by_tiles(rule: Rule, layout: _Layout, tokens: Tokens) -> Tensor:
        return _AllPairs.apply(rule, layout, budget, *tokens)

    return _score(by_tiles, rule, tokens, word_mask, patch_mask)


def _score(walk: _Walk, rule: Rule, tokens: Tokens, word_mask: Tensor, patch_mask: Tensor | None) -> Tensor:
    device, dtype = tokens.patch_embeds.device.type, tokens.patch_embeds.dtype
    dtype = torch.float32 if device == "cpu" and dtype == torch.float16 else dtype
    tokens = tokens.map(lambda t: t.to(dtype).contiguous())
    with torch.autocast(device, enabled=False):
        scores = walk(rule, _Layout.of(word_mask, patch_mask, tokens), tokens)
    scores = scores.masked_fill(~word_mask.any(1), 0)
    return scores if patch_mask is None else scores.masked_fill(~patch_mask.any(1)[:, None], 0)


def _as_one_tile(rule: Rule, layout: _Layout, tokens: Tokens) -> Tensor:
    num_captions, max_words = layout.word_index.shape
    block = [_Group(torch.arange(num_captions, device=layout.word_index.device), max_words)]
    return _score_tile(rule, layout, block, slice(None), _pack(tokens, layout, block)[0])


class _Layout(NamedTuple):
    """Which real token fills each slot, what it weighs, and the captions sorted by length."""

    patch_index: Tensor | None  # (B, v)
    patch_weights: Tensor  # (B, v)
    word_index: Tensor  # (C, w): real words first, then the last real word repeated
    word_weights: Tensor  # (C, w)
    lengths: Tensor  # (C,), 1 for a caption without words
    extra_words: int  # as many products of words take the memory of what a rule keeps for a caption besides its products

    @classmethod
    def of(cls, word_mask: Tensor, patch_mask: Tensor | None, tokens: Tokens) -> _Layout:
        num_images, num_patches, _ = tokens.patch_embeds.shape
        dtype = torch.promote_types(tokens.patch_embeds.dtype, torch.float32)
        lengths = word_mask.sum(1, keepdim=True)
        slots = torch.arange(word_mask.shape[1], device=word_mask.device)
        real_first = word_mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
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


class _Group(NamedTuple):
    captions: Tensor  # (n,) caption numbers
    num_words: int  # L, the longest of them


def _blocks(layout: _Layout, captions: Tensor, max_words: int, spread: int) -> Iterator[list[_Group]]:
    """Cuts captions (numbers) into groups whose lengths differ by `spread` at most, and those into blocks of words."""
    captions = captions[layout.lengths[captions].argsort(stable=True)]
    lengths = layout.lengths[captions].tolist()
    block: list[_Group] = []
    words = first = 0
    for stop in range(1, len(lengths) + 1):
        is_end = stop == len(lengths)
        is_full = not is_end and words + (stop - first + 1) * (lengths[stop] + layout.extra_words) > max_words
        if is_end or is_full or lengths[stop] > lengths[first] + spread:
            block.append(_Group(captions[first:stop], lengths[stop - 1]))
            words += (stop - first) * (lengths[stop - 1] + layout.extra_words)
            first = stop
        if is_end or is_full:
            yield block
            block, words = [], 0


def _pack(tokens: Tokens, layout: _Layout, block: list[_Group]) -> tuple[Tokens, Tensor]:
    """The words of a block one after the other: word_embeds (W, d), word_saliency (W,); and their places in (C * w)."""
    max_words = layout.word_index.shape[1]
    flat = torch.cat(
        [(g.captions[:, None] * max_words + layout.word_index[g.captions, : g.num_words]).flatten() for g in block]
    )
    saliency = tokens.word_saliency
    packed = tokens._replace(
        word_embeds=tokens.word_embeds.flatten(0, 1)[flat],
        word_saliency=None if saliency is None else saliency.flatten()[flat],
    )
    return packed, flat


def _of_images(tokens: Tokens, images: slice | Tensor) -> Tokens:
    given = {name: t for name, t in tokens._asdict().items() if t is not None}
    return tokens._replace(**{name: t[images] for name, t in given.items() if not name.startswith("word")})


def _score_tile(rule: Rule, layout: _Layout, block: list[_Group], images: slice | Tensor, tokens: Tokens) -> Tensor:
    """The packed words of a block with the images of a tile -> (levels, i, captions of the block)."""
    patches, words, patch_saliency, word_saliency, regions, patch_logits = tokens
    num_images, num_patches, _ = patches.shape
    if layout.patch_index is not None:
        index = layout.patch_index[images]
        patches = patches.gather(1, index[..., None].expand_as(patches))
        patch_saliency = None if patch_saliency is None else patch_saliency.gather(1, index)
    shapes = [(group.captions.shape[0], group.num_words) for group in block]
    word_weights = [layout.word_weights[group.captions, : group.num_words].flatten() for group in block]
    levels = rule(
        Tile(
            all_products(words, patches.flatten(0, 1)).view(-1, num_images, num_patches),
            None if regions is None else all_products(words, regions.flatten(0, 1)).view(-1, *regions.shape[:2]),
            torch.cat(word_weights)[:, None],
            layout.patch_weights[images],
            None if word_saliency is None else word_saliency[:, None, None],
            patch_saliency,
            patch_logits,
            words,
            patches,
            shapes,
        )
    )
    return torch.stack(levels).transpose(1, 2)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]


class _AllPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rule: Rule, layout: _Layout, memory_budget: int, *inputs: Tensor | None) -> Tensor:
        tokens = Tokens._make(inputs)
        num_images, num_patches, _ = tokens.patch_embeds.shape
        columns = max(memory_budget // (tokens.patch_embeds.element_size() * num_patches), 1)  # words x images of a tile
        captions = torch.arange(len(layout.lengths), device=layout.lengths.device)
        scores, order = [], []
        square = math.isqrt(columns * num_patches)  # a product of a square tile is faster than that of a long one
        spread = 1 if captions.device.type == "cpu" else 4  # few launches matter more than few repeated words on a GPU
        for block in _blocks(layout, captions, min(square, columns), spread):
            packed, _ = _pack(tokens, layout, block)
            num_words = sum(len(group.captions) * (group.num_words + layout.extra_words) for group in block)
            tiles = _slices(num_images, max(columns // num_words, 1))
            parts = [_score_tile(rule, layout, block, images, _of_images(packed, images)) for images in tiles]
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
        columns, spread = max(ctx.columns // GRAPH_TILES, 1), ctx.spread
        has_grad = (grad != 0).any(0)
        if has_grad.sum() < SPARSE_SHARE * has_grad.numel():
            images_per_tile = 1 if grad.device.type == "cpu" else 16
            spread = layout.word_index.shape[1]  # one group: a few repeated words cost less than launches
        else:
            images_per_tile = max(columns // int((layout.lengths + layout.extra_words).sum()), 1)
        wanted = has_grad.any(1).nonzero()[:, 0]  # none without patches: NaN there would reach the words
        tiles = wanted.split(images_per_tile) if len(wanted) < len(has_grad) else _slices(len(wanted), images_per_tile)
        with torch.autocast(grad.device.type, enabled=False):
            for images in tiles:
                captions = has_grad[images].any(0).nonzero()[:, 0]
                for block in _blocks(layout, captions, max(columns // images_per_tile, 1), spread):
                    _add_tile_grads(ctx.rule, layout, block, images, tokens, grad, totals)
        by_input = (totals[n].to(t.dtype) if n in totals else None for n, t in tokens._asdict().items())
        return (None, None, None, *by_input)


def _add_tile_grads(
    rule: Rule,
    layout: _Layout,
    block: list[_Group],
    images: slice | Tensor,
    tokens: Tokens,
    grad: Tensor,
    totals: dict[str, Tensor],
) -> None:
    """Recomputes one tile with a graph and adds its gradients in place to `totals`, which names the wanted inputs."""
    packed, flat = _pack(tokens, layout, block)
    leaves = _of_images(packed, images).map(lambda t: t.detach().to(grad.dtype))
    wanted = [getattr(leaves, name).requires_grad_() for name in totals]
    with torch.enable_grad():
        scores = _score_tile(rule, layout, block, images, leaves)
    captions = torch.cat([group.captions for group in block])
    parts = torch.autograd.grad(scores, wanted, grad[:, images][..., captions], allow_unused=True)
    for (name, total), part in zip(totals.items(), parts, strict=True):
        if part is None:
            continue
        if name.startswith("word"):
            total.flatten(0, 1).index_add_(0, flat, part)
        else:
            total[images] += part
