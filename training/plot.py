"""Draws a run (loss and validation rSum by epoch) and a comparison of runs."""

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
