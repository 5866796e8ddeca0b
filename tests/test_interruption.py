"""What schedulers send reaches a run and its workers at once."""

import os
import signal
import subprocess
import sys
import time

import pytest
from test_train import TINY


@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_step_in_progress(tmp_path):
    log = tmp_path / "log"
    argv = [*TINY, "--num_scenes", "400", "--epochs", "4", "--num_workers", "2", "--output_dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "granalign_hf.training.train", *argv]
    with log.open("w") as file:
        run = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    deadline = time.monotonic() + 120
    while " 3/" not in log.read_text() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait(60) == 128 + signal.SIGTERM, log.read_text()[-2000:]
    assert len(list((tmp_path / "run" / "state").glob("step-*/progress.json"))) == 1


FAILS_WITH_LIVING_WORKERS = """
import torch
from granalign_hf.training.loaders import training_loader

loader = training_loader(range(8), None, 2, 2, torch.Generator(), is_pinned=False)
batches = iter(loader)
next(batches)
raise ValueError("the run has failed")
"""


def test_a_run_that_fails_does_not_wait_for_its_workers():
    """The interpreter sends those that are left SIGTERM and waits for them: without end, were they deaf to it."""
    run = subprocess.run([sys.executable, "-c", FAILS_WITH_LIVING_WORKERS], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "the run has failed" in run.stderr
