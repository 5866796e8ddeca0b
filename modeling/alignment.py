# Copyright 2026 The granalign authors. Licensed under the Apache License, Version 2.0.
"""One picture and one caption, word by word: where each word landed.

A box is (x0, y0, x1, y1) in pixels, end exclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from .maps import Box, location_density, on_grid, patch_box, visible_area, word_maps
from .processing_granalign import read_image
from .words import Word, check_caption, merge_pieces, words_within


@dataclass(frozen=True, eq=False)
class AlignedWord(Word):
    """A word and where it landed.

    Attributes:
        saliency: mean saliency of its pieces in [0, 1]; `None` for aligners without saliency.
        map: (rows, columns) of the patch grid, see [`word_maps`]; the mean over the word's pieces.
        box: the patch with the highest score, in pixels of the original picture.
    """

    saliency: float | None
    map: Tensor = field(repr=False)
    box: Box


@dataclass(frozen=True, eq=False)
class Alignment:
    """One picture and one caption, word by word.

    Attributes:
        image: the picture, RGB and upright, in its original size. caption: the sentence.
        score: the score that ranks.
        words: all words in the order of the caption; special tokens are left out, and so is what truncation cut off.
        patch_saliency: (rows, columns) in [0, 1]; `None` for aligners without saliency.
        area: the part of the picture that the model saw, as a box, and that the patch grid divides evenly. A processor
            that crops sees less than the picture.
    """

    image: Image.Image
    caption: str
    score: float
    words: list[AlignedWord]
    patch_saliency: Tensor | None
    area: Box

    @property
    def content_words(self) -> list[AlignedWord]:
        return [word for word in self.words if word.is_content]

    def phrase_map(self, start: int, end: int) -> Tensor:
        """(rows, columns): the mean map of the content words that touch the characters `caption[start:end]`.

        Of all words there, if none has content.

        Raises:
            ValueError: no word touches the span.
        """
        words = words_within(self.words, start, end)
        if not words:
            raise ValueError(
                f"`start` and `end` must span at least a part of a word of {self.caption!r}, got {start} and {end}: "
                f"{self.caption[start:end]!r}. Words that truncation cut off have no map."
            )
        return torch.stack([word.map for word in words]).mean(0)

    def phrase_point(self, start: int, end: int) -> tuple[float, float]:
        """Where a phrase is, (x, y) in pixels of the original picture: the centre of the patch with the highest density.

        See [`location_density`]. Of a patch that the picture does not fill, the centre of what it does. Arguments and
        errors as of [`~Alignment.phrase_map`].
        """
        density = location_density(self.phrase_map(start, end), self.caption_map)
        rows, columns = density.shape
        row, column = divmod(int(density.argmax()), columns)
        left, top, right, bottom = patch_box(row, column, (rows, columns), self.area, self.image.size)
        return (left + right) / 2, (top + bottom) / 2

    @property
    def caption_map(self) -> Tensor:
        """(rows, columns): the map of the whole caption as one phrase."""
        return self.phrase_map(0, len(self.caption))


@dataclass(frozen=True, eq=False)
class SeenImage:
    """A picture as the model sees it: features of one image, and the part of the picture that they cover."""

    picture: Image.Image
    features: Any
    area: Box


@dataclass(frozen=True, eq=False)
class ReadCaption:
    """A caption as the model reads it: features of one caption, its words, and the (start, end) and id of its tokens."""

    caption: str
    features: Any
    words: list[Word]
    offsets: list[list[int]]
    input_ids: list[int]


def align(model, processor, image: Any, caption: str) -> Alignment:
    r"""
    Align one picture and one caption, with any aligner.

    Args:
        model: a [`GranAlignModel`] in evaluation mode. processor: its [`GranAlignProcessor`].
        image: a PIL image, the path of an image file or an array of bytes, read as the processor reads it.
        caption: a sentence.

    Raises:
        ValueError: the image cannot be read, the caption is empty or no string, the tokenizer is not a fast one, or
            the model is in training mode or takes features of regions.

    Example:

    ```python
    >>> from granalign_hf.explanation import align
    >>> from granalign_hf.figure import figure

    >>> alignment = align(model, processor, "dog.jpg", "a dog catches a red ball")
    >>> [(word.text, word.box) for word in alignment.content_words]
    [('dog', (64.0, 96.0, 96.0, 128.0)), ...]
    >>> figure(alignment, "dog.png")
    ```
    """
    read = read_caption(model, processor, caption)
    seen = see_image(model, processor, image)
    with torch.no_grad():
        score = model.score(seen.features, read.features).item()
    words = align_words(model, seen, read, read.words)
    return Alignment(seen.picture, caption, score, words, saliency_map(seen), seen.area)


@torch.no_grad()
def see_image(model, processor, image: Any) -> SeenImage:
    """Raises ValueError as [`align`] does."""
    picture, inputs, area = prepare_image(model, processor, image)
    return SeenImage(picture, model.get_image_features(**inputs.to(model.device)), area)


def prepare_image(model, processor, image: Any) -> tuple[Image.Image, BatchFeature, Box]:
    """The picture, what the vision encoder takes, and the part of the picture in it. Raises ValueError as [`align`] does."""
    if model.training:
        raise ValueError("`model` is in training mode, where scores are drawn at random. Call `model.eval()` first.")
    if not getattr(processor.image_processor, "reads_pictures", True):
        raise ValueError(
            "`model` takes features of regions, which cannot be shown on a picture. Use `model.explain` or `word_maps`."
        )
    picture = read_image(image)
    inputs = processor(images=picture, return_tensors="pt")
    return picture, inputs, visible_area(processor.image_processor, picture.size, inputs["pixel_values"].shape[-2:])


@torch.no_grad()
def read_caption(model, processor, caption: str) -> ReadCaption:
    """Raises ValueError as [`align`] does."""
    inputs, offsets = prepare_caption(processor, caption)
    features = model.get_text_features(**inputs.to(model.device))
    return ReadCaption(caption, features, merge_pieces(caption, offsets), offsets, inputs["input_ids"].flatten().tolist())


def prepare_caption(processor, caption: str) -> tuple[BatchFeature, list[list[int]]]:
    """What the text encoder takes, and the (start, end) of each token. Raises ValueError as [`align`] does."""
    check_caption(caption, processor.tokenizer)
    inputs = processor(text=caption, return_offsets_mapping=True, return_tensors="pt")
    return inputs, inputs.pop("offset_mapping").reshape(-1, 2).tolist()


def align_words(model, seen: SeenImage, read: ReadCaption, words: Sequence[Word]) -> list[AlignedWord]:
    """Each word with its map, its saliency and its best patch."""
    maps = word_maps((seen.features, read.features), level_weights=model.aligner.level_weights).cpu()
    saliency = read.features.word_saliency
    return [_align_word(word, maps, saliency, seen.area, seen.picture.size) for word in words]


def saliency_map(seen: SeenImage) -> Tensor | None:
    """(rows, columns) of the patches in [0, 1]; `None` for aligners without saliency."""
    saliency = seen.features.patch_saliency
    return None if saliency is None else grid_map(seen, saliency[0])


def grid_map(seen: SeenImage, values: Tensor) -> Tensor:
    """(Lv, ...) values of the patch tokens -> (rows, columns, ...) of those on the grid."""
    rows, columns = seen.features.spatial_shapes[0].tolist()
    values = values.float().to(seen.features.patch_mask.device)
    return on_grid(seen.features, values, 0, rows * columns).unflatten(0, (rows, columns)).cpu()


def _align_word(word: Word, maps: Tensor, word_saliency: Tensor | None, area: Box, size: tuple) -> AlignedWord:
    tokens = list(word.tokens)
    word_map = maps[tokens].mean(0)
    rows, columns = word_map.shape
    row, column = divmod(int(word_map.argmax()), columns)
    saliency = None if word_saliency is None else word_saliency[0, tokens].float().mean().item()
    box = patch_box(row, column, (rows, columns), area, size)
    own = {field.name: getattr(word, field.name) for field in fields(word)}
    return AlignedWord(**own, saliency=saliency, map=word_map, box=box)
