# Copyright 2026 The granalign authors. Licensed under the Apache License, Version 2.0.
"""Pictures of an alignment: heat maps over the photograph, and a figure with one map for each content word."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .explanation import AlignedWord, Alignment, Box

# Cold to hot, at equal steps; cold is white, so that paper and picture show through.
_HEAT_COLOURS = np.array(
    [(255, 255, 255), (255, 237, 170), (254, 196, 90), (246, 130, 46), (214, 48, 49), (128, 10, 62)], dtype=np.float64
)
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
    if word_map.ndim != 2 or word_map.numel() == 0 or not bool(torch.isfinite(word_map).all()):
        raise ValueError(
            f"`word_map` must be finite and of shape (rows, columns), got {tuple(word_map.shape)} with values from "
            f"{word_map.min() if word_map.numel() else None} to {word_map.max() if word_map.numel() else None}."
        )
    low, high = colour_scale([word_map]) if scale is None else scale
    x0, y0, x1, y1 = (0.0, 0.0, *map(float, image.size)) if area is None else area
    if low > high or x0 >= x1 or y0 >= y1:
        raise ValueError(f"`scale` and `area` must be ascending, got {(low, high)} and {(x0, y0, x1, y1)}.")
    x = (torch.arange(image.width) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(image.height) + 0.5 - y0) / (y1 - y0) * 2 - 1
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    heat = torch.nn.functional.grid_sample(
        word_map.detach().float().cpu()[None, None], points[None], padding_mode="border", align_corners=False
    )[0, 0]
    is_seen = (points.abs() <= 1).all(-1).numpy()
    position = (heat.numpy() - low) / (high - low) if high > low else np.zeros(heat.shape)
    colours = np.where(is_seen[..., None], _heat_colours(position), 255.0)
    paper = 1 - np.where(is_seen, _PICTURE_CONTRAST, _UNSEEN_CONTRAST) * _darkness(image)
    return Image.fromarray((colours * paper[..., None]).round().astype(np.uint8))


def _darkness(image: Image.Image) -> np.ndarray:
    """(height, width) in 0..1. Half of it is the darkest channel: in luminance alone, yellow would vanish on white."""
    luminance = np.asarray(image.convert("L"), dtype=np.float64)
    return 1 - (luminance + np.asarray(image.convert("RGB")).min(axis=-1)) / (2 * 255)


def _heat_colours(position: np.ndarray) -> np.ndarray:
    """Positions in 0..1 (clipped) -> RGB in 0..255, one axis more."""
    steps = np.linspace(0, 1, len(_HEAT_COLOURS))
    return np.stack([np.interp(position, steps, channel) for channel in _HEAT_COLOURS.T], axis=-1)


_DPI = 160
_PANEL_SIDE, _MIN_CELL_WIDTH, _MIN_BAR_HEIGHT = 2.1, 1.8, 1.0  # inches, as all lengths here; the panel's longest side
_GAP, _MARGIN, _TITLE_HEIGHT, _LINE_HEIGHT = 0.14, 0.18, 0.28, 0.23
_BAR_GAP, _BAR_WIDTH, _BAR_LABELS = 0.16, 0.11, 0.62
_INK, _FAINT, _LINE = "#1f2328", "#6e7781", "#d0d7de"


def figure(
    alignment: Alignment, path: str | os.PathLike | None = None, *, words: Sequence[AlignedWord] | None = None
) -> Image.Image:
    """The picture, its caption, and one heat map for each content word, all on one colour scale.

    A thin frame marks the patch with the highest score.

    Args:
        path: where to write the figure as PNG. words: those to show. `None`: the content words.

    Returns:
        The figure as an RGB picture.

    Raises:
        ValueError: there is no word to show.
        ImportError: matplotlib is not installed.
    """
    words = alignment.content_words if words is None else list(words)
    if not words:
        raise ValueError(
            f"The caption {alignment.caption!r} has no content word to show. Pass `words=alignment.words` to show all."
        )
    canvas = _draw_figure(alignment, words)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    if path is not None:
        picture.save(path, format="PNG", dpi=(_DPI, _DPI))
    return picture


@dataclass(frozen=True)
class _Layout:
    """Where things stand, in inches from the top left corner; a place is (left, top, width, height)."""

    panel_width: float
    panel_height: float
    columns: int
    rows: int
    caption_lines: list[str]

    @classmethod
    def of(cls, image_size: tuple[int, int], num_panels: int, caption: str) -> _Layout:
        longest = max(image_size)
        # Whole pixels, and at least one, so that panels are drawn pixel by pixel.
        width, height = (max(1, round(_PANEL_SIDE * _DPI * side / longest)) / _DPI for side in image_size)
        # Up to five columns: those that leave the fewest places empty.
        columns = num_panels if num_panels <= 5 else min((4, 5, 3), key=lambda number: -num_panels % number)
        line_length = int(11 * (columns * max(width, _MIN_CELL_WIDTH) + _BAR_GAP + _BAR_LABELS))  # characters an inch
        return cls(width, height, columns, math.ceil(num_panels / columns), textwrap.wrap(caption, line_length))

    @property
    def cell_width(self) -> float:
        return max(self.panel_width, _MIN_CELL_WIDTH)

    @property
    def grid_top(self) -> float:
        return _MARGIN + len(self.caption_lines) * _LINE_HEIGHT + 0.06 + _TITLE_HEIGHT

    def panel(self, position: int) -> tuple[float, float, float, float]:
        row, column = divmod(position, self.columns)
        top = self.grid_top + row * (self.panel_height + _GAP + _TITLE_HEIGHT)
        return _MARGIN + column * (self.cell_width + _GAP), top, self.panel_width, self.panel_height

    @property
    def bar(self) -> tuple[float, float, float, float]:
        left = _MARGIN + self.columns * (self.cell_width + _GAP) - _GAP + _BAR_GAP
        _, top, _, height = self.panel(self.columns * self.rows - 1)
        return left, self.grid_top, _BAR_WIDTH, max(top + height - self.grid_top, _MIN_BAR_HEIGHT)

    @property
    def sheet(self) -> tuple[float, float]:
        left, top, width, height = self.bar
        return left + width + _BAR_LABELS, top + height + _MARGIN


def _draw_figure(alignment: Alignment, words: Sequence[AlignedWord]):
    """The figure on a canvas of its own: pyplot and its global state stay untouched."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: `pip install "granalign-hf[train]"`.') from error
    layout = _Layout.of(alignment.image.size, 1 + len(words), alignment.caption)
    width, height = layout.sheet
    canvas = FigureCanvasAgg(Figure(figsize=(width, height), dpi=_DPI, facecolor="white"))

    def add_axes(place: tuple[float, float, float, float]):
        left, top, w, h = place
        return canvas.figure.add_axes((left / width, 1 - (top + h) / height, w / width, h / height))

    style: dict = {"va": "top", "fontsize": 12, "linespacing": 1.25, "color": _INK, "parse_math": False}
    canvas.figure.text(_MARGIN / width, 1 - _MARGIN / height, "\n".join(layout.caption_lines), **style)
    picture, zoom = _enlarge(alignment.image, layout)
    scale = colour_scale([word.map for word in words])
    _draw_panel(add_axes(layout.panel(0)), picture, "picture", f"score {alignment.score:.2f}", layout.cell_width)
    for position, word in enumerate(words, start=1):
        axes = add_axes(layout.panel(position))
        heat = overlay(picture, word.map, scale=scale, area=_zoom_box(alignment.area, zoom))
        note = "" if word.saliency is None else f"saliency {word.saliency:.2f}"
        _draw_panel(axes, heat, word.text, note, layout.cell_width)
        _mark_box(axes, _zoom_box(word.box, zoom))
    _draw_bar(add_axes(layout.bar), scale)
    return canvas


