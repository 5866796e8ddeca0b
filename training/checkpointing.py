"""What a run leaves on disk: the best checkpoint with its record, and the states from which `--resume` goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from tqdm import tqdm

from granalign_hf.evaluation import RetrievalRanks
from granalign_hf.model_card import write_model_card
from granalign_hf.training.plot import plot_history
from granalign_hf.training.protocols import save_ranks
from granalign_hf.training.record import run_record

if TYPE_CHECKING:
    from granalign_hf.training.train import Training

MEASURED = ("metrics-*.json", "ranks-*.npz", "demo.png")


def keep_best(training: Training, command: str, state: dict, ranks: RetrievalRanks) -> None:
    """Writes the checkpoint, and the rank of every query, if the last epoch is the best on validation; the record always."""
    output, record = Path(training.run.output_dir), state["history"][-1]
    best = max((r for r in state["history"] if "validation" in r), key=lambda r: r["validation"]["rsum"])
    if best is record:
        state["best_epoch"] = record["epoch"]
    if not training.accelerator.is_main_process:
        return
    if best is record:
        save_checkpoint(training.plain_model, training.processor, output)
        save_ranks(output / f"ranks-{training.run.validation_split}.npz", [ranks])
    write_metrics(output, training, command, state)
    tqdm.write(f"epoch {record['epoch']}: loss {record['loss']:.4f}, validation rSum {record['validation']['rsum']:.1f}")


def save_checkpoint(model, processor, output: Path) -> None:
    """The complete folder that `AutoModel.from_pretrained` and `AutoProcessor.from_pretrained` read.

    What evaluations have measured on the weights of before goes: it would stand beside others.
    """
    for pattern in MEASURED:
        for path in output.glob(pattern):
            path.unlink()
    model.save_pretrained(output)
    processor.save_pretrained(output)


def write_metrics(output: Path, training: Training, command: str, state: dict) -> None:
    """metrics.json, the learning curve and the card beside the best checkpoint."""
    record = run_record(training.run, command, training.plain_model.config, training.train_data, state)
    (output / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    plot_history(state["history"], output / "learning_curve.png")
    write_model_card(output)


def save_state(accelerator: Accelerator, output: Path, state: dict) -> None:
    """Everything that `--resume` needs, in a folder of its own; those of earlier epochs are removed after that.

    A folder counts from the moment that it holds progress.json, which is written last and appears as a whole.
    """
    new = output / "state" / f"epoch-{state['epoch']}"
    accelerator.save_state(str(new))
    accelerator.wait_for_everyone()  # each process writes its own random state
    if accelerator.is_main_process:
        (new / "progress.tmp").write_text(json.dumps(state))
        (new / "progress.tmp").replace(new / "progress.json")
        for other in (output / "state").iterdir():
            if other != new:
                shutil.rmtree(other)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, output: Path) -> dict:
    """Loads the newest complete state of [`save_state`] and returns the progress of the run.

    Raises:
        ValueError: there is none.
    """
    complete = [path.parent for path in (output / "state").glob("epoch-*/progress.json")]
    if not complete:
        raise ValueError(
            f"`resume` found no saved state in {output / 'state'}. Start without --resume, or name the right output_dir."
        )
    newest = max(complete, key=lambda folder: int(folder.name.removeprefix("epoch-")))
    accelerator.load_state(str(newest))
    return json.loads((newest / "progress.json").read_text())
