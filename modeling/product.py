"""The matrix product behind every score, by the fastest public kernel of the machine."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

PROBE_SHAPE = (512, 2048, 512)  # words, patches, features: 1 GFLOP
MIN_SIZE = 2**27  # multiplications of a product that is worth a choice
MIN_SPEEDUP = 1.3  # far from 1 on both sides: the choice does not flip from run to run


def all_products(words: Tensor, patches: Tensor) -> Tensor:
    """(W, d), (N, d) -> (W, N) inner products, in the dtype of the inputs.

    In float32 on some CPUs (AMD with AVX-512) MKL, which `torch.matmul` calls, runs at half the speed of oneDNN, which is
    in PyTorch too. Which one is faster here is measured once, and only for products that are worth it.
    """
    if torch.compiler.is_exporting() or words.device.type != "cpu" or words.dtype != torch.float32:
        return words @ patches.T
    is_worth_it = len(words) * patches.numel() >= MIN_SIZE and torch.backends.mkldnn.is_available()
    return _by_onednn(words, patches) if is_worth_it and _is_onednn_faster() else words @ patches.T


def _by_onednn(words: Tensor, patches: Tensor) -> Tensor:
    return linear(words.to_mkldnn(), patches).to_dense()


@functools.cache
def _is_onednn_faster() -> bool:
    num_words, num_patches, dim = PROBE_SHAPE
    words, patches = torch.ones(num_words, dim), torch.ones(num_patches, dim)
    with torch.no_grad():
        pairs = [(_seconds(torch.matmul, words, patches.T), _seconds(_by_onednn, words, patches)) for _ in range(4)]
    return min(matmul for matmul, _ in pairs) > MIN_SPEEDUP * min(onednn for _, onednn in pairs)


def _seconds(product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> float:
    started = time.perf_counter()
    product(left, right)
    return time.perf_counter() - started
