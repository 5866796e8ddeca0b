# Copyright 2026 The granalign authors. Licensed under the Apache License, Version 2.0.
"""Heat maps over a picture, on a colour scale that several may share, and regions in colours of their own."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from .modeling.alignment import AlignedWord, Alignment
from .modeling.maps import Box, picture_map

# Cold to hot, at equal steps; cold is white, so that paper and picture show through.
_HEAT_COLOURS = np.array(
    [(255, 255, 255), (255, 237, 170), (254, 196, 90), (246, 130, 46), (214, 48, 49), (128, 10, 62)], dtype=np.float64
)
_REGION_COLOURS = [
    (141, 179, 226),
    (250, 190, 110),
    (150, 208, 150),
    (236, 150, 150),
    (190, 168, 222),
    (205, 172, 148),
    (240, 176, 216),
    (190, 190, 190),
    (214, 214, 120),
    (130, 210, 220),
]
_PICTURE_CONTRAST = 0.4  # the picture below the heat is pale and grey: colour means heat and nothing else
_UNSEEN_CONTRAST = 0.15


def colour_scale(maps: Sequence[Tensor]) -> tuple[float, float]:
    """The (lowest, highest) score of one colour scale for several maps.

    Scores below 0 speak against a word and are as cold as 0, unless no map has any above.
    """
    low, high = min(float(word_map.min()) for word_map in maps), max(float(word_map.max()) for word_map in maps)
    return (max(low, 0.0), high) if high > 0 else (low, high)


def overlay(
    image: Image.Image, word_map: Tensor, *, scale: tuple[float, float] | None = None, area: Box | None = None
) -> Image.Image:
    """A heat map over the pale, grey picture.

    The map is enlarged bilinearly, for display only: the centre of each patch has the patch's own colour.

    Args:
        image: the picture in its original proportions. word_map: (rows, columns).
        scale: scores that are white and dark red, to be shared by pictures that are compared. `None`: that of
            [`colour_scale`] for this map alone.
        area: the part of the picture that the map covers (`Alignment.area`). `None`: all of it. The rest fades.

    Returns:
        An RGB picture of the size of `image`.

    Raises:
        ValueError: the map is not a finite matrix, or the scale or the area ends before it begins.
    """
    heat = picture_map(word_map, image.size, area).numpy()
    low, high = colour_scale([word_map]) if scale is None else scale
    if low > high:
        raise ValueError(f"`scale` must be ascending, got {(low, high)}.")
    position = (heat - low) / (high - low) if high > low else np.where(np.isnan(heat), np.nan, 0.0)
    return _on_paper(image, heat_colours(position))


def saliency_overlay(image: Image.Image, saliency: Tensor, *, area: Box | None = None) -> Image.Image:
    """The picture where its patches are salient, fading to white where they are not.

    Args and errors as in [`overlay`]. saliency: (rows, columns) in [0, 1].
    """
    strength = np.nan_to_num(picture_map(saliency, image.size, area).numpy())[..., None].clip(0, 1)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    return Image.fromarray((255 + strength * (pixels - 255)).round().astype(np.uint8))


def region_overlay(image: Image.Image, owners: Tensor, *, area: Box | None = None) -> Image.Image:
    """Which region owns each patch, in the colours of [`region_colour`] over the pale, grey picture.

    Args and errors as in [`overlay`]. owners: (rows, columns), the number of the region of each patch.
    """
    owner = picture_map(owners, image.size, area, is_smooth=False).numpy()
    colours = np.array([region_colour(number) for number in range(int(owners.max()) + 1)], dtype=np.float64)
    is_seen = ~np.isnan(owner)
    tint = colours[np.where(is_seen, owner, 0).astype(int)]
    return _on_paper(image, np.where(is_seen[..., None], tint, np.nan))


def region_colour(number: int) -> tuple[int, int, int]:
    """The RGB colour of a region, alike in every figure; after ten they come again."""
    return _REGION_COLOURS[number % len(_REGION_COLOURS)]


def write_overlays(
    alignment: Alignment, folder: str | os.PathLike, *, words: Sequence[AlignedWord] | None = None
) -> list[Path]:
    """One PNG of the picture's size for each word, all on one colour scale: `01-red.png`, `02-dog.png`, ...

    Args:
        folder: where to write them; made if it is missing. words: those to show. `None`: the content words.

    Returns:
        The files, in the order of the words.
    """
    words = alignment.content_words if words is None else list(words)
    Path(folder).mkdir(parents=True, exist_ok=True)
    files = []
    for number, word in enumerate(words, start=1):
        name = re.sub(r"[^\w-]", "", word.text.lower()) or "word"
        files.append(Path(folder) / f"{number:02d}-{name}.png")
        scale = colour_scale([other.map for other in words])
        overlay(alignment.image, word.map, scale=scale, area=alignment.area).save(files[-1])
    return files


def _on_paper(image: Image.Image, colours: np.ndarray) -> Image.Image:
    """(height, width, 3) colours in 0..255 over the pale, grey picture; NaN: not seen, almost white."""
    is_seen = ~np.isnan(colours[..., 0])
    colours = np.where(is_seen[..., None], colours, 255.0)
    paper = 1 - np.where(is_seen, _PICTURE_CONTRAST, _UNSEEN_CONTRAST) * _darkness(image)
    return Image.fromarray((colours * paper[..., None]).round().astype(np.uint8))


def _darkness(image: Image.Image) -> np.ndarray:
    """(height, width) in 0..1. Half of it is the darkest channel: in luminance alone, yellow would vanish on white."""
    luminance = np.asarray(image.convert("L"), dtype=np.float64)
    return 1 - (luminance + np.asarray(image.convert("RGB")).min(axis=-1)) / (2 * 255)


def heat_colours(position: np.ndarray) -> np.ndarray:
    """Positions in 0..1 (clipped) -> RGB in 0..255, one axis more; NaN stays."""
    steps = np.linspace(0, 1, len(_HEAT_COLOURS))
    return np.stack([np.interp(position, steps, channel) for channel in _HEAT_COLOURS.T], axis=-1)
