"""Draws a run, a comparison of runs, and what they do as a condition changes.

    python training/plot.py RUN

draws the curves of a run again from its metrics.json, which training writes at each validation, into `learning_curve.png`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Dashes of several kinds, so that curves that coincide are all seen.
_LINES: tuple[tuple[str, Any], ...] = (
    ("#1f5fa8", "-"),
    ("#d9731a", "--"),
    ("#2f8f5b", ":"),
    ("#8a5aa8", "-."),
    ("#c23b3b", (0, (1, 4))),
)
# Title -> the curves of a panel, as label -> where an epoch's record has the value. What no epoch has is left out.
_PANELS: dict[str, dict[str, tuple[str, ...]]] = {
    "training loss": {
        "total": ("loss",),
        "original": ("contrastive_original",),
        "key": ("contrastive_key",),
        "uncertain": ("contrastive_uncertain",),
    },
    "regularisers, without weights": {
        "reconstruction": ("reconstruction",),
        "KL": ("kl",),
        "entropy": ("entropy",),
        "patch budget": ("budget",),
    },
    "validation rSum": {"rSum": ("validation", "rsum")},
    "validation R@1 (%)": {
        "image to text": ("validation", "image_to_text_r1"),
        "text to image": ("validation", "text_to_image_r1"),
    },
    "mean saliency, validation": {
        "patches": ("diagnostics", "patch_saliency_mean"),
        "words": ("diagnostics", "word_saliency_mean"),
    },
    "regions, validation": {
        "mean cosine of regions": ("diagnostics", "region_mean_cosine"),
        "share in use": ("diagnostics", "distinct_regions"),
    },
    "norm of the gradient": {"mean of the epoch": ("grad_norm",)},
    "learning rate": {"new layers": ("learning_rates", "new_layers"), "encoders": ("learning_rates", "encoders")},
}
_SHARES = ("mean saliency, validation", "regions, validation")  # in 0..1, and a flat line is to be seen as one
_LOGARITHMIC = ("regularisers, without weights", "learning rate")
_FROM_ZERO = ("training loss", "norm of the gradient")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="plot.py", description="Draws the curves of a run.")
    parser.add_argument("run", metavar="RUN", type=Path, help="Folder with the metrics.json of a run.")
    folder = parser.parse_args(argv).run
    if not (folder / "metrics.json").is_file():
        parser.error(f"{folder} has no metrics.json; training writes it at the first validation")
    plot_history(json.loads((folder / "metrics.json").read_text())["history"], folder / "learning_curve.png")
    print(folder / "learning_curve.png")


def plot_history(history: list[dict], path: Path) -> None:
    """Writes the curves of a run as a picture: loss terms, validation, saliency, regions, gradient and learning rates.

    Args:
        history: the records of metrics.json, one an epoch.
    """
    panels = {
        title: {label: _curve(history, keys) for label, keys in curves.items() if _curve(history, keys)[0]}
        for title, curves in _PANELS.items()
    }
    panels["learning rate"] |= _rates_by_layer(history)
    panels = {title: curves for title, curves in panels.items() if curves}
    columns = len(panels) if len(panels) <= 3 else (len(panels) + 1) // 2
    rows = 1 if len(panels) <= 3 else 2
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        _draw_panel(axis, title, curves)
        axis.set_xlim(0.5, len(history) + 0.5)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


def _curve(history: list[dict], keys: tuple[str, ...]) -> tuple[list[int], list[float]]:
    """(epochs, values) of those epochs that have the value."""
    points = []
    for record in history:
        value: Any = record
        for key in keys:
            value = value.get(key, {})
        if value != {}:
            points.append((record["epoch"], value))
    return [epoch for epoch, _ in points], [value for _, value in points]


def _rates_by_layer(history: list[dict]) -> dict[str, tuple[list[int], list[float]]]:
    """Of each encoder the highest and the lowest rate, where its layers have rates of their own."""
    curves = {}
    for side in ("vision", "text"):
        depths = sorted(
            int(name.removeprefix(f"{side}_"))
            for name in history[-1].get("learning_rates", {})
            if name.startswith(f"{side}_")
        )
        for end, depth in (("last layers", depths[-1:]), ("first", depths[:1])):
            if depth:
                curves[f"{side}, {end}"] = _curve(history, ("learning_rates", f"{side}_{depth[0]}"))
    return curves


def _draw_panel(axis: Axes, title: str, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    for (colour, style), (label, (epochs, values)) in zip(_LINES, curves.items(), strict=False):
        axis.plot(epochs, values, color=colour, linestyle=style, marker=".", markersize=4, label=label)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("epoch", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if title in _LOGARITHMIC:
        axis.set_yscale("log")
    if title in _FROM_ZERO:
        axis.set_ylim(0, 1.08 * max(max(values) for _, values in curves.values()))
    if title in _SHARES:
        axis.set_ylim(min(0.0, axis.get_ylim()[0]), 1.05)
    if len(curves) > 1:
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2 if len(curves) > 3 else 3}
        axis.legend(**below, frameon=False, fontsize=8, columnspacing=1.2, handlelength=2.4)
    _tidy(axis)


def _tidy(axis: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3, axis=grid)


def plot_comparison(values: dict[str, list[float]], path: Path) -> None:
    """Writes a picture of the rSum of each run: its seeds as dots, their mean, and a bar of one standard deviation."""
    figure = Figure(figsize=(7, 0.8 + 0.34 * len(values)), layout="constrained")
    axis = figure.subplots()
    for row, seeds in enumerate(values.values()):
        spread = statistics.stdev(seeds) if len(seeds) > 1 else 0.0
        axis.errorbar(statistics.mean(seeds), row, xerr=spread, fmt="o", color="#1f5fa8", capsize=4)
        axis.plot(seeds, [row] * len(seeds), ".", color="#888888", markersize=4, zorder=3)
    axis.set_yticks(range(len(values)), list(values))
    axis.set(xlabel="rSum")
    axis.invert_yaxis()
    _tidy(axis, grid="x")
    figure.savefig(path, dpi=110)


def plot_curves(
    condition: str, values: list[float], measures: dict[str, str], runs: dict[str, dict[str, list[list[float]]]], path: Path
) -> None:
    """Writes a panel a measure (name -> title): a line a run through the means over seeds, with the seeds' range as a band.

    Args:
        runs: run -> measure -> for each of the `values` of the condition, one figure a seed.
    """
    figure = Figure(figsize=(4.2 * len(measures), 3.2), layout="constrained")
    for axis, (measure, title) in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures.items(), strict=True):
        for name, of_run in runs.items():
            figures = of_run[measure]
            (line,) = axis.plot(values, [statistics.mean(seeds) for seeds in figures], marker=".", label=name)
            low, high = [min(seeds) for seeds in figures], [max(seeds) for seeds in figures]
            axis.fill_between(values, low, high, color=line.get_color(), alpha=0.15)
        axis.set(xlabel=condition, ylabel=title)
        _tidy(axis)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def plot_sizes(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Writes a picture of rSum against the bytes of a picture in an index, a line a run with its (bytes, rSum)."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for (name, points), (color, _) in zip(curves.items(), itertools.cycle(_LINES)):
        axis.plot(*zip(*sorted(points)), marker="o", color=color, label=name)
    axis.set(xlabel="bytes a picture", ylabel="rSum", xscale="log")
    axis.legend(frameon=False, fontsize=8)
    _tidy(axis)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
