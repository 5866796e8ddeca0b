"""Draws a run (loss and validation rSum by epoch), a comparison of runs, and what they do as a condition changes."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.figure import Figure


def plot_history(history: list[dict], path: Path) -> None:
    """Writes the learning curve of `history` (records of metrics.json) as a picture."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    loss_axis, rsum_axis = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in history]
    loss_axis.plot(epochs, [record["loss"] for record in history], color="#555555", marker=".")
    loss_axis.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    validated = [record for record in history if "validation" in record]
    rsum = [record["validation"]["rsum"] for record in validated]
    rsum_axis.plot([record["epoch"] for record in validated], rsum, color="#1f5fa8", marker=".")
    rsum_axis.set(xlabel="epoch", ylabel="validation rSum")
    for axis in (loss_axis, rsum_axis):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


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
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3, axis="x")
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
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
