"""Checkpoint and data set -> how sure its answers are: fitted on one split, measured on another.

    accelerate launch training/calibrate.py CHECKPOINT --dataset NAME

Writes what it fits to the config of the checkpoint (see the last fields of `GranAlignConfig`), and what it measures to
uncertainty-SPLIT.json beside it and into its card. Galleries have one caption an image, as many galleries as every image has
captions, so that each query has one right answer.
"""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from granalign_hf import GranAlignConfig
from granalign_hf.calibration import (
    COVERAGE,
    WAYS,
    FirstAnswers,
    answer_sets,
    auroc,
    conformal_threshold,
    expected_calibration_error,
    first_answers,
    fit_logistic,
    fit_logit_scale,
    is_right,
    log_loss,
    logistic,
    one_caption_galleries,
    recall_by_level,
    resampled_queries,
    risk_coverage,
)
from granalign_hf.evaluation import quantiles
from granalign_hf.model_card import write_model_card
from granalign_hf.modeling.configuration_granalign import CONFIDENCE_MEASURES
from granalign_hf.modeling.standard_errors import has_standard_errors, standard_errors
from granalign_hf.training.arguments import PRECISIONS, DataArguments
from granalign_hf.training.data import CaptionedImages, load_split
from granalign_hf.training.evaluate import load_checkpoint, part_name
from granalign_hf.training.parser import SettingsParser, choice_problems, range_problems, setting
from granalign_hf.training.runtime import portable, set_up_torch
from granalign_hf.training.scoring import Encoder, Measured, measured_split
from granalign_hf.uncertainty import sampled_standard_errors
from granalign_hf.whole_files import write_whole

MIN_IMAGES = 10  # with fewer, no answer set holds the right one for 90 % of the queries
SAMPLED_IMAGES = 100  # with as many captions; for the factor of the standard error


@dataclass
class CalibrateArguments(DataArguments):
    """What to fit on and what to measure on."""

    validation_split: str = setting("validation", "Split to fit on.")
    split: str = setting("test", "Split to measure on.")
    max_images: int | None = setting(
        None,
        f"The first images of both splits only, {MIN_IMAGES} at least; config and model card stay as they are.",
    )
    batch_size: int = setting(64, "Images per step, at most 128.")
    matmul_precision: str = setting("highest", f"float32 products: {', '.join(PRECISIONS)} (see torch).")


