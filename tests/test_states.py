"""The states of a run on disk: complete or not there, never executed, never another run's."""

import json
import pickle
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, PartialState
from test_train import TINY
from torch.distributed.fsdp import StateDictType

from granalign_hf.training import train
from granalign_hf.training.arguments import SCHEDULERS, parse_arguments
from granalign_hf.training.checkpointing import replace_checkpoint
from granalign_hf.training.record import without_resume
from granalign_hf.training.states import States, refuse_another_run


def small_training(folder: Path, scheduler: str = "multistep", total_limit: int = 1) -> tuple[States, torch.nn.Module]:
    """States of one layer, with an optimiser and a schedule."""
    accelerator = Accelerator(step_scheduler_with_optimizer=False)
    layer = torch.nn.Linear(30, 30)
    layer, optimizer = accelerator.prepare(layer, torch.optim.AdamW(layer.parameters(), lr=0.1))
    run = parse_arguments(["--lr_scheduler", scheduler, "--epochs", "2"])[0]
    schedule = accelerator.prepare_scheduler(train.make_scheduler(optimizer, run, 10))
    layer(torch.ones(30)).sum().backward()
    optimizer.step()
    schedule.step()
    return States(accelerator, folder, total_limit), layer


SETTINGS = {"epochs": 2, "seed": 0, "lr_scheduler": "multistep"}


def save(states: States, layer: torch.nn.Module, step: int) -> None:
    torch.nn.init.constant_(layer.weight, step)
    states.save({"settings": SETTINGS, "epoch": step}, step)


def load(states: States, layer: torch.nn.Module) -> tuple[int, int]:
    torch.nn.init.constant_(layer.weight, -1)
    return states.load(SETTINGS)["epoch"], layer.weight[0, 0].item()


def test_the_last_states_are_kept(tmp_path):
    states, layer = small_training(tmp_path, total_limit=2)
    (tmp_path / "step-50").mkdir()  # half-written
    for step in (9, 10, 100):
        save(states, layer, step)
    assert {path.name for path in tmp_path.iterdir()} == {"step-10", "step-100"} and states.step == 100
    (tmp_path / "step-100" / "progress.json").unlink()
    assert load(states, layer) == (10, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-10"]
    states.total_limit = 1
    save(states, layer, 11)
    assert [path.name for path in tmp_path.iterdir()] == ["step-11"]


def test_a_state_of_the_same_step_grows_by_what_is_known(tmp_path):
    states, layer = small_training(tmp_path)
    save(states, layer, 3)
    before = (tmp_path / "step-3" / "model.safetensors").stat().st_mtime_ns
    states.save({"settings": SETTINGS, "epoch": 7}, 3)
    assert load(states, layer) == (7, 3)
    assert (tmp_path / "step-3" / "model.safetensors").stat().st_mtime_ns == before


def test_a_full_disk_is_one_clear_error_and_leaves_the_state_of_before(tmp_path):
    states, layer = small_training(tmp_path)
    save(states, layer, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"The state .*step-2 cannot be written: .*Make room.*--resume goes on from it"):
            save(states, layer, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load(states, layer) == (1, 1)
    save(states, layer, 2)
    assert load(states, layer) == (2, 2)


def test_an_output_folder_that_cannot_be_written_is_refused_before_anything_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "set_up", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"The output folder .*file/run cannot be written"):
        train.main([*TINY, "--output_dir", str(tmp_path / "file" / "run")])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_schedule_is_read_again(tmp_path, scheduler):
    states, layer = small_training(tmp_path, scheduler)
    expected = states.accelerator._schedulers[0].state_dict()
    save(states, layer, 1)
    states, layer = small_training(tmp_path, scheduler)
    states.accelerator._schedulers[0].step()
    assert load(states, layer) == (1, 1)
    assert states.accelerator._schedulers[0].state_dict() == expected


class Poison:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


POISONED = ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "model.safetensors"]
POISONED += ["pytorch_model.bin", "custom_checkpoint_0.pkl"]  # which Accelerate knows too, and we never write


