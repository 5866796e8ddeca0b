# Copyright 2026 The granalign authors. Licensed under the Apache License, Version 2.0.
"""Where in the picture each word of a caption landed: word maps, words with character offsets, heat maps, a figure.

B images, C captions, Lv patches, Lt word tokens. A box is (x0, y0, x1, y1) in pixels, end exclusive.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .modeling.similarity import PAPER_LEVEL_WEIGHTS

Box = tuple[float, float, float, float]

_FUNCTION_WORDS = """
    a an the this that these those some any each every either neither no another other others both all several many
    much few more most such own same one two three four five six seven eight nine ten
    i you he she it we they me him her us them my your his its our their mine yours hers ours theirs myself yourself
    himself herself itself ourselves themselves who whom whose which what something someone
    of in on at by for with without from to into onto upon over under above below beneath beside besides between among
    around about across along through against near behind before after during toward towards off out up down inside
    outside within next atop amid via than as
    and or but nor so yet if while when where because although though until unless whether since
    is are was were be been being am do does did doing done has have had having would could should
    not there here also too very just then only together
"""
# English words without a place in a picture: determiners and numbers, pronouns, prepositions, conjunctions,
# auxiliaries, particles. Words that are as often a thing ("can", "left", "top") are not among them.
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_CONTRACTION = re.compile(r"(n['’]t|['’]\w*)$")


@dataclass(frozen=True)
class Word:
    """A word or punctuation mark of a caption.

    Attributes:
        text: `caption[start:end]`.
        start, end: character offsets, end exclusive.
        tokens: positions of its pieces among the tokens of the caption, special tokens counted.
        is_content: neither a function word (see `FUNCTION_WORDS`) nor punctuation.
    """

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]
    is_content: bool


@dataclass(frozen=True, eq=False)
class AlignedWord(Word):
    """A word and where it landed.

    Attributes:
        saliency: mean saliency of its pieces in [0, 1]; `None` for aligners without saliency.
        map: (rows, columns) of the patch grid, see [`word_maps`]; the mean over the word's pieces.
        box: the patch with the highest score, in pixels of the original picture.
    """

    saliency: float | None
    map: Tensor
    box: Box


@dataclass(frozen=True, eq=False)
class Alignment:
    """One picture and one caption, word by word.

    Attributes:
        image: the picture, RGB, in its original size. caption: the sentence.
        score: the score that ranks.
        words: all words in the order of the caption; special tokens are left out, and so is what truncation cut off.
        patch_saliency: (rows, columns) in [0, 1]; `None` for aligners without saliency.
        area: the part of the picture that the model saw, as a box, and that the patch grid divides evenly. A processor
            that crops sees less than the picture.
    """

    image: Image.Image
    caption: str
    score: float
    words: list[AlignedWord]
    patch_saliency: Tensor | None
    area: Box

    @property
    def content_words(self) -> list[AlignedWord]:
        return [word for word in self.words if word.is_content]


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
        grid where they are used at all, are dropped. Special tokens and padding have maps too: see [`words_of`].

    Raises:
        ValueError: a field is missing, an index is out of range, or the patches do not fill the grid.
    """
    image, text = outputs if isinstance(outputs, tuple) and len(outputs) == 2 else (outputs, outputs)
    patches = _row(image, "patch_embeds", image_index, "image_index")
    words = _row(text, "word_embeds", caption_index, "caption_index").float()
    rows, columns = _row(image, "spatial_shapes", image_index, "image_index").tolist()
    with torch.autocast(patches.device.type, enabled=False):
        scores = words @ _on_grid(image, patches.float(), image_index, rows * columns).T
        if getattr(image, "patch_saliency", None) is not None and getattr(text, "word_saliency", None) is not None:
            a, b = (PAPER_LEVEL_WEIGHTS if level_weights is None else level_weights)[:2]
            a, b = (a, b) if a + b > 0 else (1, 0)
            patch_saliency = _on_grid(image, image.patch_saliency[image_index].float(), image_index, rows * columns)
            word_saliency = text.word_saliency[caption_index].float()
            scores = scores * (a + b * word_saliency[:, None] * patch_saliency) / (a + b)
    return scores.unflatten(1, (rows, columns))


