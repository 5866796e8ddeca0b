"""How well a model knows where things are: the pointing game on located phrases, and its saliencies against their boxes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from granalign_hf.calibration import auroc
from granalign_hf.card_sections import BASELINES
from granalign_hf.grounding import patch_centers, pointing_game, points_in_boxes, summarize_hits
from granalign_hf.modeling.maps import location_density, on_grid, visible_area, word_maps
from granalign_hf.modeling.modeling_granalign import GranAlignModel
from granalign_hf.modeling.processing_granalign import GranAlignProcessor
from granalign_hf.modeling.words import Word, words_of, words_within
from granalign_hf.training.by_image import Encoded, measure_by_image
from granalign_hf.training.data import CaptionedImages
from granalign_hf.training.phrases import LocatedCaption

CORNERS = ([0, 0, -1, -1], [0, -1, 0, -1])


class _Image(NamedTuple):
    """What one image gives: arrays of its phrases, each (phrases,), and areas under the curve."""

    number: int
    hits: dict[str, np.ndarray]
    types: list[tuple[str, ...]]
    num_cut: int  # phrases whose words truncation has cut off
    patch_saliency: float | None  # NaN where all patches lie on one side
    captions: list[tuple[float | None, float]]  # of word saliency, and of content words, likewise


def measure_grounding(
    model: GranAlignModel,
    processor: GranAlignProcessor,
    data: CaptionedImages,
    located: Sequence[LocatedCaption],
    batch_size: int,
) -> dict[str, Any]:
    """The figures of all located phrases, from all processes together.

    A phrase points where the mean map of its content words (see `word_maps`) is highest. Each figure is a mean over phrases,
    captions or images in percent, with its interval over images.

    Returns:
        `pointing`: type of entity ("all" first) -> `accuracy`, `low`, `high`, `num_phrases`, and the accuracy of the
        `densest` place (see `location_density`), of `without_corners` (the four corner patches, which pretrained
        transformers use as registers, may not be the highest), of `random_patch`, of `image_center` and of `largest_box`,
        the centre of the largest box of any phrase of the image. `corner_share`: of the phrases that point at a corner
        patch. `num_cut`: phrases that truncation has cut off and that are left out. And areas under the ROC curve, each
        with its `low`, `high`, and how many it is the mean of: `patch_saliency` for "inside a box" among the patches of an
        image; `word_saliency` and, as its baseline, `content_words` for "inside a located phrase" among the words of a
        caption. Only some models have saliencies.

    Raises:
        ValueError: the model takes features of regions, which lie on no grid.
    """
    if not data.has_pictures:
        raise ValueError("Grounding needs pictures: features of regions lie on no grid of patches.")
    by_image = {number: list(group) for number, group in itertools.groupby(located, key=lambda caption: caption.image)}

    def measure(seen: Encoded) -> list[_Image]:
        area = visible_area(processor.image_processor, seen.image_size, seen.pixel_size)
        return [_image(model, processor.tokenizer, seen, by_image[seen.number], area)]

    texts = {number: [caption.caption for caption in captions] for number, captions in by_image.items()}
    return _summary(measure_by_image(model, processor, data, texts, batch_size, measure))


def _image(model, tokenizer, seen: Encoded, captions: list[LocatedCaption], area) -> _Image:
    image, text, index = seen.image, seen.text, seen.image_row
    left, top, right, bottom = area
    size = (bottom - top, right - left)
    maps, densities, boxes, types, num_cut, of_captions = [], [], [], [], 0, []
    for row, caption in zip(seen.rows, captions, strict=True):
        words = words_of(caption.caption, tokenizer)
        token_maps = word_maps((image, text), index, row, level_weights=model.aligner.level_weights).cpu()
        located = [words_within(words, phrase.start, phrase.end) for phrase in caption.phrases]
        num_cut += located.count([])
        caption_map = _mean_map(token_maps, words_within(words, 0, len(caption.caption))) if any(located) else None
        for phrase, own in zip(caption.phrases, located, strict=True):
            if own:
                phrase_map = _mean_map(token_maps, own)
                maps.append(phrase_map.numpy())
                densities.append(location_density(phrase_map, caption_map).numpy())
                boxes.append(np.array(phrase.boxes) - [left, top, left, top])
                types.append(phrase.types)
        is_inside = [any(max(p.start, w.start) < min(p.end, w.end) for p in caption.phrases) for w in words]
        is_outside = ~np.array(is_inside)
        saliency = None
        if text.word_saliency is not None:
            values = text.word_saliency[row].float().cpu()
            saliency = auroc([-values[list(word.tokens)].mean().item() for word in words], is_outside)
        of_captions.append((saliency, auroc([-float(word.is_content) for word in words], is_outside)))
    every_box = np.concatenate(boxes) if boxes else np.zeros((0, 4))
    return _Image(
        seen.number, _hits(maps, densities, boxes, every_box, size), types, num_cut,
        _patch_saliency(image, index, every_box, size), of_captions,
    )  # fmt: skip


def _mean_map(token_maps: torch.Tensor, words: list[Word]) -> torch.Tensor:
    """(rows, columns): the mean over words of the mean over their tokens."""
    return torch.stack([token_maps[list(word.tokens)].mean(0) for word in words]).mean(0)


def _hits(
    maps: list[np.ndarray], densities: list[np.ndarray], boxes: list[np.ndarray], every_box: np.ndarray, size
) -> dict[str, np.ndarray]:
    game = pointing_game(maps, boxes, size)
    middle = [m.copy() for m in maps]
    for m in middle:
        m[CORNERS] = m.min() - 1
    corners = [(m == m.max())[CORNERS].sum() / (m == m.max()).sum() for m in maps]
    areas = (every_box[:, 2:] - every_box[:, :2]).prod(axis=1)
    centre = every_box[areas.argmax()].reshape(2, 2).mean(axis=0) if len(every_box) else np.zeros(2)
    return {
        "accuracy": game.hit,
        "densest": pointing_game(densities, boxes, size).hit,
        "without_corners": pointing_game(middle, boxes, size).hit,
        "random_patch": game.random_patch,
        "image_center": game.image_center,
        "largest_box": np.array([float(points_in_boxes(centre, own)) for own in boxes]),
        "corner_share": np.array(corners),
    }


def _patch_saliency(image, index: int, every_box: np.ndarray, size) -> float | None:
    if image.patch_saliency is None:
        return None
    rows, columns = image.spatial_shapes[index].tolist()
    values = on_grid(image, image.patch_saliency[index].float(), index, rows * columns).cpu().numpy()
    is_outside = ~points_in_boxes(patch_centers((rows, columns), size), every_box)
    return auroc(-values, is_outside.flatten())


def _summary(images: list[_Image]) -> dict[str, Any]:
    owners = [image.number for image in images for _ in image.types]
    types = [names for image in images for names in image.types]
    values = {name: np.concatenate([image.hits[name] for image in images]) for name in images[0].hits}
    corners = values.pop("corner_share")
    summaries = {name: summarize_hits(hits, owners, types) for name, hits in values.items()}
    pointing = {
        group: {**whole._asdict(), **{name: summary[group].accuracy for name, summary in summaries.items()}}
        for group, whole in summaries["accuracy"].items()
    }
    by_caption = [(image.number, *areas) for image in images for areas in image.captions]
    areas: dict[str, list[tuple[int, float | None]]] = {
        "patch_saliency": [(image.number, image.patch_saliency) for image in images],
        "word_saliency": [(number, area) for number, area, _ in by_caption],
        "content_words": [(number, area) for number, _, area in by_caption],
    }
    return {
        "num_cut": sum(image.num_cut for image in images),
        "pointing": pointing,
        "corner_share": float(100 * corners.mean()),
        "auroc": {name: mean for name, pairs in areas.items() if (mean := _mean_area(pairs)) is not None},
    }


def _mean_area(pairs: list[tuple[int, float | None]]) -> dict[str, float] | None:
    """The mean over those that have tokens on both sides, in [0, 1]."""
    kept = [(number, area) for number, area in pairs if area is not None and not np.isnan(area)]
    if not kept:
        return None
    owners, values = zip(*kept, strict=True)
    mean = summarize_hits(values, owners)["all"]
    return {"mean": mean.accuracy / 100, "low": mean.low / 100, "high": mean.high / 100, "number": mean.num_phrases}


def grounding_table(result: dict[str, Any]) -> str:
    """The figures as lines of text."""
    columns = ("accuracy", "densest", "without_corners", *BASELINES)
    lines = [f"{'phrases':<14}{'number':>8}" + "".join(f"{name.replace('_', ' '):>17}" for name in columns) + "   95 %"]
    for group, row in result["pointing"].items():
        figures = "".join(f"{row[name]:>17.1f}" for name in columns)
        lines.append(f"{group:<14}{row['num_phrases']:>8}{figures}   [{row['low']:.1f}, {row['high']:.1f}]")
    lines.append(f"{result['corner_share']:.1f} % of the phrases point at a corner patch; {result['num_cut']} are cut off")
    for name, area in result["auroc"].items():
        lines.append(f"AUROC of {name.replace('_', ' ')}: {area['mean']:.3f}   [{area['low']:.3f}, {area['high']:.3f}]")
    return "\n".join(lines)
