"""Runs that are killed, stopped and resumed, for real: they end as the one that was left alone, to the last bit."""

import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate import Accelerator
from test_train import TINY
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModel

from granalign_hf.training import train
from granalign_hf.training.interruption import Interruption

# Two epochs of four steps; states after steps 2, 4, 6 and 8.
SMALL = [*TINY, "--num_scenes", "32", "--save_steps", "2", "--total_limit", "2"]
PROCESSES = multiprocessing.get_context("forkserver")  # all of them fork from one that has imported torch
PROCESSES.set_forkserver_preload(["granalign_hf.training.train"])
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
TIMES = ("seconds", "hours", "date")


def one_thread(*_) -> None:
    """Stands in for `set_up_torch`: threads of several runs would wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def run_with_one_thread(monkeypatch):
    monkeypatch.setattr(train, "set_up_torch", one_thread)


class Moment(NamedTuple):
    """What happens in a run for the `count`-th time: a step, or something that is done to a file of its output."""

    what: str
    count: int


def observed_run(argv: list[str], output: Path, act, ranks: tuple[int, int, int] | None = None) -> None:
    """A run that calls `act` with each moment, and writes all of them down."""
    if ranks:
        rank, size, port = ranks
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    moments: list[Moment] = []

    def happened(what: str) -> None:
        moments.append(Moment(what, 1 + sum(moment.what == what for moment in moments)))
        act(moments[-1])

    def audit(event: str, args: tuple) -> None:
        if event in FILE_EVENTS and str(args[0]).startswith(str(output)):
            happened(f"{event} {os.path.relpath(args[0], output)}")

    train.set_up_torch = one_thread
    register_optimizer_step_post_hook(lambda *_: happened("step"))
    sys.addaudithook(audit)
    train.main([*argv, "--output_dir", str(output)])
    output.with_name(f"{output.name}-moments.json").write_text(json.dumps(moments))


def nothing(moment: Moment) -> None:
    pass


def send_at(which: signal.Signals, when: Moment, moment: Moment) -> None:
    if moment == when:
        os.kill(os.getpid(), which)


def die_while_writing(limit: int, when: Moment, moment: Moment) -> None:
    """From then on the system ends the process in the middle of the first file of more than `limit` bytes."""
    if moment == when:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


kill_at = functools.partial(functools.partial, send_at, signal.SIGKILL)
terminate_at = functools.partial(functools.partial, send_at, signal.SIGTERM)


def run_process(argv: list[str], output: Path, act=nothing) -> int | None:
    """The exit code of a run in a process of its own."""
    process = PROCESSES.Process(target=observed_run, args=(argv, output, act))
    process.start()
    process.join()
    return process.exitcode


def run_two_processes(argv: list[str], output: Path, act_of_second=nothing) -> list[int | None]:
    """The exit codes of a run of two processes; one that waits for another that was killed is killed too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    acts = (nothing, act_of_second)
    pair = [PROCESSES.Process(target=observed_run, args=(argv, output, act, (n, 2, port))) for n, act in enumerate(acts)]
    for process in pair:
        process.start()
    multiprocessing.connection.wait([process.sentinel for process in pair])
    for process in pair:
        process.join(120 if all(p.exitcode in (None, 0, 143) for p in pair) else 0)
        process.kill()
        process.join()
    return [process.exitcode for process in pair]


def remains(output: Path) -> dict[str, bytes | dict]:
    """What a run leaves: every file to the last byte, but for times and settings."""
    files: dict[str, bytes | dict] = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        name = str(path.relative_to(output))
        if path.name in ("metrics.json", "progress.json"):
            content = json.loads(path.read_text())
            files[name] = {key: value for key, value in content.items() if key not in (*TIMES, "settings", "command")}
        else:
            files[name] = b"with times" if path.name == "README.md" else path.read_bytes()
    return files


def assert_same(got: dict, expected: dict) -> None:
    assert list(got) == list(expected)
    for name in expected:
        assert got[name] == expected[name], name


class Whole(NamedTuple):
    """A run that nothing interrupts: its folder, what it leaves, and all that happens in it."""

    output: Path
    files: dict[str, bytes | dict]
    moments: list[Moment]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert run_process(SMALL, output) == 0
    moments = json.loads(output.with_name("run-moments.json").read_text())
    return Whole(output, remains(output), [Moment(*moment) for moment in moments])


def test_a_whole_run_leaves_its_last_states_and_nothing_unfinished(whole):
    files = whole.files
    assert {name.split("/")[1] for name in files if name.startswith("state/")} == {"step-6", "step-8"}
    assert not [name for name in files if "unfinished" in name or name.endswith(".tmp")]
    assert files["state/step-8/progress.json"]["epoch"] == 2 and files["state/step-6/progress.json"]["step"] == 2
    assert whole.moments[-1] not in (Moment("step", 8), Moment("step", 1))


def test_killed_in_the_middle_of_an_epoch_and_resumed_with_other_workers(whole, tmp_path):
    assert run_process(SMALL, tmp_path / "run", kill_at(Moment("step", 7))) == -signal.SIGKILL
    assert {path.name for path in tmp_path.glob("run/state/*")} == {"step-4", "step-6"}
    assert run_process([*SMALL, "--resume", "--num_workers", "1"], tmp_path / "run") == 0
    assert_same(remains(tmp_path / "run"), whole.files)