def words_of(caption: str, tokenizer) -> list[Word]:
    """The words of a caption and the tokens that each consists of.

    A word is a run of letters and digits, with apostrophes and hyphens inside it; any other visible character is a
    word of its own. A token belongs to the first word that it touches, a token of spaces to none. Words without a
    token of their own are left out: those that truncation cut off, or that share one token with the word before.

    Args:
        tokenizer: a fast tokenizer; it is asked for one caption, without padding.

    Raises:
        ValueError: the caption is empty or no string, or the tokenizer is not a fast one.
    """
    _check_caption(caption, tokenizer)
    return _merge_pieces(caption, tokenizer(caption, truncation=True, return_offsets_mapping=True)["offset_mapping"])


def align(model, processor, image: Image.Image | str | os.PathLike, caption: str) -> Alignment:
    r"""
    Align one picture and one caption, with any aligner.

    Args:
        model: a [`GranAlignModel`] in evaluation mode. processor: its [`GranAlignProcessor`].
        image: a PIL image or the path of an image file. caption: a sentence.

    Raises:
        ValueError: the image cannot be read, the caption is empty or no string, the tokenizer is not a fast one, or
            the model is in training mode.

    Example:

    ```python
    >>> from granalign_hf.explanation import align, figure

    >>> alignment = align(model, processor, "dog.jpg", "a dog catches a red ball")
    >>> [(word.text, word.box) for word in alignment.content_words]
    [('dog', (64.0, 96.0, 96.0, 128.0)), ...]
    >>> figure(alignment, "dog.png")
    ```
    """
    if model.training:
        raise ValueError("`model` is in training mode, where scores are drawn at random. Call `model.eval()` first.")
    _check_caption(caption, processor.tokenizer)
    picture = _read_picture(image)
    inputs = processor(images=picture, text=caption, return_offsets_mapping=True, return_tensors="pt")
    offsets = inputs.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        outputs = model(**inputs.to(model.device, model.dtype))
    maps = word_maps(outputs, level_weights=model.aligner.level_weights).cpu()
    area = _visible_area(processor.image_processor, picture.size, inputs["pixel_values"].shape[-2:])
    words = _merge_pieces(caption, offsets)
    words = [_align_word(word, maps, outputs.word_saliency, area, picture.size) for word in words]
    saliency = outputs.patch_saliency
    if saliency is not None:
        saliency = _on_grid(outputs, saliency[0].float(), 0, maps[0].numel()).reshape(maps.shape[1:]).cpu()
    return Alignment(picture, caption, outputs.logits_per_image[0, 0].item(), words, saliency, area)


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


def _align_word(word: Word, maps: Tensor, word_saliency: Tensor | None, area: Box, size: tuple) -> AlignedWord:
    tokens = list(word.tokens)
    word_map = maps[tokens].mean(0)
    row, column = divmod(int(word_map.argmax()), word_map.shape[1])
    saliency = None if word_saliency is None else word_saliency[0, tokens].float().mean().item()
    box = patch_box(row, column, tuple(word_map.shape), area, size)
    own = {field.name: getattr(word, field.name) for field in fields(word)}
    return AlignedWord(**own, saliency=saliency, map=word_map, box=box)


def _row(features: Any, name: str, index: int, index_name: str) -> Tensor:
    """`features.name[index]`, or a clear error."""
    values = getattr(features, name, None)
    if values is None:
        raise ValueError(
            f"`outputs` must carry `{name}`, got {type(features).__name__} without it. Pass the output of a "
            "GranAlignModel, or the pair of its image features and text features."
        )
    if not -len(values) <= index < len(values):
        raise ValueError(f"`{index_name}` must lie below {len(values)}, the number of rows of `{name}`, got {index}.")
    return values[index]


def _on_grid(image: Any, values: Tensor, image_index: int, num_patches: int) -> Tensor:
    """The values of the grid's patches: prefix tokens stand before the grid, padding is masked."""
    patch_mask = getattr(image, "patch_mask", None)
    if patch_mask is not None:
        values = values[patch_mask[image_index]]
    if not 0 < num_patches <= len(values):
        raise ValueError(f"`spatial_shapes` stands for {num_patches} patches, but `patch_embeds` has {len(values)}.")
    return values[len(values) - num_patches :]


# Words --------------------------------------------------------------------------------------------------------------


