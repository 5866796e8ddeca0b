"""What a run shows while it trains: the figures of its steps and word maps on validation, in Accelerate's trackers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from accelerate import Accelerator

from granalign_hf.explanation import align
from granalign_hf.figure import figure
from granalign_hf.modeling.modeling_granalign import GranAlignModel
from granalign_hf.modeling.processing_granalign import GranAlignProcessor
from granalign_hf.training.arguments import RunArguments
from granalign_hf.training.data import CaptionedImages

UPDATES_BETWEEN_LOGS = 20
NUM_WORD_MAPS = 4


def start_trackers(accelerator: Accelerator, run: RunArguments, fields: dict) -> None:
    """Opens the trackers of the run, if it has any, and tells them its settings."""
    if accelerator.log_with:
        settings = dataclasses.asdict(run) | fields
        plain = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in settings.items()}
        accelerator.init_trackers("granalign", config=plain)


def log_step(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    sums: dict[str, list[float]],
    step: int,
    update: int,
    values: dict[str, float],
    grad_norm: float | None,
    speed: dict[str, float],
) -> None:
    """Adds a step to the sums of its epoch; that of every twentieth update goes to the trackers. Before the rates change.

    Args:
        sums: name -> [sum, number of steps], of the epoch so far; see [`epoch_means`]. step, update: of the run.
        values: the loss and its terms. grad_norm: `None` for a step without an update; one that is not finite (half
            precision finds its scale that way) is logged, but does not count in the sums. speed: of
            the epoch so far; it is logged only.
    """
    norms = {} if grad_norm is None else {"grad_norm": grad_norm}
    rates = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
    finite = {name: norm for name, norm in norms.items() if math.isfinite(norm)}
    for name, value in (values | finite | rates).items():
        total, count = sums.get(name, (0.0, 0))
        sums[name] = [total + value, count + 1]
    if grad_norm is not None and update % UPDATES_BETWEEN_LOGS == 0:
        logged = {f"train/{name}": value for name, value in (values | norms).items()}
        logged |= {f"speed/{name}": value for name, value in speed.items()}
        accelerator.log(logged | rates, step=step)


def epoch_means(sums: dict[str, list[float]]) -> dict:
    """For the history: mean of the loss, of each of its terms, of the gradient norm, and of the rate of each group."""
    means = {name: total / count for name, (total, count) in sums.items()}
    rates = {name.removeprefix("lr/"): value for name, value in means.items() if name.startswith("lr/")}
    return {name: value for name, value in means.items() if not name.startswith("lr/")} | {"learning_rates": rates}


def log_validation(accelerator: Accelerator, metrics: dict[str, float], diagnostics: dict[str, float], step: int) -> None:
    """Recalls, and what saliencies and regions do."""
    logged = {f"validation/{name}": value for name, value in metrics.items()}
    accelerator.log(logged | {f"diagnostics/{name}": value for name, value in diagnostics.items()}, step=step)


def log_word_maps(
    accelerator: Accelerator, model: GranAlignModel, processor: GranAlignProcessor, data: CaptionedImages, step: int
) -> None:
    """Heat maps for the first caption of a few images, the same ones each time, where a tracker takes pictures."""
    trackers = [tracker for tracker in accelerator.trackers if hasattr(tracker, "log_images")]
    if not accelerator.is_main_process or not trackers or not data.has_pictures or not processor.tokenizer.is_fast:
        return
    for number in np.unique(np.linspace(0, len(data) - 1, NUM_WORD_MAPS, dtype=int)).tolist():
        alignment = align(model, processor, data.image(number), data.captions[number][0])
        words = alignment.content_words or alignment.words
        if not words:  # a caption of characters that the tokenizer drops
            continue
        picture = np.asarray(figure(alignment, words=words))
        for tracker in trackers:
            _log_picture(tracker, f"word_maps/{number}", picture, step)


def _log_picture(tracker, name: str, picture: np.ndarray, step: int) -> None:
    """Accelerate passes pictures on as each tracker's own function takes them."""
    if tracker.name == "tensorboard":
        tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")
    elif tracker.name in ("wandb", "swanlab"):
        tracker.log_images({name: [picture]}, step=step)
    else:  # aim, clearml
        tracker.log_images({name: picture}, step=step)
