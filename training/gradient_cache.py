"""Batches beyond memory: gradient caching (Gao et al. 2021, arXiv 2101.06983), exact and in the memory of a part.

The loss needs the tokens of the whole batch, but not their graph. So the batch is encoded part by part without a graph, the
loss gives a gradient for every token, and each part is encoded once more, with the same noise and dropout, to take its
gradients on to the parameters. A batch in one part keeps its graph instead, and is encoded once. Apart from the activations
of a part, the memory holds the tokens of the batch and their gradients: 8 d bytes a token.

The loss gathers over the processes and the parameters synchronise their gradients at different times, never entangled.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils import ModelOutput

from granalign_hf.modeling.modeling_granalign import GranAlignModel
from granalign_hf.training.distributed import IMAGE_FIELDS, TEXT_FIELDS, gather_sizes

IMAGE_INPUTS = ("pixel_values", "vision_model_output", "image_size")
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "text_model_output")


class TokenEncoder(nn.Module):
    """What several processes train: its forward pass ends at the tokens, as the loss needs those of the other processes."""

    def __init__(self, model: GranAlignModel):
        super().__init__()
        self.model = model
        # The units of FSDP: layers of the encoders. Its casts would take the aligner's maxima and means out of float32.
        encoders = (model.vision_model, model.text_model)
        names = {name for encoder in encoders for name in encoder._no_split_modules or ()}
        self._no_split_modules = sorted(names & {type(module).__name__ for module in self.modules()})

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """A batch of the collator -> all that the loss needs, by the names of the outputs of the model."""
        image = self.model.get_image_features(**{n: batch[n] for n in IMAGE_INPUTS if n in batch}, return_dict=True)
        text = self.model.get_text_features(**{n: batch[n] for n in TEXT_INPUTS if n in batch}, return_dict=True)
        return {n: image[n] for n in IMAGE_FIELDS if n in image} | {n: text[n] for n in TEXT_FIELDS if n in text}


class CachedTokens:
    """The tokens of a batch, and the way from their gradients to those of the parameters.

    `tokens` are leaves: call `backward` on a loss of them, then [`~CachedTokens.backward`] here.

    Args:
        encoder: a [`TokenEncoder`], prepared by the accelerator.
        micro_batch_size: images that are encoded at a time. `None`: all.
    """

    def __init__(self, accelerator: Accelerator, encoder: nn.Module, batch: dict[str, Any], micro_batch_size: int | None):
        self.accelerator, self.encoder = accelerator, encoder
        self.parts = split_batch(batch, num_parts(len(batch["image_ids"]), micro_batch_size, accelerator.device))
        self.random_state = get_random_state(accelerator.device)
        has_one_part = len(self.parts) == 1
        statistics = [] if has_one_part else [buffer.clone() for buffer in encoder.buffers()]
        with torch.set_grad_enabled(has_one_part):
            encoded = [encoder(part) for part in self.parts]
        for buffer, before in zip(encoder.buffers(), statistics, strict=False):
            buffer.copy_(before)  # batch norm counts each part once, in the second pass
        self.with_graph = encoded[0] if has_one_part else None
        self.tokens = {
            name: (first if has_one_part else torch.cat([of_part[name] for of_part in encoded])).detach()
            for name, first in encoded[0].items()
        }
        for values in self.tokens.values():
            values.requires_grad_(values.is_floating_point())

    def backward(self, weight: float = 1.0) -> None:
        """Adds the gradients of the parameters, of the sum of the losses of all processes, to what they have.

        Args:
            weight: of these gradients, beside the share that the accelerator gives each step of an accumulation.
        """
        gradients: list[dict[str, Tensor]] = [{} for _ in self.parts]
        for name, values in self.tokens.items():
            if values.grad is not None:
                for of_part, gradient in zip(gradients, values.grad.tensor_split(len(self.parts)), strict=True):
                    of_part[name] = gradient
        if self.with_graph is None:
            set_random_state(self.accelerator.device, self.random_state)
        for number, (part, of_part) in enumerate(zip(self.parts, gradients, strict=True), start=1):
            is_last = number == len(self.parts)
            with nullcontext() if is_last else self.accelerator.no_sync(self.encoder):
                tokens = self.encoder(part) if self.with_graph is None else self.with_graph
                # Processes average their gradients, but the loss is the sum of their parts.
                self.accelerator.backward(weight * self.accelerator.num_processes * _surrogate(tokens, of_part))


def _surrogate(tokens: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
    """A number whose gradient in the tokens is the one given, and 0 in the other tokens: DDP waits for all of them."""
    zero = {
        name: torch.zeros_like(values) for name, values in tokens.items() if values.requires_grad and name not in gradients
    }
    return torch.stack([tokens[n].flatten() @ g.flatten() for n, g in (gradients | zero).items()]).sum()


def num_parts(num_images: int, micro_batch_size: int | None, device: torch.device | None = None) -> int:
    """Of the batches of all processes: as many everywhere, since parts synchronise, and no more than one has images."""
    if micro_batch_size is None:
        return 1
    numbers = [own for (own,) in gather_sizes(num_images, device=device)]
    return min(math.ceil(max(numbers) / micro_batch_size), min(numbers))


def split_batch(batch: dict[str, Any], num_parts: int) -> list[dict[str, Any]]:
    """Parts of nearly equal numbers of images, and of captions; a caption need not be where its image is."""
    columns = {name: _split(value, num_parts) for name, value in batch.items()}
    return [{name: parts[number] for name, parts in columns.items()} for number in range(num_parts)]


def _split(value: Any, num_parts: int) -> list[Any]:
    if isinstance(value, Tensor):
        return list(value.tensor_split(num_parts))
    if isinstance(value, ModelOutput):
        return [type(value)(**fields) for fields in split_batch(dict(value), num_parts)]
    return [value] * num_parts


def get_random_state(device: torch.device) -> list[Tensor]:
    """Of the CPU, and of the device if it has one of its own."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)
