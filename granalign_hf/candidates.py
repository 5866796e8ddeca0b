"""Items as an engine takes them: what a model says of pictures or captions, and the few vectors that find candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from .engines import Item, Point
from .modeling.processing_granalign import read_image
from .modeling.region_features import read_features

CELLS = (2, 3)  # rows and columns; with the class token and the pooled vector 8 KB an image of width 512 in float16
USUAL_WORDS = 12  # of a caption


def search_vectors(model: Any, features: Any) -> list[Tensor]:
    """Of each image or caption its (K, d) vectors; those of captions and images meet by MaxSim.

    An image has its regions, where the aligner has some (GRM), and otherwise its class token, if that takes part, and the
    mean patch of each cell of 2 x 3. A caption has its words, times their saliency. With VSE++ both have the one vector
    that it compares, so that MaxSim is the score.
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
    return list(cell_means(features))


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
    return config.num_regions if has_regions(config) else CELLS[0] * CELLS[1] + 1


def has_regions(config: Any) -> bool:
    return config.aligner == "grm" and config.use_region_prompts


def cell_means(image: Any) -> Tensor:
    """(B, K, d): the first token before the patch grid, if there is one, and the mean patch of each cell.

    A grid of one column, such as that of boxes, is cut into as many parts from top to bottom.
    """
    rows, columns = image.spatial_shapes[0].tolist()
    num_prefix = image.patch_embeds.shape[1] - rows * columns
    grid = image.patch_embeds[:, num_prefix:].float().transpose(1, 2).unflatten(2, (rows, columns))
    wanted = CELLS if columns > 1 else (CELLS[0] * CELLS[1], 1)
    cells = adaptive_avg_pool2d(grid, (min(rows, wanted[0]), min(columns, wanted[1]))).flatten(2).transpose(1, 2)
    return torch.cat([image.patch_embeds[:, : min(num_prefix, 1)].float(), cells], dim=1)


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