def main(argv: list[str] | None = None) -> dict:
    """Fits and measures; returns what the file holds."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, args, folder = parse_arguments(argv)
    accelerator = Accelerator()
    set_up_torch(args.matmul_precision, accelerator.num_processes)
    validation, test = load_splits(args, parser)
    model, processor = load_checkpoint(str(folder), parser)
    model.to(accelerator.device).eval()
    ratios = [sampled_ratio(Encoder(model, processor, data, args.batch_size)) for data in (validation, test)]
    # First, so that what is fitted to standard errors is fitted to those that the calibrated model will give.
    model.config.standard_error_factor = 1.0 if ratios[0] is None else ratios[0]["all_pairs"]

    def measured_on(split: str, data: CaptionedImages) -> AbstractContextManager[Measured]:
        return measured_split(model, processor, data, args.batch_size, folder / f"uncertainty-{split}-unfinished")

    # Within each other, so that a call which is interrupted at the second finds what the first has done.
    with measured_on(args.validation_split, validation) as of_validation, measured_on(args.split, test) as measured:
        fitted, losses = fit(of_validation, validation)
        fitted = {"standard_error_factor": model.config.standard_error_factor, **fitted}
        result = {
            "dataset": Path(args.dataset).name,
            "fitted_on": args.validation_split,
            "split": args.split,
            "num_images": len(test),
            "num_galleries": len(one_caption_galleries(test.caption_image_index)),
            "date": datetime.date.today().isoformat(),
            "command": portable(shlex.join(["accelerate", "launch", "training/calibrate.py", *argv])),
            "fitted": fitted,
            "confidence_log_loss": losses,
            "sampled_over_closed_form": dict(zip(("fitted_on", "measured_on"), ratios, strict=True)),
            "diagnostics": measured.diagnostics,
            **{way: measure(measured, test, way, fitted) for way in WAYS},
        }
    if accelerator.is_main_process:
        is_whole = args.max_images is None
        if is_whole:
            save_fitted(folder, fitted)
        output = folder / f"uncertainty-{part_name(args.split, args.max_images)}.json"
        write_whole(output, json.dumps(result, indent=2) + "\n")
        if is_whole and (folder / "metrics.json").is_file():
            write_model_card(folder)
        print(table(result))
        stored = f"written to {folder / 'config.json'}" if is_whole else "not stored, as of a part of the split only"
        print(f"fitted values {stored}; the figures are in {output}")
    accelerator.end_training()
    return result


def parse_arguments(argv: list[str]) -> tuple[SettingsParser, CalibrateArguments, Path]:
    """`CHECKPOINT [--field value ...]` -> the parser (for later refusals), the settings, and the folder.

    Raises:
        SystemExit: a field that does not exist, a value that nothing can be done with, or no checkpoint.
    """
    parser = SettingsParser(CalibrateArguments, description="Calibrates a checkpoint.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="Folder of a GranAlign model.")
    args, rest, unknown = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
    problems = parser.unknown_fields(unknown, "on the command line")
    problems += range_problems(args, ["max_images"], f"must be at least {MIN_IMAGES}", lambda value: value >= MIN_IMAGES)
    problems += range_problems(args, ["batch_size"], "must be at least 1", lambda value: value >= 1)
    problems += choice_problems(args, {"matmul_precision": PRECISIONS})
    if args.split == args.validation_split:
        problems.append(f"split and validation_split are both {args.split}: measure on images that nothing was fitted on")
    if not (rest.checkpoint / "config.json").is_file():
        problems.append(f"the checkpoint {rest.checkpoint} is no folder with a config.json, which the fitted values go into")
    parser.refuse(problems)
    return parser, args, rest.checkpoint


def load_splits(args: CalibrateArguments, parser: SettingsParser) -> tuple[CaptionedImages, CaptionedImages]:
    try:
        fitted_on, measured_on = (
            load_split(args.dataset, name, **args.load_options).first(args.max_images)
            for name in (args.validation_split, args.split)
        )
    except ValueError as error:
        parser.error(str(error))
    if min(len(fitted_on), len(measured_on)) < MIN_IMAGES:
        parser.error(f"both splits need at least {MIN_IMAGES} images, got {len(fitted_on)} and {len(measured_on)}")
    return fitted_on, measured_on


def save_fitted(folder: Path, fitted: dict) -> None:
    """Puts the fitted values into config.json, which appears as a whole; nothing else in it changes."""
    path = folder / "config.json"
    GranAlignConfig.from_pretrained(folder, **fitted)  # refuses what is out of range
    config = json.loads(path.read_text()) | fitted
    write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


# ------------------------------------------------------------------------------------------------------------ galleries


class Queries(NamedTuple):
    """All queries of one way, gallery by gallery, (queries,) each."""

    answers: FirstAnswers
    is_right: np.ndarray
    gap: np.ndarray  # by how much the right answer scores below the first
    image: np.ndarray  # the right one
    set_size: np.ndarray  # of the answer set


def queries(measured: Measured, data: CaptionedImages, way: str, logit_scale: float, threshold: float = 0.0) -> Queries:
    """Their uncertainties have two more: the length of the caption asked for or answered, and the entropy of the image.

    Args:
        threshold: of the answer sets.
    """
    lengths = np.array([len(caption.split()) for caption in data.all_captions])
    parts = []
    for captions in one_caption_galleries(data.caption_image_index):
        scores, errors = measured.scores[:, captions], measured.standard_errors
        errors = None if errors is None else errors[:, captions]
        if way == "text_to_image":
            scores, errors = scores.T, None if errors is None else errors.T
        answers = first_answers(scores, logit_scale, errors)
        images = np.arange(len(scores))
        asked_image, asked_caption = (images, answers.first) if way == "image_to_text" else (answers.first, images)
        answers.uncertainties["caption_length"] = lengths[captions][asked_caption].astype(float)
        if measured.image_entropies is not None:
            answers.uncertainties["image_entropy"] = measured.image_entropies[asked_image].astype(float)
        gap, sizes = answers.top - np.diagonal(scores), answer_sets(scores, threshold).sum(axis=1)
        parts.append(Queries(answers, is_right(scores), gap, images, sizes))
    answers, *columns = zip(*parts, strict=True)
    return Queries(FirstAnswers.joined(answers), *(np.concatenate(column) for column in columns))


# -------------------------------------------------------------------------------------------------------------- fitting


def fit(measured: Measured, data: CaptionedImages) -> tuple[dict[str, Any], dict[str, float]]:
    """The fields of `GranAlignConfig` that the scores of a split give, and the log-loss of the confidence by measure.

    The confidence is made of the measure with the smallest, mean over both ways.
    """
    galleries = one_caption_galleries(data.caption_image_index)
    logit_scale = fit_logit_scale([measured.scores[:, captions] for captions in galleries])
    of_way = [queries(measured, data, way, logit_scale) for way in WAYS]
    names = [name for name in CONFIDENCE_MEASURES if name in of_way[0].answers.uncertainties]
    curves = {name: [fit_logistic(q.answers.uncertainties[name], q.is_right) for q in of_way] for name in names}
    losses = {
        name: float(np.mean([_loss(q, name, curve) for q, curve in zip(of_way, curves[name], strict=True)]))
        for name in names
    }
    best = min(losses, key=losses.__getitem__)
    fitted = {
        "logit_scale": logit_scale,
        "confidence_measure": best,
        "confidence_coefficients": [number for curve in curves[best] for number in curve],
        "conformal_thresholds": [conformal_threshold(q.gap) for q in of_way],
    }
    return fitted, losses


def _loss(q: Queries, measure: str, curve: tuple[float, float]) -> float:
    return log_loss(logistic(q.answers.uncertainties[measure], curve), q.is_right)


@torch.no_grad()
def sampled_ratio(encoder: Encoder) -> dict[str, float] | None:
    """Sampled over closed-form standard error, for the first images and a caption of each; `None` without either.

    `all_pairs`: root of the ratio of the mean variances. `matched_pairs`: over the pairs that belong together. `correlation`
    of both over all pairs; 100 draws leave it below 1 by themselves.
    """
    if not has_standard_errors(encoder.model.config):
        return None
    numbers = range(min(SAMPLED_IMAGES, len(encoder.data)))
    captions = one_caption_galleries(encoder.data.caption_image_index)[0][numbers]
    image = encoder.images(numbers)
    text = encoder.captions(captions, [encoder.data.all_captions[c] for c in captions])
    closed = standard_errors(encoder.model, image, text).double().cpu() / encoder.model.config.standard_error_factor
    sampled = sampled_standard_errors(encoder.model, image, text).double().cpu()
    return {
        "all_pairs": float((sampled.square().mean() / closed.square().mean()).sqrt()),
        "matched_pairs": float((sampled.diag().square().mean() / closed.diag().square().mean()).sqrt()),
        "correlation": float(np.corrcoef(closed.flatten(), sampled.flatten())[0, 1]),
    }


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(measured: Measured, data: CaptionedImages, way: str, fitted: dict) -> dict[str, Any]:
    """What the fitted values are worth on another split, one way."""
    number = WAYS.index(way)
    threshold = fitted["conformal_thresholds"][number]
    before = queries(measured, data, way, 1.0).answers
    q = queries(measured, data, way, fitted["logit_scale"], threshold)
    coefficients = fitted["confidence_coefficients"][2 * number : 2 * number + 2]
    confidence = logistic(q.answers.uncertainties[fitted["confidence_measure"]], coefficients)
    return {
        "num_queries": len(q.is_right),
        "r1": 100 * float(q.is_right.mean()),
        "softmax": {
            "ece_before": expected_calibration_error(before.probability, q.is_right),
            "ece": expected_calibration_error(q.answers.probability, q.is_right),
        },
        "confidence": {
            "measure": fitted["confidence_measure"],
            "ece": expected_calibration_error(confidence, q.is_right),
            "log_loss": log_loss(confidence, q.is_right),
            "log_loss_of_the_mean": log_loss(np.full(len(confidence), q.is_right.mean()), q.is_right),
        },
        "answer_sets": {
            "coverage": 100 * float((q.gap <= threshold).mean()),
            "aim": 100 * COVERAGE,
            "mean_size": float(q.set_size.mean()),
            "median_size": float(np.median(q.set_size)),
        },
        "is_the_first_wrong": error_detection(q.answers.uncertainties, ~q.is_right, q.image),
    }


def error_detection(uncertainties: dict[str, np.ndarray], is_wrong: np.ndarray, image: np.ndarray) -> dict[str, dict]:
    """How well each uncertainty tells wrong first answers; nothing where all are right or all wrong.

    Intervals by bootstrap over images, the same draws for all uncertainties.
    """
    if is_wrong.all() or not is_wrong.any():
        return {}
    draws = np.array([
        [auroc(values[chosen], is_wrong[chosen]) for values in uncertainties.values()] for chosen in resampled_queries(image)
    ])  # fmt: skip
    draws = draws[~np.isnan(draws).any(axis=1)]  # without those that have drawn one kind alone
    margin = list(uncertainties).index("margin")
    figures = {}
    for place, (name, values) in enumerate(uncertainties.items()):
        recalls, score = recall_by_level(values, is_wrong)
        risks = risk_coverage(values, is_wrong)
        figures[name] = {
            "auroc": auroc(values, is_wrong),
            "auroc_interval": quantiles(draws[:, place], 0.95).tolist(),
            "auroc_minus_margin_interval": quantiles(draws[:, place] - draws[:, margin], 0.95).tolist(),
            "area_under_risk_coverage": float(risks.mean()),
            "risk_at_coverage": {f"{share}%": float(risks[max(len(risks) * share // 100, 1) - 1]) for share in (20, 50, 80)},
            "minus_s_r2": score,
            "r1_by_level": recalls.tolist(),
        }
    return figures


def table(result: dict) -> str:
    """The figures as lines of text."""
    lines = [
        f"{result['dataset']}: fitted on {result['fitted_on']}, measured on {result['split']} "
        f"({result['num_images']} images, {result['num_galleries']} galleries of one caption an image)"
    ]
    for way in WAYS:
        figures = result[way]
        softmax, sets, confidence = figures["softmax"], figures["answer_sets"], figures["confidence"]
        lines += [
            "",
            f"{way}, R@1 {figures['r1']:.1f}",
            f"  softmax: expected calibration error {softmax['ece_before']:.3f} before, {softmax['ece']:.3f} after",
            f"  P(first is right) from {confidence['measure']}: expected calibration error {confidence['ece']:.3f}, "
            f"log-loss {confidence['log_loss']:.3f} (the mean alone: {confidence['log_loss_of_the_mean']:.3f})",
            f"  answer sets: coverage {sets['coverage']:.1f} % (aim {sets['aim']:.0f}), {sets['mean_size']:.1f} candidates "
            f"in the mean, {sets['median_size']:.0f} in the median",
            f"  {'is the first answer wrong?':<28} AUROC [95 % interval]     AURC   -S R^2",
        ]
        for name, values in figures["is_the_first_wrong"].items():
            low, high = values["auroc_interval"]
            lines.append(
                f"  {name:<28} {values['auroc']:.3f} [{low:.3f}, {high:.3f}]   {values['area_under_risk_coverage']:.3f}   "
                f"{values['minus_s_r2']:6.3f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