def test_killed_in_the_middle_of_a_file_of_a_state(whole, tmp_path):
    limit = len(whole.files["state/step-6/model.safetensors"])  # less than the optimiser's state
    act = functools.partial(die_while_writing, limit, Moment("step", 6))
    assert run_process(SMALL, tmp_path / "run", act) == -signal.SIGXFSZ
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "run/state/step-6").iterdir()}
    assert sizes == {"model.safetensors": limit, "optimizer.bin": limit}
    assert run_process([*SMALL, "--resume"], tmp_path / "run") == 0
    assert_same(remains(tmp_path / "run"), whole.files)


def test_killed_while_the_best_checkpoint_is_replaced(whole, tmp_path):
    moves = [moment for moment in whole.moments if moment.what.startswith("os.rename checkpoint-unfinished/")]
    assert run_process(SMALL, tmp_path / "run", kill_at(moves[2])) == -signal.SIGKILL
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModel.from_pretrained(tmp_path / "run")
    assert run_process([*SMALL, "--resume"], tmp_path / "run") == 0
    assert_same(remains(tmp_path / "run"), whole.files)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_any_moment(whole, tmp_path, seed):
    when = random.Random(seed).choice(whole.moments)
    act = functools.partial(die_while_writing, 10_000, when) if seed % 3 == 2 else kill_at(when)
    code = run_process(SMALL, tmp_path / "run", act)
    assert code in (-signal.SIGKILL, -signal.SIGXFSZ) or whole.moments.index(when) > whole.moments.index(("step", 8))
    is_saved = any(tmp_path.glob("run/state/*/progress.json"))
    assert run_process([*SMALL, "--resume"] if is_saved else SMALL, tmp_path / "run") == 0
    assert_same(remains(tmp_path / "run"), whole.files)


def stop_at_step(number: int, which: signal.Signals, argv: list[str]) -> int:
    """The exit code of a run in this process to which a signal is sent during a step."""
    steps: list[str] = []

    def stepped(*_) -> None:
        steps.append("step")
        if len(steps) == number:
            os.kill(os.getpid(), which)

    hook = register_optimizer_step_post_hook(stepped)
    try:
        with pytest.raises(SystemExit) as left:
            train.main(argv)
    finally:
        hook.remove()
    assert len(steps) == number
    return left.value.code


@pytest.mark.parametrize(("which", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_after_the_step_and_leaves(which, code, whole, tmp_path, capsys):
    argv = [*SMALL, "--output_dir", str(tmp_path)]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert stop_at_step(3, which, argv) == code
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    line = f"{which.name}: the run is saved in {tmp_path / 'state/step-3'}. It goes on with --resume."
    assert line in capsys.readouterr().out.splitlines()
    if which == signal.SIGTERM:
        train.main([*argv, "--resume"])
        assert_same(remains(tmp_path), whole.files)


@pytest.mark.slow
def test_a_signal_between_the_batches_of_an_update_waits_for_it(tmp_path):
    argv = [*SMALL, "--gradient_accumulation_steps", "3", "--micro_batch_size", "3"]  # updates after batches 3 and 4
    train.main([*argv, "--output_dir", str(tmp_path / "whole")])
    stopped = [*argv, "--output_dir", str(tmp_path / "stopped")]
    assert stop_at_step(3, signal.SIGTERM, stopped) == 143
    assert {path.name for path in (tmp_path / "stopped/state").iterdir()} == {"step-4", "step-7"}
    train.main([*stopped, "--resume"])
    assert_same(remains(tmp_path / "stopped"), remains(tmp_path / "whole"))


@pytest.fixture
def listens_to_ctrl_c():
    """A shell has its background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_leaves_at_once(listens_to_ctrl_c):
    with Interruption(Accelerator()) as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.agreed_signal() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_go_on_after_a_kill(tmp_path):
    argv = [*SMALL, "--batch_size", "4"]
    assert run_two_processes(argv, tmp_path / "whole") == [0, 0]
    expected = remains(tmp_path / "whole")
    assert {"state/step-8/random_states_0.pkl", "state/step-8/random_states_1.pkl"} < set(expected)
    output = tmp_path / "run"
    assert run_two_processes(argv, output, terminate_at(Moment("step", 1))) == [143, 143]  # sent to one of them
    assert [path.name for path in (output / "state").iterdir()] == ["step-1"]
    assert run_two_processes([*argv, "--resume"], output, kill_at(Moment("step", 6)))[1] == -signal.SIGKILL
    assert (output / "state/step-6/progress.json").is_file()
    assert run_two_processes([*argv, "--resume"], output) == [0, 0]
    assert_same(remains(output), expected)


def test_a_run_of_other_settings_is_not_resumed(whole, tmp_path):
    shutil.copytree(whole.output, tmp_path / "run")
    changed = ["--batch_size", "4", "--seed", "1", "--margin", "0.3", "--num_workers", "1"]
    with pytest.raises(ValueError) as refused:
        train.main([*SMALL, *changed, "--output_dir", str(tmp_path / "run"), "--resume"])
    had = "which had seed 0 (now 1), batch_size 8 (now 4), batches_per_epoch 4 (now 8), margin None (now 0.3)."
    assert had in str(refused.value) and "start a new one without --resume" in str(refused.value)
