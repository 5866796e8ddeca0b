"""Several real processes on one machine, joined by gloo, as `accelerate launch` joins them."""

import os
import socket
import time
from collections.abc import Callable
from multiprocessing import get_context

import torch

SECONDS = 300  # a process that waits for another one would wait for hours


def run_processes(function: Callable, count: int, *args, **environment: str) -> None:
    """Calls `function(rank, *args)`, which has to be importable, in `count` new processes; raises what one of them does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    # The server imports what takes seconds once, and every process is a fork of it.
    get_context("forkserver").set_forkserver_preload(["granalign_hf.training.train"])
    processes = torch.multiprocessing.start_processes(
        _in_environment, (environment, function, args), nprocs=count, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + SECONDS
    while not processes.join(timeout=5):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} in {count} processes took more than {SECONDS} s.")


def _in_environment(rank: int, environment: dict[str, str], function: Callable, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true", **environment}
    torch.set_num_threads(1)
    function(rank, *args)
    time.sleep(0.2)  # see `end_training`
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
