"""Several real processes on one machine, joined by gloo, as `accelerate launch` joins them."""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context

import torch


def run_processes(function: Callable, count: int, *args, **environment: str) -> None:
    """Calls `function(rank, *args)`, which has to be importable, in `count` new processes; raises what one of them does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    # The server imports what takes seconds once, and every process is a fork of it.
    get_context("forkserver").set_forkserver_preload(["granalign_hf.training.train"])
    torch.multiprocessing.start_processes(
        _in_environment, (environment, function, args), nprocs=count, start_method="forkserver"
    )


def _in_environment(rank: int, environment: dict[str, str], function: Callable, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true", **environment}
    torch.set_num_threads(1)
    function(rank, *args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
