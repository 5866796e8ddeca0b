"""How published codes compute the same scores: written from their formulas, as the other side of each ratio.

Letters: B images, C captions, v patches, w words, k regions, d features. All take (B, v, d), (C, w, d) and a (C, w) mask.
"""

from __future__ import annotations

import torch
from torch import Tensor


def einsum_max_mean(patches: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """The 4-D tensor in one einsum, then both directions: the form of ColPali and of CHAN, with padding masked.

    Words come first, so that patches lie innermost, and `max` keeps indices for the backward pass, not the tensor.
    """
    products = torch.einsum("twd,ivd->itwv", words, patches)
    best_patch = products.max(3).values.masked_fill(~mask, 0).sum(2) / mask.sum(1)
    return best_patch + products.masked_fill(~mask[None, :, :, None], -torch.inf).max(2).values.mean(2)


def caption_loop_max_mean(patches: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """LAPS's form: one caption after the other, repeated for every image of the batch."""
    columns = []
    for caption, length in zip(words, mask.sum(1).tolist(), strict=True):
        repeated = caption[:length].expand(len(patches), -1, -1).contiguous()
        products = repeated @ patches.transpose(1, 2)
        columns.append(products.max(2).values.mean(1) + products.max(1).values.mean(1))
    return torch.stack(columns, dim=1)


def einsum_hard_alignment(patches: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """CHAN's form: the 4-D tensor, its maximum over patches, the mean over words."""
    best_patch = torch.einsum("twd,ivd->itwv", words, patches).max(3).values
    return best_patch.masked_fill(~mask, 0).sum(2) / mask.sum(1)


def caption_loop_cross_attention(patches: Tensor, words: Tensor, mask: Tensor, temperature: float = 9.0) -> Tensor:
    """SCAN's form (t2i): one caption after the other; an attended image vector for each word."""
    columns = []
    for caption, length in zip(words, mask.sum(1).tolist(), strict=True):
        repeated = caption[:length].expand(len(patches), -1, -1).contiguous()
        attention = torch.nn.functional.leaky_relu(patches @ repeated.transpose(1, 2), 0.1)
        attention = torch.nn.functional.normalize(attention, dim=2).transpose(1, 2)
        context = (temperature * attention).softmax(2) @ patches
        columns.append(torch.cosine_similarity(repeated, context, dim=2).mean(1))
    return torch.stack(columns, dim=1)


def einsum_three_levels(
    patches: Tensor, words: Tensor, mask: Tensor, patch_saliency: Tensor, word_saliency: Tensor, regions: Tensor
) -> Tensor:
    """Eq. 7 at three levels, an einsum each: (3, B, C)."""
    salient_words = words * word_saliency[..., None]
    salient_patches = patches * patch_saliency[..., None]
    pairs = ((patches, words), (salient_patches, salient_words), (regions, salient_words))
    return torch.stack([einsum_max_mean(left, right, mask) for left, right in pairs])


def patchwise_region_noise(assignment: Tensor, means: Tensor, log_vars: Tensor) -> Tensor:
    """Eq. 5-6 as printed: noise for every patch of every region, (B, v, k, d)."""
    noise = torch.randn(*assignment.shape, means.shape[-1])
    samples = means[:, None] + noise * torch.exp(log_vars / 2)[:, None]
    return (assignment[..., None] * samples).sum(1)
