"""Features of frozen encoders: the same scores as from pixels, a cache that is never stale or half-written."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from accelerate import PartialState
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from processes import run_processes
from tiny import PATCHES, tiny_model, tiny_processor
from torch.utils.data._utils.pin_memory import pin_memory

from granalign_hf.training import features
from granalign_hf.training.data import CaptionedImages, load_split
from granalign_hf.training.features import token_features
from granalign_hf.training.scoring import scored_split

CAPTIONS = [["a red dog", "dog"], ["two blue cats on the square"], ["green"]]


@pytest.fixture
def data():
    return pictures()


def pictures() -> CaptionedImages:
    """Three pictures in two columns, `image` and `other`."""
    rng = np.random.default_rng(0)
    noise = [[PILImage.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)) for _ in CAPTIONS] for _ in range(2)]
    table = Dataset.from_dict(
        {"image": noise[0], "other": noise[1], "captions": CAPTIONS},
        features=Features({"image": Image(), "other": Image(), "captions": List(Value("string"))}),
    )
    return CaptionedImages(table, "image", [0, 1, 2], ["first.png", "second.png", "third.png"], CAPTIONS)


VISION = {
    "vit": lambda: tf.ViTConfig(**PATCHES),
    "dinov2 for larger images": lambda: tf.Dinov2Config(**PATCHES | {"image_size": 32}),
    "resnet": lambda: tf.ResNetConfig(embedding_size=8, layer_type="basic", hidden_sizes=[8, 32], depths=[1, 1]),
}


@pytest.mark.parametrize("vision", VISION.values(), ids=VISION.keys())
def test_scores_are_those_from_pixels(data, vision, tmp_path):
    model, processor = tiny_model(vision()), tiny_processor()
    stored = token_features(model, processor, data, tmp_path, batch_size=2)
    assert stored.image_size == (16, 16)
    with scored_split(model, processor, data, 2, tmp_path / "from features", stored) as (scores, _):
        from_features = scores.copy()
    with scored_split(model, processor, data, 2, tmp_path / "from pixels") as (scores, _):
        from_pixels = scores.copy()
    np.testing.assert_allclose(from_features, from_pixels, atol=2e-3)
    order = np.arange(len(data.all_captions))
    images = features.FeatureImages(stored, 1, seed=0, caption_order=order)
    batch = features.FeatureCollator(stored)([images[n] for n in (2, 0)])
    assert torch.isfinite(model(**batch, return_loss=True).loss)
    reversed_images = features.FeatureImages(stored, 0, seed=0, caption_order=order[::-1])
    assert reversed_images[0]["captions"].tolist() == order[::-1][: len(data.captions[0])].tolist()


def compute(rank: int, folder: Path) -> None:
    PartialState(cpu=True)
    features = token_features(shared_model(), tiny_processor(), pictures(), folder, batch_size=1)
    assert features.image_hidden[rank].any()


def shared_model():
    torch.manual_seed(0)
    return tiny_model()


def test_processes_share_the_work(data, tmp_path):
    run_processes(compute, 2, tmp_path / "two")
    token_features(shared_model(), tiny_processor(), data, tmp_path / "one", batch_size=1)
    (shared,), (alone,) = ([*(tmp_path / name).iterdir()] for name in ("two", "one"))
    assert shared.name == alone.name
    for file in alone.iterdir():
        np.testing.assert_array_equal(np.load(shared / file.name), np.load(file), file.name)


def test_another_picture_column_or_rule_is_another_cache(data, tmp_path, monkeypatch):
    model, processor = tiny_model(), tiny_processor()
    token_features(model, processor, data, tmp_path, batch_size=2)
    processor.tokenizer("a dog", truncation=False)  # leaves no trace in the key
    token_features(model, processor, data, tmp_path, batch_size=2)
    assert len(list(tmp_path.iterdir())) == 1
    data = replace(data, image_column="other")
    token_features(model, processor, data, tmp_path, batch_size=2)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(features.processing_granalign, "__file__", __file__)
    token_features(model, processor, data, tmp_path, batch_size=2)
    assert len(list(tmp_path.iterdir())) == 3


def test_other_weights_pictures_and_precision_are_another_cache(tmp_path):
    """Also where the table has the names of its pictures only, and one of the files is replaced."""
    model, processor, cache = tiny_model(), tiny_processor(), tmp_path / "cache"
    for number, name in enumerate(("one.png", "two.png")):
        PILImage.new("RGB", (16, 16), (90 * number, 0, 0)).save(tmp_path / name)
    table = Dataset.from_dict({"filename": ["one.png", "two.png"], "captions": [["a dog"], ["a cat"]]})
    table.save_to_disk(tmp_path / "table")

    def features() -> np.ndarray:
        data = load_split(str(tmp_path / "table"), "train", image_folder=str(tmp_path))
        return token_features(model, processor, data, cache, batch_size=2).image_hidden

    before = features()
    assert len(list(cache.iterdir())) == 1 and np.array_equal(features(), before) and len(list(cache.iterdir())) == 1
    PILImage.new("RGB", (16, 16), (0, 200, 0)).save(tmp_path / "two.png")
    after = features()
    assert np.array_equal(after[0], before[0]) and not np.array_equal(after[1], before[1])
    torch.set_float32_matmul_precision("medium")
    features()
    assert len(list(cache.iterdir())) == 3
    with torch.no_grad():
        model.vision_model.layernorm.bias.add_(1)
    assert not np.array_equal(features(), after) and len(list(cache.iterdir())) == 4


def test_two_runs_at_the_same_time_do_not_meet(data, tmp_path, monkeypatch):
    model, processor = tiny_model(), tiny_processor()
    compute, folders = features._compute, []

    def compute_while_another_run_does(model, processor, data, folder, *rest):
        folders.append(folder)
        if len(folders) == 1:
            token_features(model, processor, data, tmp_path, batch_size=2)
        compute(model, processor, data, folder, *rest)

    monkeypatch.setattr(features, "_compute", compute_while_another_run_does)
    stored = token_features(model, processor, data, tmp_path, batch_size=2)
    assert len(set(folders)) == 2 and len(list(tmp_path.iterdir())) == 1
    assert np.isfinite(stored.image_hidden).all() and stored.image_hidden.any()


def test_an_interrupted_cache_is_not_read(data, tmp_path, monkeypatch):
    model, processor = tiny_model(), tiny_processor()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(processor.tokenizer, "pad", _interrupt)
        token_features(model, processor, data, tmp_path, batch_size=2)
    assert not list(tmp_path.iterdir())
    assert token_features(model, processor, data, tmp_path, batch_size=2).word_hidden.any()


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_features_that_float16_cannot_hold_are_named(data, tmp_path, value):
    model, processor = tiny_model(), tiny_processor()
    torch.nn.init.constant_(model.text_model.encoder.layer[-1].output.LayerNorm.weight, value)
    with pytest.raises(ValueError, match="features of caption 'dog' do not fit float16"):
        token_features(model, processor, data, tmp_path, batch_size=2)
    torch.nn.init.constant_(model.vision_model.layernorm.weight, value)
    with pytest.raises(ValueError, match=r"features of image `first\.png` do not fit float16"):
        token_features(model, processor, data, tmp_path, batch_size=2)
    assert not list(tmp_path.iterdir())


def test_a_batch_can_be_pinned(data, tmp_path, monkeypatch):
    """As a loader does it where there is a GPU; here pinned memory is a copy that is counted."""
    stored = token_features(tiny_model(), tiny_processor(), data, tmp_path, batch_size=2)
    images = features.FeatureImages(stored, 1, seed=0, caption_order=np.arange(len(data.all_captions)))
    batch = features.FeatureCollator(stored)([images[0], images[1]])
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    again = pin_memory(batch)
    assert again.keys() == batch.keys() and len(pinned) == 6
    for name in ("vision_model_output", "text_model_output"):
        assert torch.equal(again[name].last_hidden_state, batch[name].last_hidden_state)


@pytest.mark.parametrize("name", ["image_hidden", "word_hidden", "word_ids", "word_offsets", "image_size"])
def test_nothing_of_a_cache_is_unpickled(data, tmp_path, name):
    model, processor = tiny_model(), tiny_processor()
    token_features(model, processor, data, tmp_path, batch_size=2)
    (cache,) = tmp_path.iterdir()
    np.save(cache / f"{name}.npy", np.array([_Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"allow_pickle=False|Python object"):
        token_features(model, processor, data, tmp_path, batch_size=2)


class _Bomb:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)
