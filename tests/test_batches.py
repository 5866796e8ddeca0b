"""Augmentation depends on (seed, epoch, number) alone, the order on the seed alone, whoever loads the data."""

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from tiny import tiny_processor

from granalign_hf.training.batches import (
    Collator,
    TrainingImages,
    augment_caption,
    noisy_order,
    random_resized_crop,
)
from granalign_hf.training.build import word_tokenizer
from granalign_hf.training.data import load_split
from granalign_hf.training.loaders import training_loader


def test_item_depends_on_seed_epoch_and_number_only():
    data = load_split("scenes", "train", num_scenes=3)
    images = TrainingImages(data, captions_per_image=2, crop_scale=0.6, seed=7)
    first = images[1]
    images[0], images[2]
    again = images[1]
    assert first["captions"] == again["captions"] and first["image"].tobytes() == again["image"].tobytes()
    assert len(set(first["captions"])) == 2
    images.epoch = 1
    assert images[1]["image"].tobytes() != first["image"].tobytes()


def test_crop_keeps_size_and_share():
    ramp = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    image = PILImage.fromarray(np.stack([ramp] * 3, -1))
    seen = []
    for seed in range(50):
        crop = random_resized_crop(np.random.default_rng(seed), image, 0.6)
        assert crop.size == image.size
        row = np.asarray(crop)[50, :, 0].astype(int)
        seen.append(abs(int(row[-1]) - int(row[0])) / 199)
    assert min(seen) > 0.6 and max(seen) <= 1 and np.std(seen) > 0.02


def test_caption_augmentation_has_its_shares():
    tokenizer = word_tokenizer(["one two three four five six"])
    ids = tokenizer(" ".join(["one", "two", "three", "four", "five", "six"] * 400))["input_ids"]
    changed = augment_caption(np.random.default_rng(0), ids, tokenizer, 0.2)
    masked = sum(token == tokenizer.mask_token_id for token in changed) / len(ids)
    deleted = 1 - len(changed) / len(ids)
    assert abs(masked - 0.10) < 0.02 and abs(deleted - 0.08) < 0.02
    assert changed[0] == tokenizer.cls_token_id and changed[-1] == tokenizer.sep_token_id
    assert augment_caption(np.random.default_rng(0), ids, tokenizer, 0.0) == ids


def test_augmentation_never_empties_a_caption():
    tokenizer = word_tokenizer(["dog"])
    ids = tokenizer("dog")["input_ids"]
    for seed in range(200):
        changed = augment_caption(np.random.default_rng(seed), ids, tokenizer, 0.9)
        assert len(changed) >= 3


@pytest.mark.parametrize("share", [0, 0.2, 1])
def test_a_share_of_the_captions_changes_places(share):
    order = noisy_order(1000, share, seed=3)
    assert sorted(order) == list(range(1000)) and (order != np.arange(1000)).sum() == 1000 * share
    assert (order == noisy_order(1000, share, seed=3)).all()
    assert share in (0, 1) or (order != noisy_order(1000, share, seed=4)).any()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_batches_of_an_epoch_are_the_same_with_and_without_workers(num_workers):
    """Also where the run begins with it, as one that is resumed; the order is that of a plain loader without workers."""

    def batches(loader, epoch):
        order.manual_seed(epoch)
        scenes.epoch = epoch
        return [(b["image_ids"].tolist(), b["pixel_values"], b["input_ids"]) for b in loader]

    order = torch.Generator()
    scenes = TrainingImages(load_split("scenes", "train", num_scenes=9), 1, 0.6, seed=0)
    collate = Collator(tiny_processor(), 0.2)
    plain = torch.utils.data.DataLoader(scenes, 4, shuffle=True, generator=order, collate_fn=collate, drop_last=True)
    expected = [batches(plain, epoch) for epoch in range(3)]
    for start in (0, 1):
        loader = training_loader(scenes, collate, 4, num_workers, order, is_pinned=False)
        for epoch in range(start, 3):
            for (numbers, pixels, ids), (own, own_pixels, own_ids) in zip(
                expected[epoch], batches(loader, epoch), strict=True
            ):
                assert numbers == own and torch.equal(pixels, own_pixels) and torch.equal(ids, own_ids)
    assert len({str([numbers for numbers, _, _ in epoch]) for epoch in expected}) == 3
