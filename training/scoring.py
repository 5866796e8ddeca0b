"""All scores of a split: captions are encoded once; images come block by block, meet all captions, and are dropped.

The tokens of all images are never in memory, and the scores are in a file. For 5,000 images of 577 patches and 25,000
captions of 13 tokens, 512 wide in float32, that is above the model: 25,000 x 13 x 512 x 4 bytes = 0.67 GB of words (sorted
by length, so that padding adds little); 128 x 577 x 512 x 4 bytes = 0.15 GB for each of the fields of a block of images, at
most five of this size (GRM without region prompts); less than 1 GB of activations in a step of the encoders; 13 MB of
scores: under 3 GB in all. All patches at once would be 5.9 GB; the score matrix on disk is 0.5 GB.

Blocks do not depend on the batch size or the number of processes, so neither does the result, but for rounding in the
vision encoder, whose steps have the batch size.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from tqdm import tqdm

from granalign_hf.modeling.modeling_granalign import GranAlignModel
from granalign_hf.modeling.processing_granalign import GranAlignProcessor
from granalign_hf.modeling.standard_errors import has_standard_errors, standard_errors
from granalign_hf.training.data import CaptionedImages
from granalign_hf.training.features import TokenFeatures, fingerprint
from granalign_hf.uncertainty import entropy_bounds
from granalign_hf.whole_files import write_whole

IMAGE_TOKENS = (
    "patch_embeds", "patch_mask", "patch_saliency", "patch_logits", "region_assignment", "region_weights", "region_means",
    "region_log_vars", "region_embeds",
)  # fmt: skip
TEXT_TOKENS = ("word_embeds", "word_mask", "word_saliency")
IMAGES_PER_BLOCK = 128
CAPTIONS_PER_BLOCK = 512
SALIENCIES = ("patch_saliency", "word_saliency")
DIAGNOSTICS = (*SALIENCIES, "distinct_regions", "effective_patches", "region_mean_cosine")


class Scored(NamedTuple):
    """A split in numbers."""

    scores: np.ndarray  # (images, captions) float32, a file mapped into memory
    diagnostics: dict[str, float]


class Measured(NamedTuple):
    """A split in numbers, and how sure they are; the last two where regions with a variance take part in the scores."""

    scores: np.ndarray  # (images, captions) float32, a file mapped into memory
    diagnostics: dict[str, float]
    standard_errors: np.ndarray | None = None  # of the scores, likewise
    image_entropies: np.ndarray | None = None  # (images,), the middle of the bounds of `entropy_bounds`


@dataclass
class Encoder:
    """The tokens of a split, from pixels and texts or from stored features, as the aligner scores them."""

    model: GranAlignModel
    processor: GranAlignProcessor
    data: CaptionedImages
    batch_size: int
    features: TokenFeatures | None = None

    def images(self, numbers: range) -> SimpleNamespace:
        """Images of a block, `batch_size` at a time."""
        steps = [numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size)]
        parts = [self._image_step(step) for step in steps]
        return SimpleNamespace(
            **{name: None if parts[0][name] is None else torch.cat([part[name] for part in parts]) for name in IMAGE_TOKENS}
        )

    def _image_step(self, numbers: range) -> dict:
        if self.features is None:
            pictures = [self.data.image(n) for n in numbers]
            pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
            inputs = {"pixel_values": pixels.to(self.model.device)}
        else:
            inputs = send_to_device(self.features.images(numbers), self.model.device)
        image = self.model.get_image_features(**inputs)
        return {name: image.get(name) for name in IMAGE_TOKENS}

    def captions(self, numbers: Sequence[int], texts: list[str]) -> SimpleNamespace:
        """Captions of a block: their numbers in the split, and what they say."""
        if self.features is None:
            inputs = dict(self.processor(text=texts, return_tensors="pt").to(self.model.device))
        else:
            inputs = send_to_device(self.features.captions(numbers), self.model.device)
        text = self.model.get_text_features(**inputs)
        return SimpleNamespace(**{name: text.get(name) for name in TEXT_TOKENS})


class Captions(NamedTuple):
    """The captions of a split, each text once: images that share a caption must tie, not differ by a rounding error."""

    texts: list[str]  # all different
    numbers: np.ndarray  # (texts,) the first caption of the split with that text
    text_of: np.ndarray  # (captions,) position in `texts`
    owners: np.ndarray  # (captions,) image
    blocks: list[np.ndarray]  # positions in `texts`, by length

    @classmethod
    def of(cls, data: CaptionedImages, tokenizer) -> Captions:
        positions: dict[str, int] = {}
        text_of = np.array([positions.setdefault(caption, len(positions)) for caption in data.all_captions])
        texts = list(positions)
        order = np.argsort([len(ids) for ids in tokenizer(texts, truncation=True)["input_ids"]], kind="stable")
        blocks = [order[start : start + CAPTIONS_PER_BLOCK] for start in range(0, len(order), CAPTIONS_PER_BLOCK)]
        return cls(texts, np.unique(text_of, return_index=True)[1], text_of, data.caption_image_index, blocks)

    def own(self, images: range) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each block, the captions of these images in it: their places in the block, and their images, from 0."""
        captions = np.flatnonzero((self.owners >= images.start) & (self.owners < images.stop))
        pairs = []
        for block in self.blocks:
            place = np.full(len(self.texts), -1)
            place[block] = np.arange(len(block))
            places = place[self.text_of[captions]]
            pairs.append((places[places >= 0], self.owners[captions][places >= 0] - images.start))
        return pairs


