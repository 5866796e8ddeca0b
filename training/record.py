"""What a run writes down about itself."""

from __future__ import annotations

import datetime
import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path

from accelerate.state import AcceleratorState

from granalign_hf.modeling.configuration_granalign import GranAlignConfig
from granalign_hf.training.arguments import RunArguments
from granalign_hf.training.data import CaptionedImages
from granalign_hf.training.runtime import hardware, portable
from granalign_hf.training.streams import StreamedImages

STARTED_FROM = ("command", "hours", "energy", "best_epoch")  # what a record tells of the run before
RECORDED_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "granalign-hf")


def run_record(
    run: RunArguments, command: str, config: GranAlignConfig, train_data: CaptionedImages | StreamedImages, state: dict
) -> dict:
    """The content of metrics.json: what was run, on what, and every epoch's figures.

    Args:
        command: as typed. config: of the model. state: with the `history` of the epochs, `best_epoch` and `seconds`.
    """
    before = _earlier_run(run.checkpoint)
    best: dict = next((r for r in state["history"] if r["epoch"] == state["best_epoch"]), {})
    return {
        "recipe": next((word for word in shlex.split(command) if word.endswith(".yaml")), "demo-scenes.yaml"),
        "command": without_resume(portable(command)),
        "seed": run.seed,
        "date": datetime.date.today().isoformat(),
        "hours": round(state["seconds"] / 3600, 4),
        "energy": state.get("energy"),
        "started_from": None if before is None else {name: before.get(name) for name in STARTED_FROM},
        "hardware": hardware(),
        "mixed_precision": AcceleratorState().mixed_precision,  # what was computed in, whatever was asked for
        "versions": {name: version(name) for name in RECORDED_PACKAGES},
        "dataset": Path(run.dataset).name,
        "train_split": run.train_split,
        "validation_split": run.validation_split,
        **_counts(train_data, state["history"]),
        "encoders": before["encoders"]
        if before
        else {
            "vision": _encoder_name(run.vision_encoder or config.vision_config._name_or_path)
            if train_data.has_pictures
            else "precomputed",
            "text": _encoder_name(run.text_encoder or config.text_config._name_or_path),
        },
        "frozen_encoders": run.freeze_encoders,
        "lora": {"rank": run.lora_rank, "alpha": run.lora_alpha, "encoders": run.lora_encoders} if run.lora_rank else None,
        "best_epoch": state["best_epoch"],
        "validation": best.get("validation", {}),
        "diagnostics": best.get("diagnostics", {}),
        "history": state["history"],
        "notes": run.notes,
        "data_notes": run.data_notes,
    }


def without_resume(command: str) -> str:
    """A resumed run ends as the one that was never interrupted, so the command of that one tells how it came about."""
    return re.sub(r" --resume(?![\w-])([ =](?!-)\S+)?", "", command)


def _counts(train_data: CaptionedImages | StreamedImages, history: list[dict]) -> dict:
    """Of images and captions, which are unknown of a stream; and of the images that could not be read and were left out."""
    if isinstance(train_data, StreamedImages):
        skipped = sum(record["corrupt_images"] for record in history)
        return {"num_train_images": None, "num_train_captions": None, "num_corrupt_images": skipped}
    return {
        "num_train_images": len(train_data),
        "num_train_captions": len(train_data.all_captions),
        "num_corrupt_images": len(train_data.corrupt),
        "corrupt_images": train_data.corrupt,
    }


def _earlier_run(checkpoint: str | None) -> dict | None:
    """The record of the run that made the checkpoint this one starts from, where it has one."""
    path = None if checkpoint is None else Path(checkpoint) / "metrics.json"
    return json.loads(path.read_text()) if path and path.is_file() else None


def _encoder_name(name: str) -> str:
    """What stands in the record: no path of this machine."""
    if not name:
        return "from scratch"
    return Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name
