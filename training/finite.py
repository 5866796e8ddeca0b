"""A loss or a gradient that is not finite ends the run before it reaches the weights; it is never set to zero."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn

from granalign_hf.training.gradient_cache import get_random_state, set_random_state


def check_finite(
    quantity: str, value: float, where: str, terms: dict[str, float], image_names: list[str], output_dir: str
) -> None:
    """Ends the run in all processes, which have the same `value`, unless it is finite.

    Args:
        quantity: what `value` is. where: epoch and step. terms: the loss and its terms. image_names: of the steps since the
            last update, in this process. output_dir: of the run.

    Raises:
        FloatingPointError: the message has all of this and the names of the images of all processes.
    """
    if math.isfinite(value):
        return
    names = gather_object(image_names)
    figures = ", ".join(f"{name} {term:g}" for name, term in terms.items())
    raise FloatingPointError(
        f"The {quantity} is {value} at {where}: {figures}. The state of before this step is saved in "
        f"{output_dir}/state, but --resume would meet the same batch again: look at its images, or begin anew "
        f"with a lower `learning_rate`. Images of the batch: {', '.join(names)}."
    )


class Rollback:
    """While it is open, a failure puts back what a forward pass changes: random state and statistics of batch norm."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device = model, device
        self.random_state = get_random_state(device)
        self.buffers = [buffer.clone() for buffer in model.buffers()]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None and issubclass(kind, FloatingPointError):
            set_random_state(self.device, self.random_state)
            for buffer, before in zip(self.model.buffers(), self.buffers, strict=True):
                buffer.copy_(before)


def may_overflow(accelerator: Accelerator) -> bool:
    """Whether a gradient that is not finite is part of the method: the scaler of fp16 skips the step and halves its scale.

    It does so some times at every start. At a scale of 1 or less the gradients themselves are not finite. DeepSpeed has a
    scaler of its own, and has updated the weights by now.
    """
    is_scaled = accelerator.scaler is not None and accelerator.scaler.get_scale() > 1
    return is_scaled or accelerator.distributed_type == DistributedType.DEEPSPEED