def _check_caption(caption: Any, tokenizer: Any) -> None:
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"`caption` must be a sentence of at least one word, got {caption!r}.")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"Words need character offsets, which only fast tokenizers have, got {type(tokenizer).__name__}. Load the "
            "tokenizer with AutoTokenizer."
        )


def _merge_pieces(caption: str, offsets: Sequence[Sequence[int]]) -> list[Word]:
    """Words of the caption with the positions of their tokens, from the (start, end) of each token.

    Special tokens and padding are at (0, 0) and touch no word.
    """
    # Combining marks are no \w, yet they belong to the letter before them.
    plain = "".join("x" if unicodedata.category(character)[0] == "M" else character for character in caption)
    spans = [match.span() for match in _WORD.finditer(plain)]
    tokens: dict[tuple[int, int], list[int]] = {span: [] for span in spans}
    for position, (start, end) in enumerate(offsets):
        # Some tokenizers count the space before a word to its first piece.
        home = next((span for span in spans if span[0] < end and start < span[1]), None)
        if home is not None:
            tokens[home].append(position)
    return [
        Word(caption[start:end], start, end, tuple(tokens[start, end]), _is_content(caption[start:end]))
        for start, end in spans
        if tokens[start, end]
    ]


def _is_content(text: str) -> bool:
    stem = _CONTRACTION.sub("", text.lower())
    return any(character.isalnum() for character in text) and stem not in FUNCTION_WORDS


# The picture --------------------------------------------------------------------------------------------------------


def _read_picture(image: Any) -> Image.Image:
    try:
        picture = Image.open(image) if isinstance(image, str | os.PathLike) else image
        if isinstance(picture, Image.Image):
            return picture.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"`image` cannot be read: {error}. Pass a PIL image or the path of an image file.") from error
    raise ValueError(f"`image` must be a PIL image or the path of an image file, got {type(image).__name__}.")


def _visible_area(image_processor: Any, image_size: tuple[int, int], pixel_size: Sequence[int]) -> Box:
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


# Heat maps ----------------------------------------------------------------------------------------------------------

# Cold to hot, at equal steps; cold is white, so that paper and picture show through.
_HEAT_COLOURS = np.array(
    [(255, 255, 255), (255, 237, 170), (254, 196, 90), (246, 130, 46), (214, 48, 49), (128, 10, 62)], dtype=np.float64
)
_PICTURE_CONTRAST = 0.4  # the picture below the heat is pale and grey: colour means heat and nothing else
_UNSEEN_CONTRAST = 0.15


def colour_scale(maps: Sequence[Tensor]) -> tuple[float, float]:
    """The (lowest, highest) score of one colour scale for several maps.

    Scores below 0 speak against a word and are as cold as 0, unless no map has any above.
    """
    low, high = min(float(word_map.min()) for word_map in maps), max(float(word_map.max()) for word_map in maps)
    return (max(low, 0.0), high) if high > 0 else (low, high)


def overlay(
    image: Image.Image, word_map: Tensor, *, scale: tuple[float, float] | None = None, area: Box | None = None
) -> Image.Image:
    """A heat map over the pale, grey picture.

    The map is enlarged bilinearly, for display only: the centre of each patch has the patch's own colour.

    Args:
        image: the picture in its original proportions. word_map: (rows, columns).
        scale: scores that are white and dark red, to be shared by pictures that are compared. `None`: that of
            [`colour_scale`] for this map alone.
        area: the part of the picture that the map covers (`Alignment.area`). `None`: all of it. The rest fades.

    Returns:
        An RGB picture of the size of `image`.

    Raises:
        ValueError: the map is not a finite matrix, or the scale or the area ends before it begins.
    """
    if word_map.ndim != 2 or word_map.numel() == 0 or not bool(torch.isfinite(word_map).all()):
        raise ValueError(
            f"`word_map` must be finite and of shape (rows, columns), got {tuple(word_map.shape)} with values from "
            f"{word_map.min() if word_map.numel() else None} to {word_map.max() if word_map.numel() else None}."
        )
    low, high = colour_scale([word_map]) if scale is None else scale
    x0, y0, x1, y1 = (0.0, 0.0, *map(float, image.size)) if area is None else area
    if low > high or x0 >= x1 or y0 >= y1:
        raise ValueError(f"`scale` and `area` must be ascending, got {(low, high)} and {(x0, y0, x1, y1)}.")
    x = (torch.arange(image.width) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(image.height) + 0.5 - y0) / (y1 - y0) * 2 - 1
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    heat = torch.nn.functional.grid_sample(
        word_map.detach().float().cpu()[None, None], points[None], padding_mode="border", align_corners=False
    )[0, 0]
    is_seen = (points.abs() <= 1).all(-1).numpy()
    position = (heat.numpy() - low) / (high - low) if high > low else np.zeros(heat.shape)
    colours = np.where(is_seen[..., None], _heat_colours(position), 255.0)
    paper = 1 - np.where(is_seen, _PICTURE_CONTRAST, _UNSEEN_CONTRAST) * _darkness(image)
    return Image.fromarray((colours * paper[..., None]).round().astype(np.uint8))


