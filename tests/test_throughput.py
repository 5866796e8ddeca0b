"""Pairs per second and waiting, by a clock that is set by hand."""

from types import SimpleNamespace

from granalign_hf.training import throughput
from granalign_hf.training.throughput import Throughput, shown


def test_pairs_and_waiting(monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(throughput, "time", clock)

    def batches():
        for seconds, pairs in ((3, 4), (1, 6)):
            clock.now += seconds
            yield {"caption_image_ids": range(pairs)}
        clock.now += 2  # to find that there are no more

    measured = Throughput(num_processes=2)
    rates = []
    for _ in measured.watch(batches()):
        clock.now += 5  # a step
        rates.append(measured.rates())
    assert rates[0] == {"pairs_per_second": 2 * 4 / 8, "data_wait_share": 3 / 8}
    assert rates[1] == {"pairs_per_second": 2 * 10 / 14, "data_wait_share": 4 / 14}
    assert shown(rates[0], 0) == {"pairs/s": "1", "waiting": "38%"}
    assert shown(rates[0], 3) == {"pairs/s": "1", "waiting": "38%", "corrupt": "3"}
