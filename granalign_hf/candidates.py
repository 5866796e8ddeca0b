"""Items as an engine takes them: what a model says of pictures or captions, and the few vectors that find candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .engines import Item, Point
from .modeling.processing_granalign import read_image
from .modeling.region_features import read_features

NUM_CLUSTERS = 7  # with the pooled vector 8 KB an image of width 512 in float16
NUM_ROUNDS = 5
USUAL_WORDS = 12  # of a caption


def search_vectors(model: Any, features: Any) -> list[Tensor]:
    """Of each image or caption its (K, d) vectors; those of captions and images meet by MaxSim.

    An image has its regions, where the aligner has some (GRM), and otherwise up to seven means of patches that are alike: a
    word finds the patch that it looks for near one of them, which it does not in a mean over all patches or over the cells
    of a grid. A caption has its words, times their saliency. With VSE++ both have the one vector that it compares, so that
    MaxSim is the score.
    """
    is_image = features.get("patch_embeds") is not None
    if model.config.aligner == "vse++":
        pooled = model.aligner.pool_image(features) if is_image else model.aligner.pool_text(features)
        return list(pooled[:, None])
    if not is_image:
        saliency = features.word_mask if features.word_saliency is None else features.word_saliency
        words = features.word_embeds * saliency[..., None]
        return [own[mask] for own, mask in zip(words, features.word_mask, strict=True)]
    if has_regions(model.config):
        return list(features.region_embeds)
    return list(cluster_means(features.patch_embeds))


def pooled_vectors(model: Any, features: Any) -> Tensor:
    """(n, d) vectors of unit length, one an image or caption."""
    if model.config.aligner == "vse++":
        return torch.cat(search_vectors(model, features))
    return normalize(features.pooler_output.float(), dim=-1)


def num_search_vectors(config: Any, contents: str) -> int:
    """K, or what is usual of captions."""
    if config.aligner == "vse++":
        return 1
    if contents == "captions":
        return USUAL_WORDS
    return config.num_regions if has_regions(config) else NUM_CLUSTERS


def has_regions(config: Any) -> bool:
    return config.aligner == "grm" and config.use_region_prompts


def cluster_means(patches: Tensor) -> Tensor:
    """(B, Lv, d) patches of unit length -> (B, K, d), K the smaller of 7 and Lv: spherical k-means, from evenly spaced
    patches, the same whenever it runs."""
    num_patches, num_clusters = patches.shape[1], min(NUM_CLUSTERS, patches.shape[1])
    means = patches[:, torch.linspace(0, num_patches - 1, num_clusters).round().long()].float()
    for _ in range(NUM_ROUNDS):
        nearest = (patches.float() @ means.transpose(1, 2)).argmax(2)
        members = torch.nn.functional.one_hot(nearest, num_clusters).to(means.dtype)
        sums = members.transpose(1, 2) @ patches.float()
        means = torch.where(members.sum(1)[..., None] > 0, normalize(sums, dim=-1), means)
    return means


class ItemEncoder:
    """Reads and encodes pictures or captions."""

    def __init__(self, model, processor, has_captions: bool):
        self.model, self.processor, self.has_captions = model, processor, has_captions
        self.read_image = read_image if getattr(processor.image_processor, "reads_pictures", True) else read_features

    def read(self, things: Sequence, number: int) -> Any:
        """One of them. Raises ValueError, or what a data set raises: it cannot be read."""
        thing = things[number]
        if not self.has_captions:
            return self.read_image(thing)
        if not isinstance(thing, str) or not thing.strip():
            raise ValueError(f"a caption must be a text of at least one word, got {thing!r}")
        return thing

    @torch.no_grad()
    def features(self, read: list) -> Any:
        if self.has_captions:
            return self.model.get_text_features(**self.processor(text=read, return_tensors="pt").to(self.model.device))
        return self.model.get_image_features(**self.processor(images=read, return_tensors="pt").to(self.model.device))

    def points(self, features: Any, items: Sequence[Item]) -> list[Point]:
        """Items with the vectors of their features, of unit length."""
        regions = [normalize(own.float(), dim=-1).cpu().numpy() for own in search_vectors(self.model, features)]
        return [Point(*one) for one in zip(items, regions, pooled_vectors(self.model, features).cpu().numpy(), strict=True)]
