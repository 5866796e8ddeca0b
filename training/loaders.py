"""What a run trains on: the images of its split, in an order, in batches, shared between processes."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from granalign_hf.training.arguments import RunArguments
from granalign_hf.training.batches import TrainingSet
from granalign_hf.training.corrupt import without_corrupt
from granalign_hf.training.data import CaptionedImages, load_split
from granalign_hf.training.streams import StreamedImages


def training_data(run: RunArguments, accelerator: Accelerator) -> CaptionedImages | StreamedImages:
    """The training split, without what cannot be read of it, or as a stream of which this process reads its part."""
    if not run.streaming:
        data = load_split(run.dataset, run.train_split, **run.load_options, num_scenes=run.num_scenes)
        data = data.first(run.max_train_images)
        return without_corrupt(data, run.max_corrupt_share, run.num_workers) if run.max_corrupt_share > 0 else data
    same = ("captions_per_image", "crop_scale", "seed", "batch_size", "steps_per_epoch", "shuffle_buffer", "num_workers")
    settings = {name: getattr(run, name) for name in (*same, "max_corrupt_share")}
    process = (accelerator.process_index, accelerator.num_processes)
    source = (run.dataset, run.train_split, run.dataset_config, run.split_column, run.columns)
    return StreamedImages.open(*source, **settings, process=process)


class Shuffled(RandomSampler):
    """The items of an epoch in an order that depends on the state of the generator only."""

    def __iter__(self) -> Iterator[int]:
        # A loader draws a seed for its workers before the order, and twice where it starts them. It gets a generator of its
        # own; this draw keeps the orders that loaders without workers had.
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        return super().__iter__()


def training_loader(
    images: TrainingSet, collate: Callable, batch_size: int, num_workers: int, order: torch.Generator, is_pinned: bool
) -> DataLoader:
    """Batches of what is trained on, in an order that `order` draws (a stream has its own), all of them whole.

    Args:
        num_workers: processes that read, decode and collate; they live as long as the loader.
        is_pinned: whether batches are put where a GPU can copy them from while it computes.
    """
    return DataLoader(
        images,
        batch_size,
        sampler=None if isinstance(images, IterableDataset) else Shuffled(images, generator=order),
        generator=torch.Generator(),
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_the_run,
        persistent_workers=num_workers > 0,
        pin_memory=is_pinned,
        drop_last=True,
    )


def _leave_signals_to_the_run(_: int) -> None:
    """What ends a run reaches its workers too; they must live until the step in progress is done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Those that are left, after an error say: the interpreter would send them SIGTERM, and wait without end."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def prepare(accelerator: Accelerator, model, optimizer, loader: DataLoader) -> tuple:
    """As `accelerator.prepare`, but for a stream, which is shared between the processes already: its batches only move."""
    if not isinstance(loader.dataset, IterableDataset):
        return accelerator.prepare(model, optimizer, loader)
    moved = prepare_data_loader(loader, accelerator.device, 1, 0, put_on_device=True, dispatch_batches=False)
    return *accelerator.prepare(model, optimizer), moved