def _darkness(image: Image.Image) -> np.ndarray:
    """(height, width) in 0..1. Half of it is the darkest channel: in luminance alone, yellow would vanish on white."""
    luminance = np.asarray(image.convert("L"), dtype=np.float64)
    return 1 - (luminance + np.asarray(image.convert("RGB")).min(axis=-1)) / (2 * 255)


def _heat_colours(position: np.ndarray) -> np.ndarray:
    """Positions in 0..1 (clipped) -> RGB in 0..255, one axis more."""
    steps = np.linspace(0, 1, len(_HEAT_COLOURS))
    return np.stack([np.interp(position, steps, channel) for channel in _HEAT_COLOURS.T], axis=-1)


# The figure ---------------------------------------------------------------------------------------------------------

_DPI = 160
_PANEL_SIDE, _MIN_CELL_WIDTH, _MIN_BAR_HEIGHT = 2.1, 1.8, 1.0  # inches, as all lengths here; the panel's longest side
_GAP, _MARGIN, _TITLE_HEIGHT, _LINE_HEIGHT = 0.14, 0.18, 0.28, 0.23
_BAR_GAP, _BAR_WIDTH, _BAR_LABELS = 0.16, 0.11, 0.62
_INK, _FAINT, _LINE = "#1f2328", "#6e7781", "#d0d7de"


def figure(
    alignment: Alignment, path: str | os.PathLike | None = None, *, words: Sequence[AlignedWord] | None = None
) -> Image.Image:
    """The picture, its caption, and one heat map for each content word, all on one colour scale.

    A thin frame marks the patch with the highest score.

    Args:
        path: where to write the figure as PNG. words: those to show. `None`: the content words.

    Returns:
        The figure as an RGB picture.

    Raises:
        ValueError: there is no word to show.
        ImportError: matplotlib is not installed.
    """
    words = alignment.content_words if words is None else list(words)
    if not words:
        raise ValueError(
            f"The caption {alignment.caption!r} has no content word to show. Pass `words=alignment.words` to show all."
        )
    canvas = _draw_figure(alignment, words)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    if path is not None:
        picture.save(path, format="PNG", dpi=(_DPI, _DPI))
    return picture


@dataclass(frozen=True)
class _Layout:
    """Where things stand, in inches from the top left corner; a place is (left, top, width, height)."""

    panel_width: float
    panel_height: float
    columns: int
    rows: int
    caption_lines: list[str]

    @classmethod
    def of(cls, image_size: tuple[int, int], num_panels: int, caption: str) -> _Layout:
        longest = max(image_size)
        # Whole pixels, and at least one, so that panels are drawn pixel by pixel.
        width, height = (max(1, round(_PANEL_SIDE * _DPI * side / longest)) / _DPI for side in image_size)
        # Up to five columns: those that leave the fewest places empty.
        columns = num_panels if num_panels <= 5 else min((4, 5, 3), key=lambda number: -num_panels % number)
        line_length = int(11 * (columns * max(width, _MIN_CELL_WIDTH) + _BAR_GAP + _BAR_LABELS))  # characters an inch
        return cls(width, height, columns, math.ceil(num_panels / columns), textwrap.wrap(caption, line_length))

    @property
    def cell_width(self) -> float:
        return max(self.panel_width, _MIN_CELL_WIDTH)

    @property
    def grid_top(self) -> float:
        return _MARGIN + len(self.caption_lines) * _LINE_HEIGHT + 0.06 + _TITLE_HEIGHT

    def panel(self, position: int) -> tuple[float, float, float, float]:
        row, column = divmod(position, self.columns)
        top = self.grid_top + row * (self.panel_height + _GAP + _TITLE_HEIGHT)
        return _MARGIN + column * (self.cell_width + _GAP), top, self.panel_width, self.panel_height

    @property
    def bar(self) -> tuple[float, float, float, float]:
        left = _MARGIN + self.columns * (self.cell_width + _GAP) - _GAP + _BAR_GAP
        _, top, _, height = self.panel(self.columns * self.rows - 1)
        return left, self.grid_top, _BAR_WIDTH, max(top + height - self.grid_top, _MIN_BAR_HEIGHT)

    @property
    def sheet(self) -> tuple[float, float]:
        left, top, width, height = self.bar
        return left + width + _BAR_LABELS, top + height + _MARGIN


