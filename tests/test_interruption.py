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
