"""A loss or a gradient that is not finite ends the run before it reaches the weights; it is never set to zero."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

if TYPE_CHECKING:
    from granalign_hf.training.train import Training


def check_finite(training: Training, quantity: str, value: float, where: str, terms: dict[str, float], batch: dict) -> None:
    """Ends the run in all processes, which have the same `value`, unless it is finite.

    Args:
        quantity: what `value` is. where: epoch and step. terms: the loss and its terms. batch: with `image_names`.

    Raises:
        FloatingPointError: the message has all of this and the names of the images of all processes.
    """
    if math.isfinite(value):
        return
    names = gather_object(batch["image_names"])
    figures = ", ".join(f"{name} {term:g}" for name, term in terms.items())
    raise FloatingPointError(
        f"The {quantity} is {value} at {where}: {figures}. The state of before this step is saved in "
        f"{training.run.output_dir}/state, but --resume would meet the same batch again: look at its images, or begin anew "
        f"with a lower `learning_rate`. Images of the batch: {', '.join(names)}."
    )


def may_overflow(accelerator: Accelerator) -> bool:
    """Whether a gradient that is not finite is part of the method: the scaler of fp16 skips the step and halves its scale.

    It does so some times at every start. At a scale of 1 or less the gradients themselves are not finite. DeepSpeed has a
    scaler of its own, and has updated the weights by now.
    """
    is_scaled = accelerator.scaler is not None and accelerator.scaler.get_scale() > 1
    return is_scaled or accelerator.distributed_type == DistributedType.DEEPSPEED