def _draw_figure(alignment: Alignment, words: Sequence[AlignedWord]):
    """The figure on a canvas of its own: pyplot and its global state stay untouched."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: `pip install "granalign-hf[train]"`.') from error
    layout = _Layout.of(alignment.image.size, 1 + len(words), alignment.caption)
    width, height = layout.sheet
    canvas = FigureCanvasAgg(Figure(figsize=(width, height), dpi=_DPI, facecolor="white"))

    def add_axes(place: tuple[float, float, float, float]):
        left, top, w, h = place
        return canvas.figure.add_axes((left / width, 1 - (top + h) / height, w / width, h / height))

    style = {"va": "top", "fontsize": 12, "linespacing": 1.25, "color": _INK, "parse_math": False}
    canvas.figure.text(_MARGIN / width, 1 - _MARGIN / height, "\n".join(layout.caption_lines), **style)
    picture, zoom = _enlarge(alignment.image, layout)
    scale = colour_scale([word.map for word in words])
    _draw_panel(add_axes(layout.panel(0)), picture, "picture", f"score {alignment.score:.2f}", layout.cell_width)
    for position, word in enumerate(words, start=1):
        axes = add_axes(layout.panel(position))
        heat = overlay(picture, word.map, scale=scale, area=_zoom_box(alignment.area, zoom))
        note = "" if word.saliency is None else f"saliency {word.saliency:.2f}"
        _draw_panel(axes, heat, word.text, note, layout.cell_width)
        _mark_box(axes, _zoom_box(word.box, zoom))
    _draw_bar(add_axes(layout.bar), scale)
    return canvas


def _enlarge(image: Image.Image, layout: _Layout) -> tuple[Image.Image, tuple[float, float]]:
    """The picture at the size of a panel, and by how much it grew in width and height."""
    size = round(layout.panel_width * _DPI), round(layout.panel_height * _DPI)
    return image.resize(size, Image.Resampling.BICUBIC), (size[0] / image.width, size[1] / image.height)


def _zoom_box(box: Box, zoom: tuple[float, float]) -> Box:
    return box[0] * zoom[0], box[1] * zoom[1], box[2] * zoom[0], box[3] * zoom[1]


def _draw_panel(axes, picture: Image.Image, title: str, note: str, width: float) -> None:
    axes.imshow(np.asarray(picture), interpolation="nearest", aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(edgecolor=_LINE, linewidth=0.6)
    length = int((width - (0.75 if note else 0)) / 0.092)  # a bold letter is about 0.092 inches wide
    title = title if len(title) <= length else title[: length - 1] + "…"
    above = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(title, (0, 1), (0, 4), fontsize=10, fontweight="bold", color=_INK, parse_math=False, **above)
    axes.annotate(note, (0, 1), (72 * width, 4), fontsize=7.5, color=_FAINT, ha="right", **above)


def _mark_box(axes, box: Box) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box
    corner = x0 - 0.5, y0 - 0.5  # the centre of the first pixel is at 0
    axes.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor=_INK, linewidth=0.9))


def _draw_bar(axes, scale: tuple[float, float]) -> None:
    low, high = scale
    high = high if high > low else low + 1e-6  # a bar of no height cannot be drawn
    ramp = _heat_colours(np.linspace(0, 1, 256))[:, None] / 255
    axes.imshow(ramp, origin="lower", aspect="auto", extent=(0, 1, low, high))
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_ylabel("patch score", fontsize=8, color=_FAINT)
    axes.tick_params(labelsize=7.5, length=2.5, width=0.6, color=_FAINT, labelcolor=_FAINT)
    axes.spines[:].set(edgecolor=_LINE, linewidth=0.6)