@contextmanager
def scored_split(
    model: GranAlignModel,
    processor: GranAlignProcessor,
    data: CaptionedImages,
    batch_size: int,
    folder: Path,
    features: TokenFeatures | None = None,
) -> Iterator[Scored]:
    """Scores of every image with every caption of a split, shared between the processes, and the diagnostics.

    Args:
        batch_size: images in a step of the vision encoder, at most `IMAGES_PER_BLOCK`.
        folder: of the unfinished work, one that all processes see; it is made, and removed at the end. A block that is
            finished stays so: after an interruption the same model goes on with the same data where it was.
        features: of the frozen encoders on this split, instead of its pictures and texts.
    """
    with measured_split(model, processor, data, batch_size, folder, features, has_uncertainty=False) as measured:
        yield Scored(measured.scores, measured.diagnostics)


@contextmanager
def measured_split(
    model: GranAlignModel,
    processor: GranAlignProcessor,
    data: CaptionedImages,
    batch_size: int,
    folder: Path,
    features: TokenFeatures | None = None,
    has_uncertainty: bool = True,
) -> Iterator[Measured]:
    """As [`scored_split`], with the standard error of every score and the entropy of every image."""
    state = PartialState()
    model.eval()
    names = _files(model, has_uncertainty)
    if state.is_main_process:
        _open(folder, _key(model, processor, data, features, names), names, (len(data), len(data.all_captions)))
    state.wait_for_everyone()
    blocks = [range(start, min(start + IMAGES_PER_BLOCK, len(data))) for start in range(0, len(data), IMAGES_PER_BLOCK)]
    unfinished = [block for block in blocks if not _moments_file(folder, block).is_file()]
    if unfinished:
        _score_blocks(Encoder(model, processor, data, batch_size, features), unfinished, folder, state)
    state.wait_for_everyone()
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    yield Measured(diagnostics=_diagnostics(folder), **arrays)
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(folder)


def _files(model: GranAlignModel, has_uncertainty: bool) -> list[str]:
    """The arrays of [`Measured`] that there are."""
    is_measured = has_uncertainty and has_standard_errors(model.config)
    return ["scores", "standard_errors", "image_entropies"] if is_measured else ["scores"]


def _key(model, processor, data: CaptionedImages, features: TokenFeatures | None, names: list[str]) -> str:
    """What the scores depend on."""
    sizes = [IMAGES_PER_BLOCK, CAPTIONS_PER_BLOCK]
    return json.dumps([fingerprint([model], processor, data), features is None, *sizes, *names])


def _open(folder: Path, key: str, names: list[str], shape: tuple[int, int]) -> None:
    """Empty files of the arrays, unless the folder has them with the same key."""
    if (folder / "key").is_file() and (folder / "key").read_text() == key:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in names:
        sizes = shape[:1] if name.startswith("image_") else shape
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, sizes).flush()
    (folder / "key").write_text(key)


@torch.no_grad()
def _score_blocks(encoder: Encoder, unfinished: list[range], folder: Path, state: PartialState) -> None:
    """Every process takes some of the blocks."""
    captions = Captions.of(encoder.data, encoder.processor.tokenizer)
    texts = _encode_captions(encoder, captions, state)
    if state.is_main_process:
        write_whole(folder / "captions.json", json.dumps(_text_moments(captions, texts)))
    mine = unfinished[state.process_index :: state.num_processes]
    for block in tqdm(mine, desc="images", leave=False, disable=not state.is_main_process):
        _score_block(encoder, captions, texts, block, folder)


def _score_block(encoder: Encoder, captions: Captions, texts: list[SimpleNamespace], block: range, folder: Path) -> None:
    image = encoder.images(block)
    measures = {"scores": encoder.model.score, "standard_errors": functools.partial(standard_errors, encoder.model)}
    for name, measure in measures.items():
        if (folder / f"{name}.npy").is_file():
            values = np.empty((len(block), len(captions.texts)), np.float32)
            for positions, text in zip(captions.blocks, texts, strict=True):
                values[:, positions] = measure(image, text).cpu().numpy()
            _write_rows(folder / f"{name}.npy", block, values[:, captions.text_of])
    if (folder / "image_entropies.npy").is_file():
        _write_rows(folder / "image_entropies.npy", block, torch.stack(entropy_bounds(image)).mean(0).cpu().numpy())
    own = [(text, *pair) for text, pair in zip(texts, captions.own(block), strict=True) if len(pair[0])]
    # last: it says that the block is finished
    write_whole(_moments_file(folder, block), json.dumps(image_moments(image, own)))


