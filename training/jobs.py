"""Scripts of the training folder as processes, several at a time, each on its share of the cores."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Generic, NamedTuple, TypeVar

from granalign_hf.training.runtime import available_cores, pin

POLL_SECONDS = 0.2


class Step(NamedTuple):
    """A script with the words of its command line, for the run in a folder."""

    script: str
    words: list[str]
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / f"{self.script}.log"


_Run = TypeVar("_Run")


@dataclass
class _Job(Generic[_Run]):
    run: _Run
    steps: Iterator[Step]
    step: Step
    cores: list[int] | None


def finish(work: list[tuple[_Run, Iterator[Step]]], jobs: int) -> Iterator[_Run]:
    """Takes the steps of each run, `jobs` processes at a time; gives each run when it is finished.

    The next step of a run is asked for when the one before has succeeded. Whatever ends it, a failure, Ctrl-C or SIGTERM,
    ends the processes too.

    Raises:
        RuntimeError: a process failed; the message names its log. And what the steps raise.
    """
    cores = available_cores()
    free = [cores[job::jobs] if jobs > 1 else None for job in range(jobs)]
    waiting = list(work)
    active: dict[subprocess.Popen, _Job[_Run]] = {}
    with _sigterm_raises(), _ended(active):
        while waiting or active:
            while waiting and free:
                run, steps = waiting.pop(0)
                step = next(steps, None)
                if step is None:
                    yield run
                else:
                    share = free.pop()
                    active[_start(step, share)] = _Job(run, steps, step, share)
            time.sleep(POLL_SECONDS)
            for process in [process for process in active if process.poll() is not None]:
                job = active.pop(process)
                if process.returncode != 0:
                    told = f"; see {job.step.log}" if jobs > 1 else ""
                    raise RuntimeError(
                        f"{job.step.script} of {job.step.folder} failed with exit status {process.returncode}{told}"
                    )
                free.append(job.cores)
                waiting.insert(0, (job.run, job.steps))


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """While it is open, SIGTERM raises SystemExit, so that what is started is ended too."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _ended(processes: Collection[subprocess.Popen]) -> Iterator[None]:
    """Ends the processes that are there when it is closed."""
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def _start(step: Step, cores: list[int] | None) -> subprocess.Popen:
    """The script as a process of its own; on a share of the cores its output goes to a file."""
    command = [sys.executable, "-m", f"granalign_hf.training.{step.script}", *step.words]
    if cores is None:
        return subprocess.Popen(command)
    with step.log.open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    pin(process.pid, cores)
    return process
