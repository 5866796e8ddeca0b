# Copyright 2026 The granalign authors. Licensed under the Apache License, Version 2.0.
"""Figures: heat maps of the words of a caption, a score taken apart, and why one pair ranks above another."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image

from .explanation import Comparison, Contribution, Explanation, Region
from .modeling.alignment import AlignedWord, Alignment
from .overlays import colour_scale, overlay, region_colour, region_overlay, saliency_overlay, write_overlays
from .panels import (
    FAINT,
    GAP,
    INK,
    LINE,
    LINE_HEIGHT,
    MARGIN,
    Layout,
    Sheet,
    draw_bar,
    draw_panel,
    enlarge,
    mark_box,
    zoom_box,
)

_CHART_HEIGHT = 1.35  # inches, of the bars
_ENTRY_HEIGHT = 0.3  # of a region's two lines
_DIFFERENCE_HEIGHT = 0.2
_FIRST, _SECOND = "#2f6db5", "#d9822b"
_SHARE_COLOURS = {
    "word → patch": "#2f6db5",
    "patch → word": "#9fc3ea",
    "word → region": "#5f8f3e",
    "region → word": "#bcdba3",
    "word and patch": "#2f6db5",
    "class token": "#9aa1a9",
}


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
    return _draw_figure(alignment, _words_to_show(alignment, words)).picture(path)


def explanation_figure(
    explanation: Explanation, path: str | os.PathLike | None = None, *, words: Sequence[AlignedWord] | None = None
) -> Image.Image:
    """A score taken apart: where it lies in the picture, as a whole and by word, and what each word contributes.

    For GRM the saliency of the patches and the regions too: which patches each owns, and of the heaviest its number, its
    weight, its share of the score, its mean variance, and the words nearest to it. A thin frame marks the largest share of
    a word. Bars show all words and special tokens.

    Args, returns and errors as in [`figure`].
    """
    return _draw_explanation(explanation, _words_to_show(explanation, words)).picture(path)


def comparison_figure(comparison: Comparison, path: str | os.PathLike | None = None, *, num_words: int = 12) -> Image.Image:
    """Why one pair ranks above another: where either score lies, on one scale, and the words that differ most.

    Args:
        num_words: how many words, at most. The others are summed up in one bar.

    Returns and errors as in [`figure`].
    """
    return _draw_comparison(comparison, num_words).picture(path)


def _words_to_show(alignment: Alignment, words: Sequence[AlignedWord] | None) -> list[AlignedWord]:
    words = alignment.content_words if words is None else list(words)
    if not words:
        raise ValueError(
            f"The caption {alignment.caption!r} has no content word to show. Pass `words=alignment.words` to show all."
        )
    return words


def _draw_figure(alignment: Alignment, words: Sequence[AlignedWord]) -> Sheet:
    layout = Layout.of(alignment.image.size, 1 + len(words), alignment.caption)
    sheet = Sheet(*layout.size)
    sheet.text(MARGIN, MARGIN, layout.caption_lines)
    picture, zoom = enlarge(alignment.image, layout)
    scale = colour_scale([word.map for word in words])
    draw_panel(sheet.axes(layout.panel(0)), picture, "picture", f"score {alignment.score:.2f}", layout.cell_width)
    for position, word in enumerate(words, start=1):
        axes = sheet.axes(layout.panel(position))
        heat = overlay(picture, word.map, scale=scale, area=zoom_box(alignment.area, zoom))
        note = "" if word.saliency is None else f"saliency {word.saliency:.2f}"
        draw_panel(axes, heat, word.text, note, layout.cell_width)
        mark_box(axes, zoom_box(word.box, zoom))
    draw_bar(sheet.axes(layout.bar), scale, "patch score")
    return sheet


def _draw_explanation(explanation: Explanation, words: Sequence[AlignedWord]) -> Sheet:
    num_overview = 2 + (explanation.patch_saliency is not None) + 2 * bool(explanation.regions)
    columns = max(num_overview, min(5, len(words)))
    first_word = columns  # the words begin a row of their own
    layout = Layout.of(explanation.image.size, first_word + len(words), explanation.caption, columns)
    width, height = layout.size
    # The words below the bars are turned: a letter takes about 0.045 inches of the height.
    labels = 0.25 + 0.045 * max(len(word.text) for word in explanation.tokens)
    sheet = Sheet(width, height + GAP + _CHART_HEIGHT + labels)
    sheet.text(MARGIN, MARGIN, layout.caption_lines)
    _draw_overview(sheet, layout, explanation)
    picture, zoom = enlarge(explanation.image, layout)
    area, shares = zoom_box(explanation.area, zoom), dict(explanation.word_shares)
    maps = {word: explanation.share_maps[explanation.tokens.index(word)] for word in words}
    scale = colour_scale(list(maps.values()))
    for position, word in enumerate(words, start=first_word):
        axes = sheet.axes(layout.panel(position))
        heat = overlay(picture, maps[word], scale=scale, area=area)
        draw_panel(axes, heat, word.text, _signed(shares[word]), layout.cell_width)
        patches = explanation.top_places(word, "patch")
        if patches and patches[0][0].box is not None:
            mark_box(axes, zoom_box(patches[0][0].box, zoom))
    draw_bar(sheet.axes(layout.bar), scale, "share of the score")
    left, chart_width = MARGIN + 0.4, layout.bar[0] - MARGIN - 0.4
    _draw_word_shares(sheet.axes((left, height + GAP, chart_width, _CHART_HEIGHT)), explanation)
    return sheet


def _draw_overview(sheet: Sheet, layout: Layout, explanation: Explanation) -> None:
    """The panels of the first row, which have scales of their own."""
    picture, zoom = enlarge(explanation.image, layout)
    area = zoom_box(explanation.area, zoom)
    on_patches = explanation.share_map.sum().item()
    panels = [
        (picture, "picture", f"score {explanation.score:.3f}"),
        (overlay(picture, explanation.share_map, area=area), "all shares", f"{on_patches:.3f} on patches"),
    ]
    saliency = explanation.patch_saliency
    if saliency is not None:
        note = f"{saliency.min():.2f} to {saliency.max():.2f}"
        panels.append((saliency_overlay(picture, saliency, area=area), "saliency", note))
    if explanation.region_owners is not None:
        heat = region_overlay(picture, explanation.region_owners, area=area)
        panels.append((heat, "regions", f"{len(explanation.regions)} in the mixture"))
        left, top, _, height = layout.panel(len(panels))
        axes = sheet.axes((left, top, layout.cell_width, height))
        axes.set(xlim=(0, layout.cell_width), ylim=(height, 0))
        _draw_regions(axes, explanation.regions, height)
    for position, (heat, title, note) in enumerate(panels):
        draw_panel(sheet.axes(layout.panel(position)), heat, title, note, layout.cell_width)


def _draw_regions(axes, regions: Sequence[Region], height: float) -> None:
    """The heaviest regions, two lines each: as many as fit. The axes count in inches."""
    from matplotlib.patches import Rectangle

    axes.axis("off")
    style: dict = {"fontsize": 7.5, "va": "center", "parse_math": False}
    heaviest = sorted(regions, key=lambda region: -region.weight)[: max(int(height / _ENTRY_HEIGHT), 1)]
    for row, region in enumerate(heaviest):
        top = row * _ENTRY_HEIGHT
        colour = tuple(channel / 255 for channel in region_colour(region.index))
        axes.add_patch(Rectangle((0, top + 0.03), 0.12, 0.24, facecolor=colour, edgecolor=LINE, linewidth=0.6))
        near = ", ".join(f"{word.text} {cosine:.2f}" for word, cosine in region.words[:2])
        figures = f"{region.index}:  π {region.weight:.2f}  share {region.share:.3f}"
        figures += "" if region.variance is None else f"  σ² {region.variance:.2g}"
        axes.text(0.2, top + 0.09, near, color=INK, **style)
        axes.text(0.2, top + 0.22, figures, color=FAINT, **style)


def _draw_word_shares(axes, explanation: Explanation) -> None:
    """One bar for each word and special token, in the order of the caption, stacked by what it is matched with."""
    columns = {word: column for column, word in enumerate(explanation.tokens)}
    heights: dict[str, np.ndarray] = {}
    for contribution in explanation.contributions:
        of_words = heights.setdefault(_kind_of(contribution), np.zeros(len(columns)))
        of_words[columns[contribution.word]] += contribution.share
    above, below = np.zeros(len(columns)), np.zeros(len(columns))
    for kind in sorted(heights, key=list(_SHARE_COLOURS).index):
        height = heights[kind]
        bottom = np.where(height >= 0, above, below)
        axes.bar(range(len(columns)), height, 0.68, bottom=bottom, color=_SHARE_COLOURS[kind], label=kind)
        above, below = above + height.clip(min=0), below + height.clip(max=0)
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_xticks(range(len(columns)), [word.text for word in columns], rotation=35, ha="right", rotation_mode="anchor")
    for label, word in zip(axes.get_xticklabels(), columns, strict=True):
        colour, weight = (INK, "bold") if word.is_content else (FAINT, "normal")
        label.set(parse_math=False, color=colour, fontweight=weight)
    axes.set_title("share of each word", loc="left", fontsize=10, fontweight="bold", color=INK, pad=4)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=6, frameon=False, fontsize=7.5, handlelength=1, borderpad=0)
    _thin(axes)


def _kind_of(contribution: Contribution) -> str:
    place = contribution.place.kind
    if place == "prefix":
        return "class token"
    return {"t2i": f"word → {place}", "i2t": f"{place} → word", "both": "word and patch"}[contribution.direction]


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _draw_comparison(comparison: Comparison, num_words: int) -> Sheet:
    pairs = (comparison.first, comparison.second)
    bars = comparison.words[:num_words]
    rest = comparison.words[num_words:]
    if rest:
        bars.append((f"{len(rest)} more", sum(first for _, first, _ in rest), sum(second for *_, second in rest)))
    layouts = [Layout.of(pair.image.size, 1, "", 1) for pair in pairs]
    cell, line_length = max(layout.cell_width for layout in layouts) + 0.9, 34
    captions = [textwrap.wrap(pair.caption, line_length) for pair in pairs]
    top = MARGIN + max(map(len, captions)) * LINE_HEIGHT + 0.34
    bottom = top + max(layout.panel_height for layout in layouts) + 0.5
    width = 2 * MARGIN + 2 * cell + GAP + 0.85
    sheet = Sheet(width, bottom + len(bars) * _DIFFERENCE_HEIGHT + 0.5)
    scale = colour_scale([pair.share_map for pair in pairs])
    for number, (pair, layout, caption) in enumerate(zip(pairs, layouts, captions, strict=True)):
        left = MARGIN + number * (cell + GAP)
        sheet.text(left, MARGIN, caption, size=11)
        picture, zoom = enlarge(pair.image, layout)
        heat = overlay(picture, pair.share_map, scale=scale, area=zoom_box(pair.area, zoom))
        axes = sheet.axes((left, top, layout.panel_width, layout.panel_height))
        draw_panel(axes, heat, "AB"[number], f"score {pair.score:.3f}", layout.cell_width)
    draw_bar(sheet.axes((width - 0.75, top, 0.11, bottom - 0.5 - top)), scale, "share of the score")
    labels = 1.1
    axes = sheet.axes((MARGIN + labels, bottom, width - 2 * MARGIN - labels, len(bars) * _DIFFERENCE_HEIGHT))
    _draw_differences(axes, bars, comparison.score)
    return sheet


def _draw_differences(axes, bars: list[tuple[str, float, float]], score: float) -> None:
    differences = np.array([first - second for _, first, second in bars])
    rows = range(len(bars))
    axes.barh(rows, differences, 0.68, color=np.where(differences >= 0, _FIRST, _SECOND))
    axes.axvline(0, color=INK, linewidth=0.6)
    axes.set(ylim=(len(bars) - 0.5, -0.5))
    axes.set_yticks(rows, [text for text, *_ in bars])
    for label in axes.get_yticklabels():
        label.set(parse_math=False, color=INK)
    low, high = min(differences.min(), 0.0), max(differences.max(), 0.0)
    notes = 0.6 * (high - low or 1.0)  # beside the longest bar
    axes.set_xlim(low - (notes if low < 0 else 0), high + (notes if high > 0 else 0))
    for row, (difference, (_, first, second)) in enumerate(zip(differences, bars, strict=True)):
        side = 1 if difference >= 0 else -1
        note = f"{_signed(difference)}   (A {_signed(first)}, B {_signed(second)})"
        axes.annotate(
            note,
            (difference, row),
            (4 * side, 0),
            textcoords="offset points",
            fontsize=7,
            color=FAINT,
            va="center",
            ha="left" if side > 0 else "right",
        )
    axes.set_title(f"A − B = {_signed(score)}, by word", loc="left", fontsize=10, fontweight="bold", color=INK, pad=5)
    _thin(axes)


def _thin(axes) -> None:
    axes.tick_params(labelsize=7.5, length=2.5, width=0.6, color=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=LINE, linewidth=0.6)


__all__ = [
    "colour_scale",
    "comparison_figure",
    "explanation_figure",
    "figure",
    "overlay",
    "region_colour",
    "region_overlay",
    "saliency_overlay",
    "write_overlays",
]
