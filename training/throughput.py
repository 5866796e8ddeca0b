"""How fast a training goes: pairs per second, and the share of the time in which it waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator


class Throughput:
    """Of the batches that went through [`watch`].

    Args:
        num_processes: that train side by side, each on batches of its own.
    """

    def __init__(self, num_processes: int = 1):
        self.num_processes = num_processes
        self.started, self.waited, self.pairs = time.perf_counter(), 0.0, 0

    def watch(self, batches: Iterable[dict]) -> Iterator[dict]:
        """The batches, whose captions count as pairs; the time until each comes is waiting."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            self.pairs += len(batch["caption_image_ids"])
            yield batch

    def rates(self) -> dict[str, float]:
        """`pairs_per_second` of all processes and `data_wait_share` (0 to 1) so far."""
        seconds = time.perf_counter() - self.started
        return {"pairs_per_second": self.num_processes * self.pairs / seconds, "data_wait_share": self.waited / seconds}


def shown(rates: dict[str, float], num_corrupt: int) -> dict[str, str]:
    """For the progress bar; images that were left out only where there are some."""
    parts = {"pairs/s": f"{rates['pairs_per_second']:.0f}", "waiting": f"{rates['data_wait_share']:.0%}"}
    return parts | ({"corrupt": str(num_corrupt)} if num_corrupt else {})