def _write_rows(path: Path, block: range, rows: np.ndarray) -> None:
    file = np.load(path, mmap_mode="r+")
    file[block.start : block.stop] = rows
    file.flush()


def _encode_captions(encoder: Encoder, captions: Captions, state: PartialState) -> list[SimpleNamespace]:
    """The tokens of each block of captions: every process encodes some of the blocks, all get all."""
    mine = []
    numbers = range(state.process_index, len(captions.blocks), state.num_processes)
    for number in tqdm(numbers, desc="captions", leave=False, disable=not state.is_main_process):
        positions = captions.blocks[number]
        text = encoder.captions(captions.numbers[positions], [captions.texts[p] for p in positions])
        mine.append((number, send_to_device(vars(text), "cpu")))
    blocks = dict(gather_object(mine))
    return [SimpleNamespace(**send_to_device(blocks[n], encoder.model.device)) for n in range(len(captions.blocks))]


# ---------------------------------------------------------------------------------------------------------- diagnostics


def _moments(values: Tensor) -> list[float]:
    """Number, sum and sum of squares, which add up over blocks."""
    values = values.detach().cpu().double()
    return [values.numel(), values.sum().item(), values.square().sum().item()]


def _text_moments(captions: Captions, texts: list[SimpleNamespace]) -> dict[str, list[float]]:
    if texts[0].word_saliency is None:
        return {}
    repeats = np.bincount(captions.text_of)
    totals = np.zeros(3)
    for positions, text in zip(captions.blocks, texts, strict=True):
        count = torch.as_tensor(repeats[positions], device=text.word_mask.device)
        mask = text.word_mask.repeat_interleave(count, 0)
        totals += _moments(text.word_saliency.repeat_interleave(count, 0)[mask])
    return {"word_saliency": totals.tolist()}


def image_moments(
    image: SimpleNamespace, own: Sequence[tuple[SimpleNamespace, np.ndarray, np.ndarray]]
) -> dict[str, list[float]]:
    """Number, sum and sum of squares of what the diagnostics average over the images of a block.

    Args:
        image: tokens of B images. own: blocks of captions, each with the places in it of captions of these images, and
            the numbers of their images.
    """
    moments = {}
    if image.patch_saliency is not None:
        moments["patch_saliency"] = _moments(image.patch_saliency[image.patch_mask])
    if image.region_embeds is not None:
        moments["distinct_regions"] = _moments(_is_best_region(image.region_embeds, own).double())
        moments["effective_patches"] = _moments(1 / image.region_assignment.square().sum(1))
    if image.region_means is not None and image.region_means.shape[1] > 1:
        means = torch.nn.functional.normalize(image.region_means, dim=-1)
        num_regions = means.shape[1]
        cosines = (means @ means.transpose(1, 2)).sum((1, 2)) - num_regions
        moments["region_mean_cosine"] = _moments(cosines / (num_regions * (num_regions - 1)))
    return moments


def _is_best_region(region_embeds: Tensor, own: Sequence[tuple[SimpleNamespace, np.ndarray, np.ndarray]]) -> Tensor:
    """(B, K) bool: the regions that at least one word of the image's own captions fits best."""
    is_best = torch.zeros(region_embeds.shape[:2], dtype=torch.bool, device=region_embeds.device)
    for text, places, owners in own:
        images = torch.as_tensor(owners, device=is_best.device)
        words, mask = text.word_embeds[places], text.word_mask[places]
        best = torch.einsum("twd,tkd->twk", words, region_embeds[images]).argmax(-1)
        is_best[images[:, None].expand_as(best)[mask], best[mask]] = True
    return is_best


def _moments_file(folder: Path, block: range) -> Path:
    return folder / f"images-{block.start}.json"


def _diagnostics(folder: Path) -> dict[str, float]:
    """Whether saliency and regions do anything: mean and spread of the saliencies, and how alike the regions are.

    `region_mean_cosine` is the mean cosine between two regions of one image (1: all regions are the same).
    `distinct_regions` is the share of the regions of an image that are the best region of at least one word of its own
    captions, mean over images (1 / K: one region takes all words).
    `effective_patches` is 1 / sum_l assignment_lk^2, mean over images and regions (Lv: a region is the mean of all patches).
    """
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    values: dict[str, float] = {}
    for name in DIAGNOSTICS:
        moments = [file[name] for file in files if name in file]
        if not moments:
            continue
        count, total, squares = np.sum(moments, axis=0).tolist()
        mean = total / count
        if name in SALIENCIES:
            values[f"{name}_mean"] = mean
            values[f"{name}_std"] = math.sqrt(max(squares - count * mean**2, 0) / max(count - 1, 1))
        else:
            values[name] = mean
    return values
