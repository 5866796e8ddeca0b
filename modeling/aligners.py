"""The aligners: what each adds to patches and words, and how it scores every image with every caption.

An aligner sees tokens, never pixels or captions. To add one: a class with the five members of [`Aligner`] and a line in
`ALIGNERS` (and in `POOLINGS` and `ALIGNER_FIELDS` of the config). A field that its `describe_image` adds stands in
`outputs.py` too, and in `IMAGE_FIELDS` of the evaluation; a parameter outside of the layers of torch needs a line in
`_init_weights` of the model.
Parameters act in `describe_image` and `describe_text` only: training scores the tokens of several processes outside of the
module that synchronises gradients.
`image` and `text` are any objects with the named fields, such as the outputs of `get_image_features` and
`get_text_features`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import cross_attention, patch_slimming
from .contributions import (
    Part,
    attention_parts,
    hard_alignment_parts,
    pooled_parts,
    region_parts,
    slimming_parts,
    token_parts,
)
from .losses import gaussian_kl, reconstruction_loss, region_entropy, saliency_budget
from .regions import RegionMixture
from .saliency import SaliencyAdapter
from .similarity import hard_alignment, level_similarities


class Aligner(nn.Module):
    """Base: no parts of its own, one level, no regulariser."""

    level_weights: tuple[float, ...] = (1.0,)
    level_names: tuple[str, ...] = ("contrastive",)

    def __init__(self, config):
        super().__init__()

    def describe_image(self, patch_embeds: Tensor, patch_mask: Tensor) -> dict[str, Tensor]:
        """(B, Lv, d) unit-length patches, (B, Lv) mask -> further fields of the image features."""
        return {}

    def describe_text(self, word_embeds: Tensor, word_mask: Tensor) -> dict[str, Tensor]:
        """(C, Lt, d) unit-length words, (C, Lt) mask -> further fields of the text features."""
        return {}

    def similarities(self, image, text) -> Tensor:
        """Scores of every image with every caption, (levels, B, C), float32."""
        raise NotImplementedError

    def contributions(self, image, text) -> list[Part]:
        """Shares of words and patches that add up to the weighted score of one image and one caption at inference.

        `image` and `text` have the fields of one row without padding, (Lv, d) and (Lt, d) tokens.
        """
        raise NotImplementedError

    def regularisers(self, image) -> dict[str, tuple[float, Tensor]]:
        """Loss terms besides the contrastive ones: name -> (weight, value), a mean over the images."""
        return {}


class GRM(Aligner):
    """Granularity-aware and region-uncertain modelling (AAAI 2026): adapters, region mixture, three levels."""

    level_names = ("contrastive_original", "contrastive_key", "contrastive_uncertain")

    def __init__(self, config):
        super().__init__(config)
        self.level_weights = tuple(config.level_weights)
        names = ("reconstruction", "kl", "entropy", "budget")
        self.weights = {name: getattr(config, f"{name}_weight") for name in names}
        self.patch_budget = config.patch_budget
        dim, tau = config.projection_dim, config.saliency_temperature
        self.patch_adapter = SaliencyAdapter(dim, tau) if config.use_patch_adapter else None
        self.word_adapter = SaliencyAdapter(dim, tau) if config.use_word_adapter else None
        num_regions = config.num_regions if config.use_region_prompts else None
        self.regions = RegionMixture(dim, num_regions, config.region_logit_scale, config.use_region_uncertainty)

    def describe_image(self, patch_embeds: Tensor, patch_mask: Tensor) -> dict[str, Tensor]:
        patch_embeds = _zero_padding(patch_embeds, patch_mask)
        saliency = _saliency(self.patch_adapter, patch_embeds, patch_mask)
        return {"patch_saliency": saliency, **self.regions(patch_embeds * saliency[..., None], patch_mask)}

    def describe_text(self, word_embeds: Tensor, word_mask: Tensor) -> dict[str, Tensor]:
        return {"word_saliency": _saliency(self.word_adapter, _zero_padding(word_embeds, word_mask), word_mask)}

    def similarities(self, image, text) -> Tensor:
        return level_similarities(
            image.patch_embeds,
            text.word_embeds,
            text.word_mask,
            patch_mask=image.patch_mask,
            patch_saliency=image.patch_saliency,
            word_saliency=text.word_saliency,
            region_embeds=image.region_embeds,
        )

    def contributions(self, image, text) -> list[Part]:
        original, key, uncertain = self.level_weights
        products = text.word_embeds @ image.patch_embeds.T
        key_products = products * text.word_saliency[:, None] * image.patch_saliency
        region_products = (text.word_embeds * text.word_saliency[:, None]) @ image.region_embeds.T
        return [
            *token_parts(products, "original", original),
            *token_parts(key_products, "key", key),
            *region_parts(region_products, key_products, image.region_assignment, "uncertain", uncertain),
        ]

    def regularisers(self, image) -> dict[str, tuple[float, Tensor]]:
        salient_patches = _zero_padding(image.patch_embeds, image.patch_mask) * image.patch_saliency[..., None]
        values = {
            "reconstruction": reconstruction_loss(image.region_embeds, salient_patches, image.patch_mask),
            "entropy": region_entropy(image.region_affinity, image.patch_mask),
            "budget": saliency_budget(image.patch_saliency, image.patch_mask, self.patch_budget),
        }
        if image.region_log_vars is not None:
            values["kl"] = gaussian_kl(image.region_means, image.region_log_vars)
        return {name: (self.weights[name], value) for name, value in values.items()}


class MaxMean(Aligner):
    """Bidirectional max-mean of the plain tokens: GRM with everything switched off."""

    def similarities(self, image, text) -> Tensor:
        return level_similarities(image.patch_embeds, text.word_embeds, text.word_mask, patch_mask=image.patch_mask)

    def contributions(self, image, text) -> list[Part]:
        return token_parts(text.word_embeds @ image.patch_embeds.T, "original", 1.0)


class CHAN(Aligner):
    """Hard alignment (Pan, Wu, Zhang; CVPR 2023): only the best patch of each word counts."""

    def __init__(self, config):
        super().__init__(config)
        self.pooling = config.pooling

    def similarities(self, image, text) -> Tensor:
        return hard_alignment(
            image.patch_embeds, text.word_embeds, text.word_mask, patch_mask=image.patch_mask, pooling=self.pooling
        )[None]

    def contributions(self, image, text) -> list[Part]:
        return hard_alignment_parts(text.word_embeds @ image.patch_embeds.T, self.pooling)


class SCAN(Aligner):
    """Stacked cross-attention (Lee et al., ECCV 2018): each token against what it attends to on the other side."""

    def __init__(self, config):
        super().__init__(config)
        self.directions = ("t2i", "i2t") if config.attention_direction == "both" else (config.attention_direction,)

    def similarities(self, image, text) -> Tensor:
        tokens = (image.patch_embeds, text.word_embeds, text.word_mask)
        scores = [cross_attention(*tokens, patch_mask=image.patch_mask, direction=d) for d in self.directions]
        return torch.stack(scores).mean(0, keepdim=True)

    def contributions(self, image, text) -> list[Part]:
        return attention_parts(image.patch_embeds, text.word_embeds, self.directions)


class LAPS(Aligner):
    """Linguistic-aware patch slimming (Fu et al., CVPR 2024): each caption keeps the patches that it speaks of.

    Logits say how much each patch counts for each of the aggregated tokens; which patches take part, `patch_slimming` asks
    of image and caption together.
    """

    def __init__(self, config):
        super().__init__(config)
        self.keep_share = config.patch_keep_share
        dim, hidden_dim = config.projection_dim, max(config.projection_dim // 5, 1)
        self.aggregation = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, config.num_regions)
        )
        self.logit_scale = nn.Parameter(torch.ones(1))

    def describe_image(self, patch_embeds: Tensor, patch_mask: Tensor) -> dict[str, Tensor]:
        patch_embeds = _zero_padding(patch_embeds, patch_mask).to(self.logit_scale.dtype)
        logits = self.logit_scale * self.aggregation(patch_embeds)
        return {"patch_logits": logits.to(torch.promote_types(logits.dtype, torch.float32))}

    def similarities(self, image, text) -> Tensor:
        return patch_slimming(
            image.patch_embeds,
            text.word_embeds,
            text.word_mask,
            image.patch_logits,
            patch_mask=image.patch_mask,
            keep_share=self.keep_share,
        )[None]

    def contributions(self, image, text) -> list[Part]:
        return slimming_parts(image.patch_embeds, text.word_embeds, image.patch_logits, self.keep_share)


class VSE(Aligner):
    """VSE++ (BMVC 2018): tokens pooled to one vector a side, and their cosine."""

    def __init__(self, config):
        super().__init__(config)
        self.pooling = config.pooling

    def pool_image(self, image) -> Tensor:
        """(B, d) vectors of unit length."""
        return _pool(image.patch_embeds, image.patch_mask, self.pooling)

    def pool_text(self, text) -> Tensor:
        """(C, d) vectors of unit length; a product with those of images is the score."""
        return _pool(text.word_embeds, text.word_mask, self.pooling)

    def similarities(self, image, text) -> Tensor:
        pooled_image, pooled_text = self.pool_image(image), self.pool_text(text)
        with torch.autocast(pooled_image.device.type, enabled=False):
            return (pooled_image @ pooled_text.T)[None]

    def contributions(self, image, text) -> list[Part]:
        return pooled_parts(image.patch_embeds, text.word_embeds, self.pooling)


def _zero_padding(tokens: Tensor, mask: Tensor) -> Tensor:
    """(n, L, d) tokens with 0 in place of padding: NaN there would reach the gradient of every weight."""
    return tokens.masked_fill(~mask[..., None], 0)


def _saliency(adapter: SaliencyAdapter | None, tokens: Tensor, mask: Tensor) -> Tensor:
    """(n, L): in [0, 1], 0 for padding; 1 for every real token where there is no adapter."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    return mask.to(dtype) if adapter is None else adapter(tokens) * mask


def _pool(tokens: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """(n, L, d) tokens -> (n, d) unit-length vectors; a row without tokens gives 0."""
    if pooling == "max":
        pooled = tokens.masked_fill(~mask[..., None], -torch.inf).amax(1).masked_fill(~mask.any(1, keepdim=True), 0)
    else:
        pooled = _zero_padding(tokens, mask).sum(1)
    return nn.functional.normalize(pooled, dim=-1)


ALIGNERS: dict[str, type[Aligner]] = {
    "grm": GRM,
    "max_mean": MaxMean,
    "chan": CHAN,
    "scan": SCAN,
    "laps": LAPS,
    "vse++": VSE,
}
