# Copyright 2026 The granalign authors. Licensed under the Apache License, Version 2.0.
"""Maps of a picture: what each patch scores for each word, where patches lie in the picture, maps of its size.

B images, C captions, Lv patches, Lt word tokens. A box is (x0, y0, x1, y1) in pixels, end exclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_index
from .similarity import PAPER_LEVEL_WEIGHTS

Box = tuple[float, float, float, float]
CAPTION_SHARE = 0.5  # of `location_density`, as are the two below: how much of the caption's map is taken away,
SHARPNESS = 0.5  # the factor before the softmax,
BLUR = 0.14  # and the standard deviation of the Gaussian as a share of the side


def word_maps(
    outputs: Any, image_index: int = 0, caption_index: int = 0, *, level_weights: Sequence[float] | None = None
) -> Tensor:
    """For each token of a caption, the score of every patch of an image.

    A patch v scores <t, v> with a word token t. In GRM the levels "original" and "key" (eq. 7) both match words with
    patches, so there a patch scores what the two add up to,

        (a <t, v> + b <t^, v^>) / (a + b) = (a + b A_t A_v) / (a + b) * <t, v>,

    with the level weights a and b and the saliencies A. Scores of unit-length tokens lie in [-1, 1]. The level
    "uncertain" is left out: it matches words with regions, and a region is a mean over all patches, so that no patch
    has a score of its own there.

    Args:
        outputs: a `GranAlignOutput`, or the pair (image features, text features) of `get_image_features` and
            `get_text_features`.
        image_index: which of the B images. caption_index: which of the C captions.
        level_weights: those of the aligner, of which the first two, a and b, count, and only where the outputs carry
            saliencies. `None`: the paper's. If both are 0, the map is that of the original level.

    Returns:
        (Lt, rows, columns), float32, the rows from top to bottom. Class and register tokens, which stand before the
        grid where they are used at all, are dropped. Special tokens and padding have maps too: see `words_of`.

    Raises:
        ValueError: a field is missing, an index is out of range, or the patches do not fill the grid.
    """
    image, text = outputs if isinstance(outputs, tuple) and len(outputs) == 2 else (outputs, outputs)
    patches = _row(image, "patch_embeds", image_index, "image_index")
    words = _row(text, "word_embeds", caption_index, "caption_index").float()
    rows, columns = _row(image, "spatial_shapes", image_index, "image_index").tolist()
    with torch.autocast(patches.device.type, enabled=False):
        scores = words @ on_grid(image, patches.float(), image_index, rows * columns).T
        if getattr(image, "patch_saliency", None) is not None and getattr(text, "word_saliency", None) is not None:
            a, b = (PAPER_LEVEL_WEIGHTS if level_weights is None else level_weights)[:2]
            a, b = (a, b) if a + b > 0 else (1, 0)
            patch_saliency = on_grid(image, image.patch_saliency[image_index].float(), image_index, rows * columns)
            word_saliency = text.word_saliency[caption_index].float()
            scores = scores * (a + b * word_saliency[:, None] * patch_saliency) / (a + b)
    return scores.unflatten(1, (rows, columns))


def picture_map(word_map: Tensor, image_size: tuple[int, int], area: Box | None = None, *, is_smooth: bool = True) -> Tensor:
    """A map at the size of its picture: the centre of each patch keeps the value of the patch.

    Args:
        word_map: (rows, columns). image_size: (width, height) of the picture.
        area: the part of the picture that the map covers. `None`: all of it.
        is_smooth: bilinear between the centres; `False`: each patch has one value.

    Returns:
        (height, width), float32; NaN outside of the area, which the model did not see.

    Raises:
        ValueError: the map is not a finite matrix, or the area ends before it begins.
    """
    if word_map.ndim != 2 or word_map.numel() == 0 or not bool(torch.isfinite(word_map).all()):
        raise ValueError(
            f"`word_map` must be finite and of shape (rows, columns), got {tuple(word_map.shape)} with values from "
            f"{word_map.min() if word_map.numel() else None} to {word_map.max() if word_map.numel() else None}."
        )
    width, height = image_size
    x0, y0, x1, y1 = (0.0, 0.0, float(width), float(height)) if area is None else area
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"`area` must be ascending, got {(x0, y0, x1, y1)}.")
    x = (torch.arange(width) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(height) + 0.5 - y0) / (y1 - y0) * 2 - 1
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    values = torch.nn.functional.grid_sample(
        word_map.detach().float().cpu()[None, None],
        points[None],
        mode="bilinear" if is_smooth else "nearest",
        padding_mode="border",
        align_corners=False,
    )[0, 0]
    return values.masked_fill(~(points.abs() <= 1).all(-1), torch.nan)


def location_density(word_map: Tensor, caption_map: Tensor) -> Tensor:
    """How likely a word is at or around each patch: the highest is a better answer to "where?" than the highest score.

    Half of the caption's map is taken from that of the word, so that what every word finds (such as the patches that
    pretrained transformers use as registers) counts less. A softmax over the patches, of half the distance to the mean in
    standard deviations, makes a distribution of it, and a Gaussian of 0.14 of the picture's width and height a density:
    neighbours that agree count more than a lone patch. No patch lies beyond the edges, so the middle is favoured, as in
    photographs; a map that says nothing is highest there. The three values were chosen on the validation split of Flickr8k.

    Args:
        word_map: (rows, columns), of a word or phrase. caption_map: (rows, columns), the mean over words of the caption.

    Returns:
        (rows, columns), float32, at least 0 and of sum 1 at most.
    """
    values = word_map.float() - CAPTION_SHARE * caption_map.float()
    spread = values.std(correction=0)
    values = (values - values.mean()) / spread.masked_fill(spread < 1e-6, torch.inf)  # of rounding, nothing is made
    rows, columns = (_blur(size, values.device) for size in values.shape)
    return rows @ (SHARPNESS * values).flatten().softmax(0).view_as(values) @ columns.T


def _blur(size: int, device: torch.device) -> Tensor:
    """(size, size): each row a Gaussian around one place, of sum 1 but for what lies beyond both ends."""
    steps = torch.arange(-size, size + 1, device=device)
    weights = torch.exp(-(steps**2) / (2 * (BLUR * size) ** 2))
    places = torch.arange(size, device=device)
    return weights[places[None] - places[:, None] + size] / weights.sum()


def patch_box(row: int, column: int, grid: tuple[int, int], area: Box, image_size: tuple[int, int]) -> Box:
    """The box of a patch, cut to the picture.

    Args:
        grid: (rows, columns). area: the part of the picture that the grid covers. image_size: (width, height).
    """
    (rows, columns), (x0, y0, x1, y1), (width, height) = grid, area, image_size
    xs = (x0 + (x1 - x0) * step / columns for step in (column, column + 1))
    ys = (y0 + (y1 - y0) * step / rows for step in (row, row + 1))
    left, right = (min(max(x, 0.0), float(width)) for x in xs)
    top, bottom = (min(max(y, 0.0), float(height)) for y in ys)
    return left, top, right, bottom


def visible_area(image_processor: Any, image_size: tuple[int, int], pixel_size: Sequence[int]) -> Box:
    """The part of a picture of (width, height) that an image processor puts into `pixel_values` of (height, width).

    Known are a plain resize, a resize of the shortest edge, a centre crop after either, and ConvNeXt's crop; anything
    else counts as a resize of the whole picture. Where the crop is larger than the picture, the box is so too.
    """
    width, height = image_size
    pixel_height, pixel_width = pixel_size
    size = getattr(image_processor, "size", None) or {}
    shortest_edge = size.get("shortest_edge")
    is_cropped = bool(getattr(image_processor, "do_center_crop", None))
    crop_share = getattr(image_processor, "crop_pct", None)  # ConvNeXt's own kind of crop, below 384 pixels
    if crop_share is not None and shortest_edge is not None:
        is_cropped, shortest_edge = shortest_edge < 384, int(shortest_edge / crop_share)
    if not is_cropped:
        return 0.0, 0.0, float(width), float(height)
    if not getattr(image_processor, "do_resize", None):
        resized_width, resized_height = width, height
    elif shortest_edge is not None:
        resized_width, resized_height = (int(shortest_edge * side / min(image_size)) for side in image_size)
    else:
        resized_width, resized_height = size["width"], size["height"]
    left, top = (resized_width - pixel_width) // 2, (resized_height - pixel_height) // 2
    x_scale, y_scale = width / resized_width, height / resized_height
    return left * x_scale, top * y_scale, (left + pixel_width) * x_scale, (top + pixel_height) * y_scale


def _row(features: Any, name: str, index: int, index_name: str) -> Tensor:
    """`features.name[index]`, or a clear error."""
    values = getattr(features, name, None)
    if values is None:
        raise ValueError(
            f"`outputs` must carry `{name}`, got {type(features).__name__} without it. Pass the output of a "
            "GranAlignModel, or the pair of its image features and text features."
        )
    check_index(index_name, index, len(values))
    return values[index]


def on_grid(image: Any, values: Tensor, image_index: int, num_patches: int) -> Tensor:
    """The values of the grid's patches: prefix tokens stand before the grid, padding is masked."""
    patch_mask = getattr(image, "patch_mask", None)
    if patch_mask is not None:
        values = values[patch_mask[image_index]]
    if not 0 < num_patches <= len(values):
        raise ValueError(f"`spatial_shapes` stands for {num_patches} patches, but `patch_embeds` has {len(values)}.")
    return values[len(values) - num_patches :]
