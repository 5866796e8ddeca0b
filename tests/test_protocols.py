"""The protocols are what the literature means by their names, and their galleries are ranked apart."""

import dataclasses

import numpy as np
import pytest

from granalign_hf.evaluation import RetrievalRanks, fold_metrics, ranks_to_metrics, retrieval_metrics
from granalign_hf.training.data import drawn_scenes
from granalign_hf.training.protocols import PROTOCOLS, Protocol, gallery_ranks, mean_metrics, save_ranks

INDEX = np.repeat(np.arange(6), (1, 2, 3, 2, 2, 1))


@pytest.fixture
def scores():
    return np.random.default_rng(0).random((6, len(INDEX)), dtype=np.float32)


def test_definitions():
    """GRM's evaluation: 1,000 test images of Flickr30K; the 5,000 of MS-COCO whole and as five folds of 1,000."""
    sizes = {p.name: (p.split, p.num_images, p.num_folds) for p in PROTOCOLS.values()}
    assert sizes == {
        "flickr30k-1k": ("test", 1000, 1),
        "coco-1k-5fold": ("test", 5000, 5),
        "coco-5k": ("test", 5000, 1),
        "flickr8k-1k": ("test", 1000, 1),
    }


def test_description_names_the_galleries():
    assert PROTOCOLS["coco-5k"].describe(25000) == "coco-5k: 5,000 images, 25,000 captions, all pairs, one gallery"
    assert (
        PROTOCOLS["coco-1k-5fold"]
        .describe(25000)
        .endswith("all pairs, mean over 5 folds of 1,000 consecutive images with their captions")
    )


@pytest.fixture
def coco():
    """As many images as the test split has, of which some have six or seven captions."""
    scenes = drawn_scenes(1, 0, 0)
    captions = [[f"{n}-{m}" for m in range(5 + n % 3)] for n in range(5000)]
    return dataclasses.replace(scenes, rows=[0] * 5000, image_ids=[str(n) for n in range(5000)], captions=captions)


def test_the_first_five_captions_of_each_image_count(coco):
    selected = PROTOCOLS["coco-5k"].select(coco, "coco", "test")
    assert len(selected.all_captions) == 25000 and selected.captions[2] == ["2-0", "2-1", "2-2", "2-3", "2-4"]


@pytest.mark.parametrize(("split", "num_images"), [("validation", 5000), ("test", 4999)])
def test_another_split_or_size_is_refused(coco, split, num_images):
    data = coco.first(num_images)
    with pytest.raises(ValueError, match=f"5000 images of the split 'test' .*got {num_images} images of '{split}' of coco"):
        PROTOCOLS["coco-5k"].select(data, "coco", split)


def test_an_image_with_fewer_captions_is_named(coco):
    coco.captions[7] = coco.captions[7][:4]
    with pytest.raises(ValueError, match="5 captions an image, but '7' of coco has 4"):
        PROTOCOLS["coco-1k-5fold"].select(coco, "coco", "test")


def test_metrics_are_those_of_one_gallery_or_the_mean_over_folds(scores):
    assert mean_metrics(gallery_ranks(scores, INDEX, None)) == retrieval_metrics(scores, INDEX)
    folds = Protocol("folds", "test", 6, num_folds=3)
    assert mean_metrics(gallery_ranks(scores, INDEX, folds)) == pytest.approx(fold_metrics(scores, INDEX, 3))


@pytest.mark.parametrize("num_folds", [1, 2])
def test_ranks_come_back(tmp_path, scores, num_folds):
    galleries = gallery_ranks(scores, INDEX, Protocol("folds", "test", 6, num_folds))
    save_ranks(tmp_path / "ranks.npz", galleries)
    with np.load(tmp_path / "ranks.npz") as kept:
        for number, ranks in enumerate(galleries):
            suffix = f"_{number}" if num_folds > 1 else ""
            names = ("image_to_text", "text_to_image", "caption_image_index")
            found = RetrievalRanks(**{name: kept[f"{name}{suffix}"] for name in names})
            assert ranks_to_metrics(found) == ranks_to_metrics(ranks)
