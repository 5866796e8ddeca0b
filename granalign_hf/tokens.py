"""Features of images and captions as rows of an index, and back: float16 or int8, all patches or the most salient ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .modeling.outputs import GranAlignImageOutput, GranAlignTextOutput

# What scores, standard errors and word maps are made from.
IMAGE_FIELDS = (
    "patch_embeds", "patch_saliency", "patch_logits", "region_assignment", "region_means", "region_log_vars",
    "spatial_shapes",
)  # fmt: skip
TEXT_FIELDS = ("word_embeds", "word_mask", "word_saliency")
NOT_FOR_SCORES = ("region_assignment", "region_log_vars", "spatial_shapes")
EMBEDS = ("patch_embeds", "word_embeds")
LENGTH_STEP = 8  # words; captions are padded to a multiple, so that there are few layouts of rows


@dataclass(frozen=True)
class TokenFormat:
    """How tokens are stored.

    Args:
        dtype: "float16", or "int8" for the patches or words, with a factor for each; all else is float16.
        max_patches: of each image only so many patches, those with the highest saliency; their maxima and means are then
            those of the score. `None`: all.

    Raises:
        ValueError: another `dtype`, or fewer patches than one.
    """

    dtype: str = "float16"
    max_patches: int | None = None

    def __post_init__(self):
        if self.dtype not in ("float16", "int8"):
            raise ValueError(f'`tokens` must be "float16", "int8" or None, got {self.dtype!r}.')
        if self.max_patches is not None and self.max_patches < 1:
            raise ValueError(f"`max_patches` must be at least 1, got {self.max_patches}.")


def to_rows(features: Any, form: TokenFormat) -> np.ndarray:
    """Features of n images or captions -> a structured array (n,), each row what one of them needs to be scored.

    Raises:
        ValueError: `max_patches` with an aligner that has no saliency, or a value that float16 does not hold.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, value in _stored_fields(features, form).items():
        if name in EMBEDS and form.dtype == "int8":
            values, scales = _to_int8(value)
            _check_finite(name, scales, value)
            arrays |= {name: values.cpu().numpy(), f"{name}_scale": scales.cpu().numpy()}
        else:
            arrays[name] = _small(name, value)
    rows = np.zeros(len(value), np.dtype([(name, array.dtype, array.shape[1:]) for name, array in arrays.items()]))
    for name, array in arrays.items():
        rows[name] = array
    return rows


def from_rows(
    rows: np.ndarray, numbers: Sequence[int] | None = None, device: Any = "cpu", *, for_scores: bool = False
) -> GranAlignImageOutput | GranAlignTextOutput:
    """What [`to_rows`] was given, as far as it was kept, in float32.

    Args:
        numbers: of the rows that are wanted. `None`: all.
        for_scores: only the fields that a score needs.
    """
    stored = rows.dtype.names or ()

    def read(name: str) -> Tensor:
        value = torch.from_numpy(np.ascontiguousarray(rows[name] if numbers is None else rows[name][list(numbers)]))
        value = value.to(device)
        return value.float() if value.is_floating_point() or value.dtype == torch.int8 else value

    fields = {}
    for name in stored:
        if not name.endswith("_scale") and not (for_scores and name in NOT_FOR_SCORES):
            fields[name] = read(name) * read(f"{name}_scale")[..., None] if f"{name}_scale" in stored else read(name)
    if "word_embeds" in fields:
        return GranAlignTextOutput(**fields)
    mask = torch.ones(fields["patch_embeds"].shape[:2], dtype=torch.bool, device=device)
    return GranAlignImageOutput(**fields, patch_mask=mask, region_embeds=fields.get("region_means"))


def _stored_fields(features: Any, form: TokenFormat) -> dict[str, Tensor]:
    is_image = features.get("patch_embeds") is not None
    names = IMAGE_FIELDS if is_image else TEXT_FIELDS
    fields = {name: features[name] for name in names if features.get(name) is not None}
    if not is_image:
        padding = -fields["word_mask"].shape[1] % LENGTH_STEP
        return {name: _padded(value, padding) for name, value in fields.items()}
    if "region_log_vars" not in fields:
        fields.pop("region_assignment", None)
    return fields if form.max_patches is None else _most_salient(fields, form.max_patches)


def _padded(value: Tensor, padding: int) -> Tensor:
    return torch.cat([value, value.new_zeros(value.shape[0], padding, *value.shape[2:])], dim=1)


def _most_salient(fields: dict[str, Tensor], max_patches: int) -> dict[str, Tensor]:
    """Without the others; the assignment of patches to regions stays whole, standard errors need its norm."""
    if "patch_saliency" not in fields:
        raise ValueError('`max_patches` keeps the most salient patches, which only the aligner "grm" knows. Leave it out.')
    saliency = fields["patch_saliency"]
    kept = saliency.topk(min(max_patches, saliency.shape[1]), dim=1).indices.sort(dim=1).values
    patches = fields["patch_embeds"].gather(1, kept[..., None].expand(-1, -1, fields["patch_embeds"].shape[2]))
    rest = {name: value for name, value in fields.items() if name != "spatial_shapes"}  # no grid any more
    return rest | {"patch_embeds": patches, "patch_saliency": saliency.gather(1, kept)}


def _to_int8(embeds: Tensor) -> tuple[Tensor, Tensor]:
    """(n, L, d) -> integers, and the (n, L) factors that turn them into numbers again."""
    scales = (embeds.abs().amax(-1) / 127).half().clamp(min=torch.finfo(torch.float16).tiny)
    return (embeds / scales[..., None]).round().clamp(-127, 127).to(torch.int8), scales


def _small(name: str, value: Tensor) -> np.ndarray:
    if not value.is_floating_point():
        return value.cpu().numpy().astype(bool if value.dtype == torch.bool else np.int32)
    half = value.half()
    _check_finite(name, half, value)
    return half.cpu().numpy()


def _check_finite(name: str, stored: Tensor, value: Tensor) -> None:
    if not stored.isfinite().all():
        raise ValueError(f"`{name}` does not fit float16: it reaches {value.abs().max():g}, or is not finite.")
