"""What GranAlign needs to know of an encoder: its width, which tokens are patches, the patch grid, the longest caption.

All of it comes from the encoder's config, never from the length of its output.
"""

from __future__ import annotations

import inspect
import math

from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

# Tokens before the patches: class token, distillation token, pooled token (the last for DINOv3-ConvNeXt).
_NUM_CLASS_TOKENS = {
    "beit": 1,
    "clip_vision_model": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_convnext": 1,
    "dinov3_vit": 1,
    "vit": 1,
}
_HIERARCHICAL = ("swin", "swinv2")  # token encoders that merge patches and pad odd grids


def feature_size(config: PreTrainedConfig) -> int:
    """Width of an encoder's last hidden state.

    Raises:
        ValueError: the config names none.
    """
    for name in ("hidden_size", "hidden_sizes"):
        size = getattr(config, name, None)
        if size:
            return size if isinstance(size, int) else size[-1]
    raise ValueError(f"`{type(config).__name__}` has neither `hidden_size` nor `hidden_sizes`: the width is unknown.")


def num_prefix_tokens(config: PreTrainedConfig) -> int:
    """Number of tokens (class, distillation, register) that a vision encoder puts before its patches."""
    num_class_tokens = _NUM_CLASS_TOKENS.get(config.model_type, 0)
    return num_class_tokens + (getattr(config, "num_register_tokens", None) or 0)


def special_token_ids(source) -> list[int]:
    """Ids that a text config or a tokenizer declares for CLS, SEP, begin, end and padding, sorted.

    Unknown and mask tokens are not among them: they stand for words.
    """
    ids: set[int] = set()
    for name in ("cls", "sep", "bos", "eos", "pad"):
        value = getattr(source, f"{name}_token_id", None)
        ids.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return sorted(ids)


def patch_grid(config: PreTrainedConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the patches that a token encoder makes of an image of (height, width) pixels.

    Raises:
        ValueError: the config has no `patch_size`.
    """
    patch_size = getattr(config, "patch_size", None)
    if config.model_type == "dinov3_convnext":
        patch_size = 4 * 2 ** (len(config.depths) - 1)
    if patch_size is None:
        raise ValueError(
            f"`vision_config` of type {config.model_type!r} returns tokens but has no `patch_size`, so their grid is "
            "unknown. Use an encoder with a `patch_size`, or one that returns a feature map."
        )
    sizes = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    if config.model_type not in _HIERARCHICAL:
        return image_size[0] // sizes[0], image_size[1] // sizes[1]
    rows, columns = (math.ceil(length / size) for length, size in zip(image_size, sizes, strict=True))
    for _ in config.depths[1:]:
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
    return rows, columns


def max_caption_length(config: PreTrainedConfig) -> int | None:
    """Most tokens that a text encoder takes; `None` where its config sets no bound."""
    length = getattr(config, "max_position_embeddings", None)
    if length is not None and config.model_type in ("roberta", "xlm-roberta", "camembert"):
        length -= config.pad_token_id + 1  # their positions start after the padding id
    return length


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """A randomly initialised encoder, without the pooling layer that GranAlign would leave untrained."""
    return AutoModel.from_config(config, **_without_pooler(config))


def load_encoder(name_or_path: str, config: PreTrainedConfig, **kwargs) -> PreTrainedModel:
    """A pretrained encoder, without its pooling layer; `kwargs` go to `AutoModel.from_pretrained`."""
    return AutoModel.from_pretrained(name_or_path, config=config, **_without_pooler(config), **kwargs)


def _without_pooler(config: PreTrainedConfig) -> dict[str, bool]:
    if type(config) not in MODEL_MAPPING:
        return {}
    model_class = MODEL_MAPPING[type(config)]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model_class).parameters else {}
