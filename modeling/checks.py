"""What a model is given, checked before it is used: one clear error for each way to be wrong."""

from __future__ import annotations

import difflib

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .configuration_granalign import GranAlignConfig
from .encoders import max_caption_length


def check_encoder(encoder: nn.Module, side: str, input_name: str) -> None:
    """Raises ValueError for the encoder of the other side: the first batch would notice, but not name it."""
    if encoder.main_input_name != input_name:
        raise ValueError(
            f"The {side} encoder must take `{input_name}`, but {type(encoder).__name__} takes `{encoder.main_input_name}`. "
            f"Pass a {side} encoder as `{side}_model` (`{side}_model_name_or_path`, `{side}_config`)."
        )


def check_fields(fields: dict) -> None:
    """Raises ValueError for a name that is no field of `GranAlignConfig`, which itself takes any."""
    known = GranAlignConfig.__dataclass_fields__
    unknown = [name for name in fields if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean `{close[0]}`?" if close else " Arguments of an encoder begin with `vision_` or `text_`."
        raise ValueError(f"`{unknown[0]}` is no field of GranAlignConfig.{hint}")


def check_tensor(name: str, value: Tensor, shape: str) -> None:
    """Raises ValueError unless `value` is a tensor, not empty, with as many dimensions as `shape` names."""
    given = str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
    if not isinstance(value, Tensor) or value.ndim != shape.count(",") + 1 or 0 in value.shape:
        raise ValueError(
            f'`{name}` must be a tensor of shape {shape}, got {given}. Pass `return_tensors="pt"` to GranAlignProcessor.'
        )


def check_index(name: str, index: int, length: int) -> None:
    """Raises ValueError unless `index` is one of `length` rows; negative ones count from the end."""
    if not -length <= index < length:
        raise ValueError(f"`{name}` must lie below {length}, the number of rows of the features, got {index}.")


def check_captions(text_config: PreTrainedConfig, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raises ValueError unless the ids, and the mask if given, are (C, Lt) tensors no longer than the encoder takes."""
    check_tensor("input_ids", input_ids, "(C, Lt)")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`input_ids` must hold integers of 64 or 32 bits, got {input_ids.dtype}.")
    longest = max_caption_length(text_config)
    if longest is not None and input_ids.shape[1] > longest:
        raise ValueError(
            f"`input_ids` has {input_ids.shape[1]} tokens a caption, but the text encoder takes at most {longest}. "
            "GranAlignProcessor truncates; with another tokenizer pass `truncation=True`."
        )
    if attention_mask is None:
        return
    check_tensor("attention_mask", attention_mask, "(C, Lt)")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}. Pass both as returned by GranAlignProcessor."
        )


def positive_pairs(logits_per_image: Tensor, image_ids: Tensor | None, caption_image_ids: Tensor | None) -> Tensor:
    """(B, C) bool: which caption describes which image."""
    num_images, num_captions = logits_per_image.shape
    if caption_image_ids is None and num_images != num_captions:
        raise ValueError(
            f"The loss needs the image of each caption: got {num_images} images and {num_captions} captions without "
            "`caption_image_ids`. Pass `image_ids` (B,) and `caption_image_ids` (C,)."
        )
    image_ids = torch.arange(num_images, device=logits_per_image.device) if image_ids is None else image_ids
    caption_image_ids = image_ids if caption_image_ids is None else caption_image_ids
    for name, ids, length in (
        ("image_ids", image_ids, num_images),
        ("caption_image_ids", caption_image_ids, num_captions),
    ):
        if not isinstance(ids, Tensor):
            raise ValueError(
                f"`{name}` must be a tensor of {length} integers, got {type(ids).__name__}. Pass torch.tensor(...)."
            )
        if ids.shape != (length,):
            raise ValueError(f"`{name}` must have shape ({length},), got {tuple(ids.shape)}.")
    return image_ids[:, None] == caption_image_ids[None, :]
