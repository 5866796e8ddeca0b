"""The machine that a run is on: threads, precision of float32 products, and its description."""

from __future__ import annotations

import os
import platform
import shlex
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env


def set_up_torch(matmul_precision: str, num_processes: int = 1) -> None:
    """Shares the cores between the processes (`accelerate launch` leaves one to each) and sets the precision of products.

    Args:
        matmul_precision: `highest`, `high` or `medium`, see `torch.set_float32_matmul_precision`.
    """
    torch.set_float32_matmul_precision(matmul_precision)
    if computes_on_cpu():
        torch.set_num_threads(max(len(available_cores()) // num_processes, 1))


def computes_on_cpu() -> bool:
    """Whether Accelerate takes the CPU: there is nothing else, or `accelerate launch --cpu` says so."""
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def cpu_has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 with vector instructions on this CPU; elsewhere torch does it value by value."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def available_cores() -> list[int]:
    """Numbers of the cores that this process may use: those that it was pinned to, where the system can pin."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def pin(process: int, cores: list[int]) -> None:
    """Keeps a process (its id) to some cores, where the system can; right after its start, so that its threads follow."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process, cores)


def portable(command: str) -> str:
    """A command as it may be published: of an absolute path only the last name stays."""
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in shlex.split(command))


def hardware() -> str:
    """In words, for the record of a run."""
    if torch.cuda.is_available() and not computes_on_cpu():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cores = len(available_cores())
    return f"{cores} CPU core{'s' if cores > 1 else ''} ({platform.machine()})"