@pytest.mark.parametrize("name", POISONED)
@pytest.mark.parametrize("dump", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_nothing_in_a_state_is_executed(tmp_path, name, dump):
    states, layer = small_training(tmp_path / "state")
    save(states, layer, 1)
    names = {path.name for path in (tmp_path / "state/step-1").iterdir()}
    assert names == {*POISONED[:4], "progress.json"}
    if name == "pytorch_model.bin":
        (tmp_path / "state/step-1/model.safetensors").unlink()
    with (tmp_path / "state/step-1" / name).open("wb") as file:
        dump(Poison(tmp_path / "executed"), file)
    with pytest.raises(ValueError, match=r"The state .*step-1 cannot be read: .*holds more than data\. Remove the folder"):
        load(states, layer)
    assert not (tmp_path / "executed").exists()


def test_states_that_would_be_unpickled_are_refused(tmp_path):
    plugin = SimpleNamespace(state_dict_type=StateDictType.SHARDED_STATE_DICT)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match="`fsdp_state_dict_type` must be FULL_STATE_DICT, got SHARDED_STATE_DICT"):
        States(accelerator, tmp_path, 1)


@pytest.mark.parametrize(("scheduler", "is_told"), [("multistep", False), ("constant", False), ("cosine", True)])
def test_more_epochs_may_change_the_schedule(scheduler, is_told, caplog):
    PartialState()  # Accelerate's loggers need it
    before = {"epochs": 2, "lr_scheduler": scheduler}
    refuse_another_run(Path("state"), before, before | {"epochs": 3, "report_to": "none"})
    assert ("`epochs` was 2 and is 3" in caplog.text) == is_told


def test_resume_without_a_state_begins(tmp_path):
    train.main([*TINY, "--output_dir", str(tmp_path), "--epochs", "1", "--resume"])
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-3"]


def leave_state(folder: Path, epoch: int) -> None:
    """Of a run of two epochs."""
    (folder / "state" / "step-7").mkdir(parents=True)
    progress = {"epoch": epoch, "settings": {"epochs": 2}}
    (folder / "state" / "step-7" / "progress.json").write_text(json.dumps(progress))


def test_a_new_run_does_not_resume_an_earlier_one(tmp_path):
    leave_state(tmp_path, epoch=2)
    train.main([*TINY, "--output_dir", str(tmp_path), "--epochs", "1"])
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-3"]


def test_a_new_run_does_not_remove_one_that_was_stopped(tmp_path):
    leave_state(tmp_path, epoch=1)
    with pytest.raises(ValueError, match=r"step-7 holds a run that was stopped in epoch 2 of 2, .*Go on with --resume"):
        train.main([*TINY, "--output_dir", str(tmp_path)])
    assert (tmp_path / "state" / "step-7" / "progress.json").is_file()


def test_a_new_checkpoint_leaves_nothing_of_the_old_one(tmp_path):
    old = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "metrics.json", "README.md"]
    for name in [*old, "metrics-test.json", "ranks-test.npz", "uncertainty-test.json", "training_images.npz", "notes.txt"]:
        (tmp_path / name).write_text("old")
    (tmp_path / "new").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "new" / name).write_text("new")
    replace_checkpoint(tmp_path, tmp_path / "new")
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == {"config.json": "new", "model.safetensors": "new", "tokenizer.json": "new", "notes.txt": "old"}


@pytest.mark.parametrize("words", ["", " --resume", " --resume true", " --resume=True", " --resume 1"])
def test_the_recorded_command_is_that_of_the_whole_run(words):
    assert without_resume(f"train.py a.yaml{words} --seed 1") == "train.py a.yaml --seed 1"
    assert without_resume(f"train.py a.yaml --seed 1{words}") == "train.py a.yaml --seed 1"
