# Copyright 2026 The granalign authors. Licensed under the Apache License, Version 2.0.
"""Where in the picture each word of a caption landed: word maps and words with character offsets.

B images, C captions, Lv patches, Lt word tokens. A box is (x0, y0, x1, y1) in pixels, end exclusive.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .modeling.processing_granalign import read_image
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
        image: the picture, RGB and upright, in its original size. caption: the sentence.
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


def align(model, processor, image: Any, caption: str) -> Alignment:
    r"""
    Align one picture and one caption, with any aligner.

    Args:
        model: a [`GranAlignModel`] in evaluation mode. processor: its [`GranAlignProcessor`].
        image: a PIL image, the path of an image file or an array of bytes, read as the processor reads it.
        caption: a sentence.

    Raises:
        ValueError: the image cannot be read, the caption is empty or no string, the tokenizer is not a fast one, or
            the model is in training mode or takes features of regions.

    Example:

    ```python
    >>> from granalign_hf.explanation import align
    >>> from granalign_hf.figure import figure

    >>> alignment = align(model, processor, "dog.jpg", "a dog catches a red ball")
    >>> [(word.text, word.box) for word in alignment.content_words]
    [('dog', (64.0, 96.0, 96.0, 128.0)), ...]
    >>> figure(alignment, "dog.png")
    ```
    """
    if model.training:
        raise ValueError("`model` is in training mode, where scores are drawn at random. Call `model.eval()` first.")
    if not getattr(processor.image_processor, "reads_pictures", True):
        raise ValueError("`model` takes features of regions, which cannot be shown on a picture. Use `word_maps` instead.")
    _check_caption(caption, processor.tokenizer)
    picture = read_image(image)
    inputs = processor(images=picture, text=caption, return_offsets_mapping=True, return_tensors="pt")
    offsets = inputs.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        outputs = model(**inputs.to(model.device))
    maps = word_maps(outputs, level_weights=model.aligner.level_weights).cpu()
    area = _visible_area(processor.image_processor, picture.size, inputs["pixel_values"].shape[-2:])
    words = _merge_pieces(caption, offsets)
    aligned = [_align_word(word, maps, outputs.word_saliency, area, picture.size) for word in words]
    saliency = outputs.patch_saliency
    if saliency is not None:
        saliency = _on_grid(outputs, saliency[0].float(), 0, maps[0].numel()).reshape(maps.shape[1:]).cpu()
    return Alignment(picture, caption, outputs.logits_per_image[0, 0].item(), aligned, saliency, area)


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
    rows, columns = word_map.shape
    row, column = divmod(int(word_map.argmax()), columns)
    saliency = None if word_saliency is None else word_saliency[0, tokens].float().mean().item()
    box = patch_box(row, column, (rows, columns), area, size)
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
