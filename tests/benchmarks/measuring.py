"""Side-by-side timing and peak memory of contenders in one run."""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path


def alternate(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round; they take turns, so that a slow moment of the machine meets all of them.

    A round before the others warms up, unless there is only one: runs of a minute need none.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for is_counted in [False] * (rounds > 1) + [True] * rounds:
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if is_counted:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], numerator: str, denominator: str) -> float:
    """Median over rounds of the quotient of two contenders."""
    return statistics.median(a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True))


def milliseconds(seconds: dict[str, list[float]], name: str) -> float:
    return 1000 * statistics.median(seconds[name])


def peak_megabytes(prepare: Callable[..., Callable[[], object]], *args) -> float | None:
    """Peak memory of `prepare(*args)()` above what `prepare` left behind, in a process of its own; `None` if not Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(sender, prepare, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{prepare.__name__}{args} ended without a figure, exit code {process.exitcode}.") from None
    finally:
        process.join()


def grown_megabytes(run: Callable[[], object]) -> tuple[float | None, float | None]:
    """Peak of this process's own memory during `run` above that before, looked at each millisecond, and how much more of
    files is mapped after it, which the system takes back when it needs room; `None` if not Linux.
    """
    if not Path("/proc/self/status").exists():
        return None, None
    before, mapped, peaks, is_over = _status("RssAnon"), _status("RssFile"), [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.001):
            peaks.append(_status("RssAnon") - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    peaks.append(_status("RssAnon") - before)
    is_over.set()
    watcher.join()
    return max(peaks) / 1e6, (_status("RssFile") - mapped) / 1e6


def _measure_peak(sender, prepare, args) -> None:
    run = prepare(*args)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run()
    sender.send((_status("VmHWM") - before) / 1e6)


def _status(field: str) -> int:
    """Bytes of a field of this process's status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
