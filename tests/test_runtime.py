"""The machine of a run: the cores that it may use, and commands as they may be published."""

import os
import subprocess
import sys

import pytest
import torch

from granalign_hf.training.runtime import available_cores, hardware, pin, portable, set_up_torch

CODE = "import sys; sys.stdin.readline(); from granalign_hf.training import runtime; print(runtime.available_cores())"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin processes to cores")
def test_a_pinned_process_counts_its_own_cores():
    last = available_cores()[-1:]
    process = subprocess.Popen([sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pin(process.pid, last)
    assert process.communicate("go\n")[0].strip() == str(last)


def test_threads_are_shared_between_processes():
    cores = len(available_cores())
    set_up_torch("high", num_processes=cores)
    assert torch.get_float32_matmul_precision() == "high"
    if not torch.cuda.is_available():
        assert torch.get_num_threads() == 1
        set_up_torch("high")
        assert torch.get_num_threads() == cores
        assert hardware().startswith("1 CPU core (" if cores == 1 else f"{cores} CPU cores (")


def test_of_an_absolute_path_only_the_last_name_is_published():
    assert portable("train.py /home/someone/recipe.yaml --output_dir runs/a") == "train.py recipe.yaml --output_dir runs/a"
