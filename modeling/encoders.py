"""What GranAlign needs to know of an encoder: its width, which tokens are patches, the patch grid, the longest caption.

All of it comes from the encoder's config, never from the length of its output.
"""

from __future__ import annotations

import inspect
import math
import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import logging

from .gru_encoder import GRUEncoderConfig  # noqa: F401  two encoders of our own, which register themselves
from .region_features import RegionFeaturesConfig  # noqa: F401

logger = logging.get_logger(__name__)

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
# Parameters behind the last hidden state, which pool it; tokens do not depend on them.
_POOLING_PARAMETERS = {
    "clip_vision_model": "post_layernorm.",
    "convnext": "layernorm.",
    "convnextv2": "layernorm.",
    "siglip_vision_model": "head.",
}
# Their position ids start after the padding id.
_OFFSET_POSITIONS = ("camembert", "data2vec-text", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta")
# Vision encoders with a table of positions, which they stretch to another image size only when told to.
_FIXED_POSITIONS = ("clip_vision_model", "deit", "siglip_vision_model", "vit")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
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


def check_image_size(config: PreTrainedConfig, pixel_values: torch.Tensor) -> None:
    """Raises ValueError if images (B, channels, height, width) have another size than the encoder has positions for.

    SigLIP itself would take 8 x 32 for 16 x 16 patches without a word.
    """
    if config.model_type in _FIXED_POSITIONS and tuple(pixel_values.shape[-2:]) != _config_image_size(config):
        raise ValueError(
            f"`pixel_values` has images of {tuple(pixel_values.shape[-2:])} pixels, but the vision encoder has positions "
            f"for {_config_image_size(config)}. Resize them, or pass `interpolate_pos_encoding=True`."
        )


def patch_tokens(
    hidden: torch.Tensor, config: PreTrainedConfig, image_size: tuple[int, int] | None
) -> tuple[torch.Tensor, tuple[int, int]]:
    """A vision encoder's last hidden state -> the tokens to project, row by row, and the shape of their grid.

    Args:
        hidden: (B, tokens, hidden) or a feature map (B, hidden, rows, columns). config: a `GranAlignConfig`, which says
            how many tokens are prefix, whether they are kept, and how many patches are pooled.
        image_size: (height, width) of the images in pixels. `None`: the size that the encoder's config names.

    Raises:
        ValueError: the tokens do not fill the grid that the config promises.
    """
    if hidden.ndim == 4:
        prefix, grid = None, hidden
    else:
        vision = config.vision_config
        image_size = _config_image_size(vision) if image_size is None else image_size
        rows, columns = patch_grid(vision, image_size)
        prefix, patches = hidden.split([config.num_prefix_tokens, hidden.shape[1] - config.num_prefix_tokens], dim=1)
        if patches.shape[1] != rows * columns:
            raise ValueError(
                f"An image of {image_size} pixels gives {hidden.shape[1]} tokens, but `vision_config` "
                f"({vision.model_type}) stands for {rows} x {columns} patches after {config.num_prefix_tokens} prefix "
                "tokens. Set `num_prefix_tokens` in the config."
            )
        grid = patches.transpose(1, 2).unflatten(2, (rows, columns))
    if config.patch_pool_size > 1:
        grid = torch.nn.functional.avg_pool2d(grid, config.patch_pool_size, ceil_mode=True)
    tokens = grid.flatten(2).transpose(1, 2)
    if config.use_prefix_tokens and prefix is not None:
        tokens = torch.cat([prefix, tokens], dim=1)
    return tokens, (grid.shape[2], grid.shape[3])


def mask_of_words(config: PreTrainedConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(C, Lt) bool: the tokens of captions that take part in the score, by the config of the whole model."""
    is_token = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if config.use_special_tokens:
        return is_token
    special = torch.tensor(config.special_token_ids, device=input_ids.device, dtype=input_ids.dtype)
    is_word = is_token & (input_ids[..., None] != special).all(-1)  # ONNX has no torch.isin, nor a choice of masks
    return is_word | (is_token & ~is_word.any(1, keepdim=True))


def _config_image_size(config: PreTrainedConfig) -> tuple[int, int]:
    size = config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def max_caption_length(config: PreTrainedConfig) -> int | None:
    """Most tokens that a text encoder takes; `None` where its config sets no bound."""
    length = getattr(config, "max_position_embeddings", None)
    if length is not None and config.model_type in _OFFSET_POSITIONS:
        length -= config.pad_token_id + 1
    return length


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """A randomly initialised encoder, without the pooling layer that GranAlign would leave untrained.

    It has the default dtype, like the layers around it, whatever dtype its own weights were once saved in.
    """
    return AutoModel.from_config(config, dtype=torch.get_default_dtype(), **_without_pooler(config))


def load_encoder(name_or_path: str, side: str, config: PreTrainedConfig | None = None, **kwargs) -> PreTrainedModel:
    """A pretrained encoder, without its pooling layer.

    Args:
        side: `"vision_config"` or `"text_config"`: the side to take of a two-sided model.
        config: instead of the one at the path. kwargs: fields of it; all others go to `AutoModel.from_pretrained`.

    Raises:
        ValueError: none of the encoder's weights is there.
    """
    if config is None:
        config = side_config(name_or_path, side, **{name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs})
    for name in [name for name in kwargs if hasattr(config, name) and name != "dtype"]:
        setattr(config, name, kwargs.pop(name))
    encoder, report = AutoModel.from_pretrained(
        name_or_path, config=config, output_loading_info=True, **_without_pooler(config), **kwargs
    )
    if len(report["missing_keys"]) >= len(encoder.state_dict()):
        raise ValueError(
            f"`{name_or_path}` has no weights of a {config.model_type!r} encoder, so all of them would be random. Pass the "
            "checkpoint of the encoder itself."
        )
    if os.path.isdir(name_or_path):  # the name of the folder stays, its place on this machine does not
        encoder.config._name_or_path = os.path.basename(os.path.abspath(name_or_path))
    return encoder


def side_config(name_or_path: str, side: str, **kwargs) -> PreTrainedConfig:
    """The config at a path, or the given side (`"vision_config"` or `"text_config"`) of a two-sided one."""
    config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    return getattr(config, side, config)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer at a path.

    Raises:
        ValueError: it knows special tokens only: Transformers makes such a one where the vocabulary file is missing.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(
            f"The tokenizer at `{name_or_path}` has no vocabulary. Save the tokenizer of the text encoder there, or pass a "
            "path that has one."
        )
    return tokenizer


def tokenizer_special_ids(name_or_path: str) -> list[int] | None:
    """[`special_token_ids`] of the tokenizer at a path; `None`, with a warning, where there is none."""
    try:
        return special_token_ids(load_tokenizer(name_or_path))
    except (OSError, ValueError):
        logger.warning(
            f"No tokenizer at {name_or_path}: special tokens are those that the text config declares. Pass "
            "`special_token_ids` if that is not all of them."
        )
        return None


def reduce_to_tokens(encoder: PreTrainedModel) -> None:
    """Takes what tokens do not depend on out of training: an optimiser or DDP would wait for its gradient.

    A pooling layer that can be left out is removed; other such parameters become buffers, saved and loaded as before.
    """
    if _without_pooler(encoder.config):
        encoder.pooler = None  # type: ignore[assignment]
    idle = ("embeddings.mask_token", _POOLING_PARAMETERS.get(encoder.config.model_type, "embeddings.mask_token"))
    for name, parameter in list(encoder.named_parameters()):
        if name.startswith(idle):
            path, _, leaf = name.rpartition(".")
            owner = encoder.get_submodule(path)
            delattr(owner, leaf)
            owner.register_buffer(leaf, parameter.detach())


def accepts_argument(encoder: PreTrainedModel, name: str) -> bool:
    """Whether the `forward` of the encoder has an argument of this name."""
    return name in inspect.signature(encoder.forward).parameters


def _without_pooler(config: PreTrainedConfig) -> dict[str, bool]:
    if type(config) not in MODEL_MAPPING:
        return {}
    classes: Any = MODEL_MAPPING[type(config)]
    model_class = classes[0] if isinstance(classes, tuple) else classes
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model_class).parameters else {}
