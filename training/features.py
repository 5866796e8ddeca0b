"""Frozen encoders: their token features, computed once, kept on disk, and read back memory-mapped."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from granalign_hf.fingerprints import add_weights, image_settings, text_settings
from granalign_hf.modeling import processing_granalign
from granalign_hf.modeling.modeling_granalign import GranAlignModel
from granalign_hf.modeling.processing_granalign import GranAlignProcessor
from granalign_hf.training.batches import TrainingSet, draw_captions
from granalign_hf.training.data import CaptionedImages


@dataclass
class StoredOutput(BaseModelOutput):
    """Of an encoder; a loader could not pin the memory of one that is not told how."""

    def pin_memory(self) -> StoredOutput:
        return StoredOutput(last_hidden_state=self.last_hidden_state.pin_memory())


@dataclass
class TokenFeatures:
    """Encoder outputs of a split in float16: images (N, tokens, hidden); captions one after the other, with offsets."""

    data: CaptionedImages
    image_hidden: np.ndarray
    word_hidden: np.ndarray  # (all tokens, hidden)
    word_ids: np.ndarray  # (all tokens,)
    word_offsets: np.ndarray  # (captions + 1,)
    image_size: tuple[int, int]  # (height, width) in pixels of what the vision encoder saw
    first_caption: np.ndarray  # (N + 1,)

    def images(self, numbers: Sequence[int]) -> dict:
        """Arguments of `get_image_features` that stand for these images."""
        hidden = torch.from_numpy(self.image_hidden[list(numbers)]).float()
        return {"vision_model_output": StoredOutput(last_hidden_state=hidden), "image_size": self.image_size}

    def captions(self, numbers: Iterable[int]) -> dict:
        """Arguments of `get_text_features` that stand for these captions."""
        spans = [slice(self.word_offsets[n], self.word_offsets[n + 1]) for n in numbers]
        words = pad_sequence([torch.from_numpy(self.word_hidden[s].copy()) for s in spans], batch_first=True)
        ids = pad_sequence([torch.from_numpy(self.word_ids[s]) for s in spans], batch_first=True)
        lengths = torch.tensor([s.stop - s.start for s in spans])
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "text_model_output": StoredOutput(last_hidden_state=words.float()),
        }


def token_features(
    model: GranAlignModel,
    processor: GranAlignProcessor,
    data: CaptionedImages,
    folder: Path,
    batch_size: int,
    is_quiet: bool = False,
) -> TokenFeatures:
    """Reads the features of a split, or computes and stores them: all processes of one machine, or the first one of several.

    Their key is made of the encoders' weights, the preprocessing, the precision of products and the data, picture files
    included (by size and time of their last change), so that a stale cache is never read. A cache
    appears as a whole, so that it is never read half-written, whoever else computes the same one.

    Raises:
        ValueError: an encoder's output is not finite or too large for float16; the message names the image or caption.
    """
    folder = folder / fingerprint((model.vision_model, model.text_model), processor, data)
    state = PartialState()
    with _workplace(folder) if state.is_main_process else nullcontext() as own:
        (workplace,) = broadcast_object_list([own])
        if workplace is not None:
            _compute(model, processor, data, workplace, batch_size, is_quiet, state)
            if state.is_main_process:
                _put(workplace, folder)
    state.wait_for_everyone()
    arrays = {n: np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("image_hidden", "word_hidden")}
    arrays |= {n: np.load(folder / f"{n}.npy") for n in ("word_ids", "word_offsets")}
    height, width = np.load(folder / "image_size.npy").tolist()
    first_caption = np.concatenate([[0], np.cumsum([len(captions) for captions in data.captions])])
    return TokenFeatures(data, image_size=(height, width), first_caption=first_caption, **arrays)


@contextmanager
def _workplace(folder: Path) -> Iterator[Path | None]:
    """A new folder of this run alone beside one that is not there, else `None`."""
    if folder.is_dir():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as outer:
        (Path(outer) / "features").mkdir()
        yield Path(outer) / "features"


def _put(new: Path, folder: Path) -> None:
    try:
        os.replace(new, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another run was faster, with the same features
            raise


def fingerprint(models: Iterable[PreTrainedModel], processor: GranAlignProcessor, data: CaptionedImages) -> str:
    """Tells apart whatever the outputs of these models on a split depend on: weights, preprocessing, pictures, captions."""
    digest = hashlib.sha256()
    for model in models:
        digest.update(model.config.to_json_string().encode())
        add_weights(digest, model)
    digest.update(image_settings(processor).encode())
    digest.update(Path(processing_granalign.__file__).read_bytes())  # how a picture becomes RGB is code, not a setting
    digest.update(text_settings(processor).encode())
    digest.update(json.dumps([data.table._fingerprint, data.image_column, data.rows, data.captions]).encode())
    digest.update(json.dumps([_picture_files(data), torch.get_float32_matmul_precision()]).encode())
    return digest.hexdigest()[:32]


def _picture_files(data: CaptionedImages) -> list[tuple]:
    """Name, size and time of the picture files that the table only points to: its own fingerprint does not see them."""
    if not data.has_pictures:
        return []
    column = data.table.data.column(data.image_column)
    is_outside = pyarrow.compute.struct_field(column, "bytes").is_null()
    paths = pyarrow.compute.struct_field(column, "path").filter(is_outside).drop_null().unique().to_pylist()
    stats = [(path, os.stat(path)) for path in paths if os.path.isfile(path)]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


@torch.no_grad()
def _compute(
    model, processor, data: CaptionedImages, folder: Path, batch_size: int, is_quiet: bool, state: PartialState
) -> None:
    """Every process of one machine has its turn with the batches, and writes into the same files."""
    device = model.device
    model.eval()

    def pixel_values(numbers: range) -> Tensor:
        pixels = processor.image_processor([data.image(n) for n in numbers], return_tensors="pt")["pixel_values"]
        return pixels.to(device)

    # Pages of a file that several machines write at once are not safe on a file system that they share.
    num_shares = state.num_processes if len({*gather_object([platform.node()])}) == 1 else 1

    def own_starts(total: int, step: int, title: str) -> Iterable[int]:
        is_idle = state.process_index >= num_shares
        starts = range(0) if is_idle else range(0, total, step)[state.process_index :: num_shares]
        return tqdm(starts, desc=title, disable=is_quiet)

    first = pixel_values(range(1))
    captions = data.all_captions
    ids = processor.tokenizer(captions, truncation=True)["input_ids"]
    offsets = np.concatenate([[0], np.cumsum([len(i) for i in ids])])
    shapes = {
        "image_hidden": (len(data), *model.vision_model(first).last_hidden_state.shape[1:]),
        "word_hidden": (int(offsets[-1]), model.config.text_config.hidden_size),
    }
    if state.is_main_process:
        np.save(folder / "image_size.npy", np.array(first.shape[-2:]))
        np.save(folder / "word_ids.npy", np.concatenate(ids))
        np.save(folder / "word_offsets.npy", offsets)
        for name, shape in shapes.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, shape)
    state.wait_for_everyone()
    images, words = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in shapes)
    for start in own_starts(len(data), batch_size, "image features"):
        numbers = range(start, min(start + batch_size, len(data)))
        hidden = model.vision_model(pixel_values(numbers)).last_hidden_state
        images[start : start + len(numbers)] = _to_half(hidden, [f"image `{data.image_ids[n]}`" for n in numbers])
    images.flush()
    by_length = np.argsort([len(i) for i in ids], kind="stable")
    for start in own_starts(len(ids), 4 * batch_size, "caption features"):
        chosen = by_length[start : start + 4 * batch_size]
        batch = processor.tokenizer.pad({"input_ids": [ids[n] for n in chosen]}, return_tensors="pt").to(device)
        hidden = model.text_model(**batch).last_hidden_state.masked_fill(~batch["attention_mask"].bool()[..., None], 0)
        for number, tokens in zip(chosen, _to_half(hidden, [f"caption {captions[n]!r}" for n in chosen]), strict=True):
            words[offsets[number] : offsets[number + 1]] = tokens[: len(ids[number])]
    words.flush()
    state.wait_for_everyone()


def _to_half(hidden: Tensor, names: list[str]) -> np.ndarray:
    """(n, ...) -> float16, all of it finite."""
    half = hidden.half()
    for name, one, is_finite in zip(names, hidden, half.flatten(1).isfinite().all(1).tolist(), strict=True):
        if not is_finite:
            raise ValueError(
                f"The features of {name} do not fit float16: they reach {one.abs().max():g}, it holds up to 65504. Train "
                "without `freeze_encoders`, or with another encoder."
            )
    return half.cpu().numpy()


class FeatureImages(TrainingSet):
    """The images of [`TokenFeatures`], each with some of its captions; stands in for `TrainingImages`.

    `caption_order`: place p of all captions gets the one in place `caption_order[p]` (see `noisy_order`).
    """

    def __init__(self, features: TokenFeatures, captions_per_image: int, seed: int, caption_order: np.ndarray):
        super().__init__(seed, captions_per_image)
        self.features, self.caption_order = features, caption_order

    def __len__(self) -> int:
        return len(self.features.data)

    def __getitem__(self, number: int) -> dict:
        rng = np.random.default_rng((self.seed, self.epoch, number))
        chosen = draw_captions(rng, self.features.data.captions[number], self.captions_per_image)
        return {"number": number, "captions": self.caption_order[self.features.first_caption[number] + np.sort(chosen)]}


@dataclass
class FeatureCollator:
    """Items of [`FeatureImages`] -> a batch for `GranAlignModel.forward` that skips the encoders."""

    features: TokenFeatures

    def __call__(self, items: list[dict]) -> dict:
        numbers = [item["number"] for item in items]
        return {
            **self.features.images(numbers),
            **self.features.captions(c for item in items for c in item["captions"]),
            "image_ids": torch.tensor(numbers),
            "image_names": [self.features.data.image_ids[number] for number in numbers],
            "caption_image_ids": torch.tensor([item["number"] for item in items for _ in item["captions"]]),
        }
