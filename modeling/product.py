"""The matrix product behind every score, by the faster of PyTorch's two public kernels."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

MIN_SIZE = 2**27  # multiplications; below, the conversions of oneDNN cost more than they save, in a graph above all


def all_products(words: Tensor, patches: Tensor) -> Tensor:
    """(W, d), (N, d) -> (W, N) inner products, in the dtype of the inputs.

    In float32 on AMD processors with AVX-512 this is oneDNN's kernel: MKL, which `torch.matmul` calls, keeps to AVX2 there.
    The choice depends on the processor and the shape alone, so that a run can be repeated to the bit.
    """
    if torch.compiler.is_exporting() or words.device.type != "cpu" or words.dtype != torch.float32:
        return words @ patches.T
    if len(words) * patches.numel() < MIN_SIZE or not _has_faster_onednn():
        return words @ patches.T
    return linear(words.to_mkldnn(), patches).to_dense()


@functools.cache
def _has_faster_onednn() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    vendor = cpuinfo.read_text() if cpuinfo.is_file() else platform.processor()
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.backends.mkldnn.is_available() and has_avx512 and "AuthenticAMD" in vendor
