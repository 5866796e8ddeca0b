"""The best checkpoint of a run, with what was measured on it and the record of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from granalign_hf.evaluation import RetrievalRanks
from granalign_hf.model_card import write_model_card
from granalign_hf.training.plot import plot_history
from granalign_hf.training.protocols import save_ranks
from granalign_hf.training.record import run_record
from granalign_hf.training.states import flush, one_clear_error, write_whole
from granalign_hf.training.tuning import merged_state

if TYPE_CHECKING:
    from granalign_hf.training.train import Training

# What tells of the weights of before, and these.
REPLACED = ("metrics*.json", "ranks-*.npz", "uncertainty-*.json", "demo.png", "README.md", "model*.safetensors*")


def keep_best(training: Training, command: str, state: dict, ranks: RetrievalRanks) -> None:
    """Writes the checkpoint, and the rank of every query, if the last epoch is the best on validation; the record always."""
    output, record = Path(training.run.output_dir), state["history"][-1]
    best = max((r for r in state["history"] if "validation" in r), key=lambda r: r["validation"]["rsum"])
    if best is record:
        state["best_epoch"] = record["epoch"]
    if not training.accelerator.is_main_process:
        return
    with one_clear_error("best checkpoint", output):
        if best is record:
            new = output / "checkpoint-unfinished"
            shutil.rmtree(new, ignore_errors=True)  # of a run that was killed here
            save_checkpoint(training.whole_model, training.processor, new)
            save_ranks(new / f"ranks-{training.run.validation_split}.npz", [ranks])
            replace_checkpoint(output, new)
        write_metrics(output, training, command, state)
    tqdm.write(f"epoch {record['epoch']}: loss {record['loss']:.4f}, validation rSum {record['validation']['rsum']:.1f}")


def save_checkpoint(model, processor, folder: Path) -> None:
    """The complete folder that `AutoModel.from_pretrained` and `AutoProcessor.from_pretrained` read."""
    model.save_pretrained(folder, state_dict=merged_state(model))
    processor.save_pretrained(folder)


def replace_checkpoint(output: Path, new: Path) -> None:
    """Moves the files of a new checkpoint into the place of the one before, whose figures go with it.

    Nothing is loaded without config.json, so that goes first and comes last: what a kill in between leaves is refused, never
    taken for a checkpoint, and `--resume` writes it once more.
    """
    flush(new)
    old = [path for pattern in REPLACED for path in output.glob(pattern)]
    for path in [output / "config.json", *old]:
        path.unlink(missing_ok=True)
    for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(output / path.name)
    new.rmdir()


def write_metrics(output: Path, training: Training, command: str, state: dict) -> None:
    """metrics.json, the learning curve and the card beside the best checkpoint."""
    record = run_record(training.run, command, training.plain_model.config, training.train_data, state)
    write_whole(output / "metrics.json", json.dumps(record, indent=2) + "\n")
    plot_history(state["history"], output / "learning_curve.png")
    write_model_card(output)
