"""Shared by the numeric tests: random tokens of any shape."""

from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import Tensor, nn

# The same examples in every run, however slow the machine is.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")

PRECISION, THREADS = torch.get_float32_matmul_precision(), torch.get_num_threads()


def _draw_tokens(
    seed: int = 0,
    *,
    images: int = 3,
    captions: int = 4,
    patches: int = 6,
    words: int = 5,
    regions: int = 3,
    dim: int = 4,
    has_holes: bool = True,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Unit-length tokens, saliencies, regions and masks with at least one real token a row, as keyword arguments."""
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        return nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)

    def mask(rows: int, length: int) -> Tensor:
        values = torch.rand(rows, length, generator=generator) < (0.6 if has_holes else 2.0)
        kept = torch.randint(length, (rows, 1), generator=generator)
        return values.scatter(1, kept, True)

    return {
        "patch_embeds": unit(images, patches, dim),
        "word_embeds": unit(captions, words, dim),
        "word_mask": mask(captions, words),
        "patch_mask": mask(images, patches),
        "patch_saliency": torch.rand(images, patches, generator=generator, dtype=torch.float64).to(dtype),
        "word_saliency": torch.rand(captions, words, generator=generator, dtype=torch.float64).to(dtype),
        "region_embeds": unit(images, regions, dim) / 2,
    }


@pytest.fixture
def draw_tokens() -> Callable[..., dict[str, Tensor]]:
    return _draw_tokens


def _restore_torch() -> None:
    torch.set_float32_matmul_precision(PRECISION)
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """A script sets the threads and the precision of the whole process, in a fixture of a module too; no test feels it."""
    _restore_torch()
    yield
    _restore_torch()


@pytest.fixture(autouse=True)
def short_streams_end_soon(monkeypatch) -> None:
    """`datasets` sleeps 5 s after each pass over Parquet files, for the threads that read them: here these are done."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


@pytest.fixture
def library_cache(tmp_path, monkeypatch) -> Path:
    """Where `datasets` prepares and unpacks what it loads from files: not at home."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "library cache")
    return tmp_path / "library cache"