def _enlarge(image: Image.Image, layout: _Layout) -> tuple[Image.Image, tuple[float, float]]:
    """The picture at the size of a panel, and by how much it grew in width and height."""
    size = round(layout.panel_width * _DPI), round(layout.panel_height * _DPI)
    return image.resize(size, Image.Resampling.BICUBIC), (size[0] / image.width, size[1] / image.height)


def _zoom_box(box: Box, zoom: tuple[float, float]) -> Box:
    return box[0] * zoom[0], box[1] * zoom[1], box[2] * zoom[0], box[3] * zoom[1]


def _draw_panel(axes, picture: Image.Image, title: str, note: str, width: float) -> None:
    axes.imshow(np.asarray(picture), interpolation="nearest", aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(edgecolor=_LINE, linewidth=0.6)
    length = int((width - (0.75 if note else 0)) / 0.092)  # a bold letter is about 0.092 inches wide
    title = title if len(title) <= length else title[: length - 1] + "…"
    above = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(title, (0, 1), (0, 4), fontsize=10, fontweight="bold", color=_INK, parse_math=False, **above)
    axes.annotate(note, (0, 1), (72 * width, 4), fontsize=7.5, color=_FAINT, ha="right", **above)


def _mark_box(axes, box: Box) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box
    corner = x0 - 0.5, y0 - 0.5  # the centre of the first pixel is at 0
    axes.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor=_INK, linewidth=0.9))


def _draw_bar(axes, scale: tuple[float, float]) -> None:
    low, high = scale
    high = high if high > low else low + 1e-6  # a bar of no height cannot be drawn
    ramp = _heat_colours(np.linspace(0, 1, 256))[:, None] / 255
    axes.imshow(ramp, origin="lower", aspect="auto", extent=(0, 1, low, high))
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_ylabel("patch score", fontsize=8, color=_FAINT)
    axes.tick_params(labelsize=7.5, length=2.5, width=0.6, color=_FAINT, labelcolor=_FAINT)
    axes.spines[:].set(edgecolor=_LINE, linewidth=0.6)
