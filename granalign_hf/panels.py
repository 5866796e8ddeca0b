# Copyright 2026 The granalign authors. Licensed under the Apache License, Version 2.0.
"""A sheet and the panels on it: where they stand, and what is drawn in them. Lengths in inches from the top left corner."""

from __future__ import annotations

import math
import os
import textwrap
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .modeling.maps import Box
from .overlays import heat_colours

DPI = 160
GAP, MARGIN, LINE_HEIGHT = 0.14, 0.18, 0.23
INK, FAINT, LINE = "#1f2328", "#6e7781", "#d0d7de"
_PANEL_SIDE, _MIN_CELL_WIDTH, _MIN_BAR_HEIGHT = 2.1, 1.8, 1.0  # the panel's longest side
_TITLE_HEIGHT = 0.28
_BAR_GAP, _BAR_WIDTH, _BAR_LABELS = 0.16, 0.11, 0.62

Rect = tuple[float, float, float, float]  # left, top, width, height


@dataclass(frozen=True)
class Layout:
    """Where the panels of a grid stand, below a caption and beside a colour bar."""

    panel_width: float
    panel_height: float
    columns: int
    rows: int
    caption_lines: list[str]

    @classmethod
    def of(cls, image_size: tuple[int, int], num_panels: int, caption: str, columns: int | None = None) -> Layout:
        longest = max(image_size)
        # Whole pixels, and at least one, so that panels are drawn pixel by pixel.
        width, height = (max(1, round(_PANEL_SIDE * DPI * side / longest)) / DPI for side in image_size)
        # Up to five columns: those that leave the fewest places empty.
        few = num_panels if num_panels <= 5 else min((4, 5, 3), key=lambda number: -num_panels % number)
        columns = few if columns is None else columns
        line_length = int(11 * (columns * max(width, _MIN_CELL_WIDTH) + _BAR_GAP + _BAR_LABELS))  # characters an inch
        return cls(width, height, columns, math.ceil(num_panels / columns), textwrap.wrap(caption, line_length))

    @property
    def cell_width(self) -> float:
        return max(self.panel_width, _MIN_CELL_WIDTH)

    @property
    def grid_top(self) -> float:
        return MARGIN + len(self.caption_lines) * LINE_HEIGHT + 0.06 + _TITLE_HEIGHT

    def panel(self, position: int) -> Rect:
        row, column = divmod(position, self.columns)
        top = self.grid_top + row * (self.panel_height + GAP + _TITLE_HEIGHT)
        return MARGIN + column * (self.cell_width + GAP), top, self.panel_width, self.panel_height

    @property
    def bar(self) -> Rect:
        left = MARGIN + self.columns * (self.cell_width + GAP) - GAP + _BAR_GAP
        _, top, _, height = self.panel(self.columns * self.rows - 1)
        return left, self.grid_top, _BAR_WIDTH, max(top + height - self.grid_top, _MIN_BAR_HEIGHT)

    @property
    def size(self) -> tuple[float, float]:
        """(width, height) of the sheet."""
        left, top, width, height = self.bar
        return left + width + _BAR_LABELS, top + height + MARGIN


class Sheet:
    """A white sheet on a canvas of its own: pyplot and its global state stay untouched.

    Raises:
        ImportError: matplotlib is not installed.
    """

    def __init__(self, width: float, height: float):
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('Figures need matplotlib: `pip install "granalign-hf[train]"`.') from error
        self.width, self.height = width, height
        self.canvas = FigureCanvasAgg(Figure(figsize=(width, height), dpi=DPI, facecolor="white"))

    def axes(self, place: Rect):
        left, top, width, height = place
        bottom = 1 - (top + height) / self.height
        return self.canvas.figure.add_axes((left / self.width, bottom, width / self.width, height / self.height))

    def text(self, left: float, top: float, lines: list[str], size: float = 12) -> None:
        style: dict = {"va": "top", "fontsize": size, "linespacing": 1.25, "color": INK, "parse_math": False}
        self.canvas.figure.text(left / self.width, 1 - top / self.height, "\n".join(lines), **style)

    def picture(self, path: str | os.PathLike | None) -> Image.Image:
        """The sheet as an RGB picture, written to `path` as PNG unless that is `None`."""
        self.canvas.draw()
        picture = Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())
        if path is not None:
            picture.save(path, format="PNG", dpi=(DPI, DPI))
        return picture


def enlarge(image: Image.Image, layout: Layout) -> tuple[Image.Image, tuple[float, float]]:
    """The picture at the size of a panel, and by how much it grew in width and height."""
    size = round(layout.panel_width * DPI), round(layout.panel_height * DPI)
    return image.resize(size, Image.Resampling.BICUBIC), (size[0] / image.width, size[1] / image.height)


def zoom_box(box: Box, zoom: tuple[float, float]) -> Box:
    return box[0] * zoom[0], box[1] * zoom[1], box[2] * zoom[0], box[3] * zoom[1]


def draw_panel(axes, picture: Image.Image, title: str, note: str, width: float) -> None:
    axes.imshow(np.asarray(picture), interpolation="nearest", aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(edgecolor=LINE, linewidth=0.6)
    length = int((width - (0.75 if note else 0)) / 0.092)  # a bold letter is about 0.092 inches wide
    title = title if len(title) <= length else title[: length - 1] + "…"
    above = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(title, (0, 1), (0, 4), fontsize=10, fontweight="bold", color=INK, parse_math=False, **above)
    axes.annotate(note, (0, 1), (72 * width, 4), fontsize=7.5, color=FAINT, ha="right", **above)


def mark_box(axes, box: Box) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box
    corner = x0 - 0.5, y0 - 0.5  # the centre of the first pixel is at 0
    axes.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor=INK, linewidth=0.9))


def draw_bar(axes, scale: tuple[float, float], label: str) -> None:
    low, high = scale
    high = high if high > low else low + 1e-6  # a bar of no height cannot be drawn
    ramp = heat_colours(np.linspace(0, 1, 256))[:, None] / 255
    axes.imshow(ramp, origin="lower", aspect="auto", extent=(0, 1, low, high))
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_ylabel(label, fontsize=8, color=FAINT)
    axes.tick_params(labelsize=7.5, length=2.5, width=0.6, color=FAINT, labelcolor=FAINT)
    axes.spines[:].set(edgecolor=LINE, linewidth=0.6)
