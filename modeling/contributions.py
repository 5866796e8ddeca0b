"""What a score is made of: shares of words and patches that add up to it exactly, for every aligner.

Pure functions of one image and one caption without padding. Letters: w words, v patches, k regions, m tokens that LAPS
makes of the patches, d features. Direction "t2i": words look for patches (or regions); "i2t": patches (or regions) look for
words; "both": the two sides meet as pooled vectors. Where several tokens are the best, the first of them counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import patch_attention, selected_tokens, word_attention
from .checks import check_index
from .similarity import HARD_ALIGNMENT_TEMPERATURE
from .tiles import Tile

_PATCH_FIELDS = ("patch_embeds", "patch_saliency", "patch_logits", "region_assignment")
_WORD_FIELDS = ("word_embeds", "word_saliency")


class Part(NamedTuple):
    """The shares of one level in one direction; those of all parts add up to the score.

    `shares` belong to words and places: (w, v) for `kind` "patch", (w, k) for "region". `patch_shares` (w, v) have the same
    sum by words and patches: what a region contributes is spread over the patches that it is the mean of.
    """

    level: str
    direction: str
    kind: str
    shares: Tensor
    patch_shares: Tensor


class Contribution(NamedTuple):
    """One share: of a word token and a patch token (`kind` "patch") or a region ("region"), by their positions."""

    word: int
    place: int
    kind: str
    level: str
    direction: str
    share: float


@dataclass(frozen=True, eq=False)
class PairShares:
    """The score of one image and one caption as a sum.

    Attributes:
        score: the score that ranks. parts: of all levels and directions, (Lt, Lv) or (Lt, K), 0 for padding.
    """

    score: float
    parts: list[Part]

    @property
    def patch_shares(self) -> Tensor:
        """(Lt, Lv): the share of every word with every patch in all parts."""
        return torch.stack([part.patch_shares for part in self.parts]).sum(0)

    @property
    def contributions(self) -> list[Contribution]:
        """All shares that are not 0, the largest magnitude first."""
        found = []
        for part in self.parts:
            words, places = (indices.tolist() for indices in part.shares.nonzero(as_tuple=True))
            shares = part.shares[words, places].tolist()
            label = (part.kind, part.level, part.direction)
            found += [Contribution(w, p, *label, share) for w, p, share in zip(words, places, shares, strict=True)]
        return sorted(found, key=lambda contribution: -abs(contribution.share))


# --- Shares by the kind of score ---


def best_matches(products: Tensor) -> tuple[Tensor, Tensor]:
    """(w, v) -> the weight of each product in either half of GRM eq. 7, both (w, v).

    The first: 1 / w for each word with its best patch. The second: 1 / v for each patch with its best word.
    """
    num_words, num_patches = products.shape
    best_patch, best_word = products.argmax(1, keepdim=True), products.argmax(0, keepdim=True)
    zeros = torch.zeros_like(products)
    return zeros.scatter(1, best_patch, 1 / num_words), zeros.scatter(0, best_word, 1 / num_patches)


def token_parts(products: Tensor, level: str, weight: float) -> list[Part]:
    """Bidirectional max-mean of words and patches (GRM eq. 7) times the weight of its level, from (w, v) products."""
    shares = [weight * matches * products for matches in best_matches(products)]
    return [Part(level, direction, "patch", own, own) for direction, own in zip(("t2i", "i2t"), shares, strict=True)]


def region_parts(
    region_products: Tensor, key_products: Tensor, region_assignment: Tensor, level: str, weight: float
) -> list[Part]:
    """Bidirectional max-mean of words and regions (GRM eq. 7).

    Args:
        region_products: (w, k). key_products: (w, v) products of words and patches, times the saliencies of both.
        region_assignment: (v, k). A region is the mean of the salient patches by these weights, so that <t, u_k> is the
            sum over patches of assignment_vk <t, v>.
    """
    return [
        Part(level, direction, "region", weight * own * region_products, weight * (own @ region_assignment.T) * key_products)
        for direction, own in zip(("t2i", "i2t"), best_matches(region_products), strict=True)
    ]


def hard_alignment_parts(products: Tensor, pooling: str) -> list[Part]:
    """CHAN: each word with its best patch, from (w, v) products.

    `"logsumexp"` is no sum over words, but S = tau log sum_w exp(s_w / tau) = sum_w p_w (s_w - tau log p_w), with the
    softmax p_w of s_w / tau: the mean of the words by these weights, and tau times their entropy. Each word keeps its own
    term of the entropy; then its share is p_w S.
    """
    best, best_patch = products.max(1, keepdim=True)
    shares = best / len(best)
    if pooling == "logsumexp":
        logits = best / HARD_ALIGNMENT_TEMPERATURE
        shares = logits.softmax(0) * HARD_ALIGNMENT_TEMPERATURE * logits.logsumexp(0)
    own = torch.zeros_like(products).scatter(1, best_patch, shares)
    return [Part("original", "t2i", "patch", own, own)]


def pooled_parts(patches: Tensor, words: Tensor, pooling: str) -> list[Part]:
    """VSE++: the cosine of pooled vectors, from (v, d) patches and (w, d) words.

    The cosine is a sum over features. By `"mean"` every word and patch has a part in each feature; by `"max"` a feature of
    the image comes from one patch and that of the caption from one word, which share its addend.
    """
    if pooling == "mean":
        shares = words @ patches.T / _length(patches.sum(0)) / _length(words.sum(0))
    else:
        (of_image, patch), (of_text, word) = patches.max(0), words.max(0)
        addends = of_image * of_text / _length(of_image) / _length(of_text)
        shares = torch.zeros(len(words) * len(patches), dtype=addends.dtype, device=addends.device)
        shares = shares.index_add(0, word * len(patches) + patch, addends).view(len(words), len(patches))
    return [Part("original", "both", "patch", shares, shares)]


def attention_parts(patches: Tensor, words: Tensor, directions: tuple[str, ...]) -> list[Part]:
    """SCAN: the cosine of a token and what it attends to is a sum over what it attends to, from (v, d) and (w, d)."""
    tile = _tile(patches, words)
    parts = []
    for direction in directions:
        terms, scale = (word_attention if direction == "t2i" else patch_attention)(tile)
        # (w, 1) or (1, v), as many cosines as there are tokens that attend.
        scale = scale if direction == "t2i" else scale[0]
        shares = terms[:, 0] * scale / (scale.numel() * len(directions))
        parts.append(Part("original", direction, "patch", shares, shares))
    return parts


def slimming_parts(patches: Tensor, words: Tensor, patch_logits: Tensor, keep_share: float) -> list[Part]:
    """LAPS: a token is a weighted sum of patches scaled to length 1, and so is its product with a word.

    From (v, d) patches, (w, d) words and (v, m) logits.
    """
    weights, inverse_lengths = selected_tokens(_tile(patches, words, patch_logits), keep_share)
    weights = (weights * inverse_lengths[..., None])[0, 0]  # (m + 1, v)
    products = words @ patches.T
    shares = [(matches @ weights) * products for matches in best_matches(products @ weights.T)]
    return [Part("original", direction, "patch", own, own) for direction, own in zip(("t2i", "i2t"), shares, strict=True)]


def _length(vector: Tensor) -> Tensor:
    """Of a vector, never below what `normalize` divides by."""
    return torch.linalg.vector_norm(vector).clamp(min=1e-12)


def _tile(patches: Tensor, words: Tensor, patch_logits: Tensor | None = None) -> Tile:
    """The tile of one image and one caption, for the rules of `attention.py`."""
    num_words, num_patches = len(words), len(patches)
    return Tile(
        products=(words @ patches.T)[:, None],
        region_products=None,
        word_weights=words.new_full((num_words, 1), 1 / num_words),
        patch_weights=words.new_full((1, num_patches), 1 / num_patches),
        word_saliency=None,
        patch_saliency=None,
        patch_logits=None if patch_logits is None else patch_logits[None],
        word_embeds=words,
        patch_embeds=patches[None],
        shapes=[(1, num_words)],
    )


# --- One pair of many ---


def one_row(features: Any, side: str, index: int) -> Any:
    """One image (`side` "patch") or caption ("word") of the features, in a batch of 1.

    Raises:
        ValueError: these are no such features, or `index` is out of range.
    """
    name, index_name = ("image", "image_index") if side == "patch" else ("text", "caption_index")
    if getattr(features, f"{side}_mask", None) is None:
        raise ValueError(
            f"`{name}` must be what `get_{name}_features` returns or an output of the model, got {type(features).__name__}. "
            "For a picture and a sentence call `granalign_hf.explanation.explain`."
        )
    check_index(index_name, index, len(getattr(features, f"{side}_mask")))
    fields = (*_PATCH_FIELDS, "region_embeds", "patch_mask") if side == "patch" else (*_WORD_FIELDS, "word_mask")
    rows = {name: getattr(features, name, None) for name in fields}
    return SimpleNamespace(**{name: None if values is None else values[[index]] for name, values in rows.items()})


def pair_parts(aligner: Any, image: Any, text: Any) -> list[Part]:
    """The parts of an aligner for a pair of [`one_row`], with 0 in place of padding.

    Raises:
        ValueError: the image has no patch or the caption no word, so that there is nothing to explain.
    """
    patch_mask, word_mask = image.patch_mask[0], text.word_mask[0]
    if not (patch_mask.any() and word_mask.any()):
        raise ValueError("`explain` needs at least one patch and one word; one of the masks of this pair is all False.")
    real_image = SimpleNamespace(**{name: _real(getattr(image, name), patch_mask) for name in _PATCH_FIELDS})
    real_image.region_embeds = None if image.region_embeds is None else image.region_embeds[0]
    real_text = SimpleNamespace(**{name: _real(getattr(text, name), word_mask) for name in _WORD_FIELDS})
    with torch.autocast(word_mask.device.type, enabled=False):
        parts = aligner.contributions(real_image, real_text)
    return [
        part._replace(
            shares=_with_padding(part.shares, word_mask, patch_mask if part.kind == "patch" else None),
            patch_shares=_with_padding(part.patch_shares, word_mask, patch_mask),
        )
        for part in parts
    ]


def _real(values: Tensor | None, mask: Tensor) -> Tensor | None:
    return None if values is None else values[0, mask]


def _with_padding(shares: Tensor, word_mask: Tensor, place_mask: Tensor | None) -> Tensor:
    """Rows and columns of 0 in place of padding; no mask: no padding."""
    place_mask = torch.ones_like(shares[0], dtype=torch.bool) if place_mask is None else place_mask
    padded = shares.new_zeros(len(word_mask), len(place_mask))
    padded[word_mask[:, None] & place_mask] = shares.flatten()
    return padded
