"""How a run ends: by itself, or by SIGTERM and Ctrl-C after the step in progress, all processes after the same one."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator


def end_training(accelerator: Accelerator) -> None:
    """As Accelerate does it, and then waits for gloo.

    Its threads need the GIL to let go of what they gathered last, and the end of the process group, which comes with that of
    the model, keeps the GIL until they are through.
    """
    accelerator.end_training()
    time.sleep(0.2)


class Interruption:
    """While it is open, SIGTERM and the first Ctrl-C are only noted; a second Ctrl-C does what it did before."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._noted = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
        signal.signal(signal.SIGINT, self._handlers[signal.SIGINT])

    def agreed_signal(self) -> signal.Signals | None:
        """The signal that one of the processes was sent, if any: the same answer in all of them, each of which has to ask.

        One number is exchanged between the processes.
        """
        noted = torch.tensor([self._noted], device=self.accelerator.device)
        number = int(self.accelerator.gather(noted).max())
        return signal.Signals(number) if number else None
