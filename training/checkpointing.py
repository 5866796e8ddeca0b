"""The best checkpoint of a run, with what was measured on it and the record of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tqdm import tqdm

from granalign_hf.card_sections import SECTIONS
from granalign_hf.evaluation import RetrievalRanks
from granalign_hf.hub import add_multi_vectors
from granalign_hf.model_card import write_model_card
from granalign_hf.modeling.modeling_granalign import GranAlignModel
from granalign_hf.modeling.processing_granalign import GranAlignProcessor
from granalign_hf.training.arguments import RunArguments
from granalign_hf.training.data import CaptionedImages
from granalign_hf.training.leaks import FILE as TRAINING_IMAGES
from granalign_hf.training.plot import plot_history
from granalign_hf.training.protocols import save_ranks
from granalign_hf.training.record import run_record
from granalign_hf.training.states import flush, one_clear_error
from granalign_hf.training.streams import StreamedImages
from granalign_hf.training.tuning import merged_state
from granalign_hf.whole_files import write_whole

# What tells of the weights of before, and these.
REPLACED = (
    *("metrics*.json", "ranks-*.npz", *(f"{kind}-*.json" for kind in SECTIONS), "demo.png", "README.md"),
    *("model*.safetensors*", TRAINING_IMAGES),
)


def best_record(history: list[dict]) -> dict:
    """Of the first epoch with the highest rSum on validation."""
    return max((record for record in history if "validation" in record), key=lambda record: record["validation"]["rsum"])


def keep_best(
    run: RunArguments,
    command: str,
    model: GranAlignModel,
    processor: GranAlignProcessor,
    train_data: CaptionedImages | StreamedImages,
    state: dict,
    ranks: RetrievalRanks,
) -> bool:
    """Writes the checkpoint, and the rank of every query, if the last epoch is the best on validation; the record always.

    Returns whether it is.

    Args:
        command: that started the run. state: of the run, its last epoch in it. ranks: of that epoch.

    Raises:
        OSError: it cannot be written; what was there before is.
    """
    output, record = Path(run.output_dir), state["history"][-1]
    with one_clear_error("best checkpoint", output):
        is_best = best_record(state["history"]) is record
        if is_best:
            new = output / "checkpoint-unfinished"
            shutil.rmtree(new, ignore_errors=True)  # of a run that was killed here
            save_checkpoint(model, processor, new)
            save_ranks(new / f"ranks-{run.validation_split}.npz", [ranks])
            replace_checkpoint(output, new)
        metrics = run_record(run, command, model.config, train_data, state)
        write_whole(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        plot_history(state["history"], output / "learning_curve.png")
        write_model_card(output)
    tqdm.write(f"epoch {record['epoch']}: loss {record['loss']:.4f}, validation rSum {record['validation']['rsum']:.1f}")
    return is_best


def save_checkpoint(model, processor, folder: Path) -> None:
    """The complete folder that the Auto classes of Transformers and sentence-transformers read."""
    model.save_pretrained(folder, state_dict=merged_state(model))
    processor.save_pretrained(folder)
    add_multi_vectors(folder)


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
