"""The states of a run, from which `--resume` goes on to the end that it would have had without the interruption.

A state is a folder `step-N` of Accelerate's files: weights, optimiser, schedule, scaler, and the random state of every
process. It counts from the moment that it holds progress.json, which is written last and appears as a whole, so that a kill
leaves what was complete before. Nothing in it is unpickled: it is read as safetensors, as JSON, and by `torch.load` with
`weights_only`. (DeepSpeed reads its own files with pickle: resume from states of your own only.)
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import RNG_STATE_NAME, load
from safetensors import SafetensorError
from torch.distributed.fsdp import StateDictType

from granalign_hf.training.arguments import RunArguments
from granalign_hf.whole_files import to_disk, write_whole

logger = get_logger(__name__)
# Settings that may change when a run goes on: they leave its steps as they are.
FREE = (
    *("output_dir", "resume", "epochs", "eval_batch_size", "eval_interval", "report_to", "notes", "data_notes"),
    *("save_steps", "total_limit", "push_to_hub", "hub_model_id", "hub_private_repo"),
    *("measure_energy", "emissions_country"),
)


class States:
    """The states in a folder. Every process has to make each call.

    Args:
        total_limit: states that are kept, the last ones.

    Attributes:
        newest: the folder of the last complete state, if there is one. step: its number of steps, from the start of the run.

    Raises:
        ValueError: FSDP shall write states in shards, whose list of files is read by pickle.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, total_limit: int):
        self.accelerator, self.folder, self.total_limit = accelerator, folder, total_limit
        self.newest: Path | None = None
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
            raise ValueError(
                f"`fsdp_state_dict_type` must be FULL_STATE_DICT, got {plugin.state_dict_type.name}: to resume from that "
                "would unpickle files."
            )

    @property
    def step(self) -> int:
        return _step(self.newest) if self.newest else 0

    def begin(self, settings: dict) -> dict:
        """What is known of a new run. The states of a finished one go: [`load`] would take them for this one's.

        Its `epoch` counts the finished epochs; `step` and `totals` are the finished steps of the next, and sums over them.

        Args:
            settings: of the run (see [`run_settings`]).
        """
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        counts: dict = {"epoch": 0, "step": 0, "totals": {}, "seconds": 0.0, "energy": None}
        return {"settings": settings, **counts, "best_epoch": None, "history": []}

    def save(self, state: dict, step: int) -> None:
        """Writes all that [`load`] needs; where the state of this step is there already, only what `state` says.

        Raises:
            OSError: it cannot be written; the states of before are as they were.
        """
        folder = self.folder / f"step-{step}"
        if folder != self.newest:
            with one_clear_error("state", folder):
                self.accelerator.save_state(str(folder))
            self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.accelerator.is_main_process:
            with one_clear_error("state", folder):
                flush(folder)
                write_whole(folder / "progress.json", json.dumps(state))
            self._remove_old(folder)
        self.newest = folder
        self.accelerator.wait_for_everyone()

    def load(self, settings: dict) -> dict:
        """Goes back to the newest complete state, and returns what it says; half-written ones are removed.

        Without one the run begins, so that a job which may be started again has one command.

        Args:
            settings: of the run (see [`run_settings`]).

        Raises:
            ValueError: it belongs to a run of other settings, or cannot be read.
        """
        complete = _complete(self.folder)
        if not complete:
            logger.info(f"There is no saved state in {self.folder}: the run begins.", main_process_only=True)
            return self.begin(settings)
        newest = complete[-1]
        try:
            state = json.loads((newest / "progress.json").read_text())
            # Accelerate only logs that it cannot read a random state, and would go on with another one.
            load(newest / f"{RNG_STATE_NAME}_{self.accelerator.process_index}.pkl")
        except Exception as error:
            raise _unreadable(newest) from error
        refuse_another_run(newest, state["settings"], settings)
        try:
            self.accelerator.load_state(str(newest))
        except Exception as error:
            raise _unreadable(newest) from error
        if self.accelerator.is_main_process:
            for other in self.folder.glob("step-*"):
                if other not in complete:
                    shutil.rmtree(other)
        self.newest = newest
        self.accelerator.wait_for_everyone()
        return state | {"settings": settings}

    def _remove_old(self, newest: Path) -> None:
        others = [folder for folder in _complete(self.folder) if folder != newest]
        kept = others[::-1][: self.total_limit - 1]
        for other in self.folder.glob("step-*"):
            if other not in (newest, *kept):
                shutil.rmtree(other)


def refuse_to_replace(folder: Path) -> None:
    """For a run that shall begin where another one has its states.

    Raises:
        ValueError: that one was stopped before its end.
    """
    for newest in _complete(folder)[-1:]:
        state = json.loads((newest / "progress.json").read_text())
        if state["epoch"] < state["settings"]["epochs"]:
            raise ValueError(
                f"{newest} holds a run that was stopped in epoch {state['epoch'] + 1} of {state['settings']['epochs']}, and "
                "a new one would remove it. Go on with --resume, name another output_dir, or delete that folder."
            )


def run_settings(run: RunArguments, fields: dict, num_processes: int, batches_per_epoch: int) -> dict:
    """What decides on the steps of a run, as JSON has it: all settings and how the work is shared out.

    Args:
        fields: of `GranAlignConfig`, as given.
    """
    settings = {**dataclasses.asdict(run), **fields}
    if not run.streaming:
        del settings["num_workers"]  # a stream alone is shared out by it
    return json.loads(json.dumps(settings | {"num_processes": num_processes, "batches_per_epoch": batches_per_epoch}))


def refuse_another_run(folder: Path, before: dict, now: dict) -> None:
    """Compares [`run_settings`].

    Raises:
        ValueError: a setting that decides on the steps has changed; the message names them all.
    """
    changed = [
        f"{name} {before.get(name)!r} (now {now.get(name)!r})"
        for name in {**before, **now}
        if name not in FREE and before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"`resume` goes on with the run of {folder}, which had {', '.join(changed)}. Give the settings of that run, or "
            "start a new one without --resume in another output_dir."
        )
    if before["epochs"] != now["epochs"] and now["lr_scheduler"] not in ("multistep", "constant"):
        logger.warning(
            f"`epochs` was {before['epochs']} and is {now['epochs']}: from here on the learning rate follows the "
            f"`{now['lr_scheduler']}` schedule of {now['epochs']} epochs."
        )


@contextmanager
def one_clear_error(what: str, path: Path) -> Iterator[None]:
    """For a full disk and the like, which torch, safetensors and the system each report in their own way.

    Raises:
        OSError: writing failed.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"The {what} {path} cannot be written: {error}. Make room, or mend the permissions. What was complete before is "
            "as it was, and --resume goes on from it."
        ) from error


def _unreadable(folder: Path) -> ValueError:
    return ValueError(
        f"The state {folder} cannot be read: a file of it is missing, damaged, or holds more than data. Remove the folder "
        "to go on from the state before it, if there is one."
    )


def flush(folder: Path) -> None:
    """Brings the files of a folder to the disk, before what says that they are there."""
    for path in folder.rglob("*"):
        if path.is_file():
            to_disk(path)


def _complete(folder: Path) -> list[Path]:
    """The folders of the complete states, the newest last."""
    return sorted((path.parent for path in folder.glob("step-*/progress.json")), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
