"""One image after the other with captions of its own: encoded in batches, shared between the processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from granalign_hf.modeling.modeling_granalign import GranAlignModel
from granalign_hf.modeling.outputs import GranAlignTextOutput
from granalign_hf.modeling.processing_granalign import GranAlignProcessor
from granalign_hf.training.data import CaptionedImages

CAPTIONS_PER_STEP = 64


class Encoded(NamedTuple):
    """An image and its captions among the features of a batch."""

    number: int  # of the image in the split
    image_size: tuple[int, int]  # (width, height) of the picture
    pixel_size: tuple[int, int]  # (height, width) of what the vision encoder saw
    image: Any
    text: Any
    image_row: int  # of `image`
    rows: range  # of `text`


@torch.no_grad()
def measure_by_image(
    model: GranAlignModel,
    processor: GranAlignProcessor,
    data: CaptionedImages,
    texts: Mapping[int, list[str]],
    batch_size: int,
    measure: Callable[[Encoded], list],
) -> list:
    """What `measure` finds for each image, from all processes, sorted.

    Args:
        texts: number of an image -> its captions. batch_size: images in a step.
    """
    state = PartialState()
    model.eval()
    mine, found = list(texts)[state.process_index :: state.num_processes], []
    with tqdm(total=len(mine), desc="images", disable=not state.is_main_process) as bar:
        for start in range(0, len(mine), batch_size):
            numbers = mine[start : start + batch_size]
            pictures = [data.image(n) for n in numbers]
            inputs = processor(images=pictures, return_tensors="pt").to(model.device)
            image = model.get_image_features(**inputs)
            text = encode_captions(model, processor, [text for n in numbers for text in texts[n]])
            height, width = inputs["pixel_values"].shape[-2:]
            first = 0
            for index, (number, picture) in enumerate(zip(numbers, pictures, strict=True)):
                rows = range(first, first + len(texts[number]))
                found += measure(Encoded(number, picture.size, (height, width), image, text, index, rows))
                first = rows.stop
            bar.update(len(numbers))
    return sorted(gather_object(found), key=lambda one: one[0])


@torch.no_grad()
def encode_captions(model: GranAlignModel, processor: GranAlignProcessor, captions: list[str]) -> GranAlignTextOutput:
    """The tokens that an aligner scores, of captions that were encoded beside others of about their length."""
    lengths = [len(ids) for ids in processor.tokenizer(captions, truncation=True)["input_ids"]]
    order = sorted(range(len(captions)), key=lengths.__getitem__)
    place = torch.tensor(order, device=model.device).argsort()
    parts = []
    for start in range(0, len(order), CAPTIONS_PER_STEP):
        inputs = processor(text=[captions[n] for n in order[start : start + CAPTIONS_PER_STEP]], return_tensors="pt")
        parts.append(model.get_text_features(**inputs.to(model.device)))
    longest = max(part.word_mask.shape[1] for part in parts)

    def joined(name: str) -> Tensor | None:
        if parts[0].get(name) is None:
            return None
        padded = [pad(part[name], [0, 0] * (part[name].ndim - 2) + [0, longest - part[name].shape[1]]) for part in parts]
        return torch.cat(padded)[place]

    return GranAlignTextOutput(**{name: joined(name) for name in ("word_embeds", "word_mask", "word_saliency")})
