"""Images with captions as a training sees them: drawn, cropped, augmented, and gathered into batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as PILImage
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from granalign_hf.training.data import CaptionedImages
from granalign_hf.training.pictures import UnreadableImageError


class TrainingSet(Dataset):
    """What is trained on; its items depend on the epoch."""

    def __init__(self, seed: int, captions_per_image: int, crop_scale: float = 1.0, has_pictures: bool = True):
        if crop_scale < 1 and not has_pictures:
            raise ValueError(
                f"`crop_scale` {crop_scale} crops pictures, but the images of this data set are features of regions. Set it "
                "to 1."
            )
        self.seed, self.captions_per_image, self.crop_scale = seed, captions_per_image, crop_scale
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers outlive an epoch, and must see the next

    def __len__(self) -> int:
        """Images of an epoch."""
        raise NotImplementedError

    @property
    def epoch(self) -> int:
        """From 0; the training sets it before it asks for the items of an epoch."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    @property
    def num_corrupt(self) -> int:
        """Images that could not be read and were skipped, in this epoch and process."""
        return 0

    def item(self, number: int, name: str, image: PILImage.Image | np.ndarray, captions: list[str]) -> dict:
        """An image, augmented, with some of its captions: it depends on (seed, epoch, number) only, never on the order."""
        rng = np.random.default_rng((self.seed, self.epoch, number))
        chosen = draw_captions(rng, captions, self.captions_per_image)
        if self.crop_scale < 1:
            assert isinstance(image, PILImage.Image)  # features are refused before
            image = random_resized_crop(rng, image, self.crop_scale)
        captions = [captions[c] for c in chosen]
        return {"number": number, "name": name, "image": image, "captions": captions, "rng": rng}


class TrainingImages(TrainingSet):
    """Images of a split, augmented, each with some of its captions."""

    def __init__(self, data: CaptionedImages, captions_per_image: int, crop_scale: float, seed: int):
        super().__init__(seed, captions_per_image, crop_scale, data.has_pictures)
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> dict:
        with hint_at_corrupt_share():
            image = self.data.image(number)
        return self.item(number, self.data.image_ids[number], image, self.data.captions[number])


@contextmanager
def hint_at_corrupt_share() -> Iterator[None]:
    """For a run that ends with the first image that cannot be read."""
    try:
        yield
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{error} Mend or remove it, or leave out a share with `max_corrupt_share`.") from error


def draw_captions(rng: np.random.Generator, captions: list[str], count: int) -> np.ndarray:
    """Positions of `count` different captions (all of them for 0 or too few)."""
    return rng.permutation(len(captions))[: count or None]


def noisy_order(num_captions: int, share: float, seed: int) -> np.ndarray:
    """An order of captions in which a share of them, drawn at random, have changed places with each other."""
    order = np.arange(num_captions)
    moved = np.random.default_rng(seed).permutation(num_captions)[: round(share * num_captions)]
    order[moved] = np.roll(moved, 1)
    return order


def random_resized_crop(rng: np.random.Generator, image: PILImage.Image, min_scale: float) -> PILImage.Image:
    """A crop of min_scale..1 of the area, sides stretched by 3/4..4/3, resized back; flipped every second time."""
    width, height = image.size
    area = rng.uniform(min_scale, 1)
    stretch = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)) / 2)
    crop_width = min(width * np.sqrt(area) * stretch, width)
    crop_height = min(height * np.sqrt(area) / stretch, height)
    left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
    image = image.resize(image.size, PILImage.Resampling.BILINEAR, box=(left, top, left + crop_width, top + crop_height))
    return image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def augment_caption(rng: np.random.Generator, input_ids: list[int], tokenizer, share: float) -> list[int]:
    """Changes a share of the tokens: half [MASK], a tenth random, the rest deleted (LAPS's recipe). Special tokens stay."""
    kept = []
    for token in input_ids:
        fate = rng.random() / share if share > 0 and token not in tokenizer.all_special_ids else 1.0
        if fate < 0.5 and tokenizer.mask_token_id is not None:
            kept.append(tokenizer.mask_token_id)
        elif 0.5 <= fate < 0.6:
            kept.append(int(rng.integers(len(tokenizer))))
        elif fate >= 1:
            kept.append(token)
    has_word = any(token not in tokenizer.all_special_ids for token in kept)
    return kept if has_word else input_ids


@dataclass
class Collator:
    """Items of [`TrainingImages`] -> a batch of tensors for `GranAlignModel.forward`, and the `image_names`."""

    processor: ProcessorMixin
    caption_augmentation: float

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor | list[str]]:
        tokenizer = self.processor.tokenizer
        captions, owners = [], []
        for item in items:
            for ids in tokenizer(item["captions"], truncation=True)["input_ids"]:
                captions.append(augment_caption(item["rng"], ids, tokenizer, self.caption_augmentation))
                owners.append(item["number"])
        batch = tokenizer.pad({"input_ids": captions}, return_tensors="pt")
        pixels = self.processor.image_processor([item["image"] for item in items], return_tensors="pt")
        return {
            **batch,
            "pixel_values": pixels["pixel_values"],
            "image_ids": torch.tensor([item["number"] for item in items]),
            "image_names": [item["name"] for item in items],
            "caption_image_ids": torch.tensor(owners),
        }
