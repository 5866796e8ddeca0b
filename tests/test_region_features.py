"""Features of regions in the place of images: from the data set through a real training run to the metrics and the card."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, DatasetDict, Features, Image, List, Value
from huggingface_hub.errors import StrictDataclassError
from PIL import Image as PILImage
from tiny import TEXT, region_model_and_processor, tiny_inputs
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, BertModel

from granalign_hf import GranAlignConfig, GranAlignModel
from granalign_hf.modeling.aligners import ALIGNERS
from granalign_hf.modeling.region_features import RegionFeaturesConfig, RegionFeaturesModel, RegionFeaturesProcessor
from granalign_hf.training import evaluate, train
from granalign_hf.training.batches import TrainingImages
from granalign_hf.training.build import word_tokenizer
from granalign_hf.training.data import load_split
from granalign_hf.training.features import token_features
from granalign_hf.training.scoring import scored_split

RNG = np.random.default_rng(0)
THREE = RNG.standard_normal((3, 4, 6)).astype(np.float32)  # 3 images of 4 boxes with 6 numbers
LISTS = List(List(Value("float32")))


# --- model and processor ---


@pytest.mark.parametrize(
    "images",
    [list(THREE), THREE, torch.from_numpy(THREE), [torch.from_numpy(one).half().float() for one in THREE], THREE.tolist()],
    ids=["arrays", "one array", "one tensor", "tensors", "lists"],
)
def test_features_become_a_map_with_a_row_for_each_box(images):
    _, processor = region_model_and_processor()
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 6, 4, 1)
    np.testing.assert_allclose(pixels[..., 0].transpose(1, 2), THREE, atol=2e-3)


def test_features_of_one_image_and_of_another_precision():
    _, processor = region_model_and_processor()
    one = processor(images=THREE[0].astype(np.float64), return_tensors="np")["pixel_values"]
    assert one.shape == (1, 6, 4, 1) and one.dtype == np.float32
    assert np.array_equal(one[0, ..., 0].T, THREE[0])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (PILImage.new("L", (6, 4)), r"Image 0: .* shape \(boxes, features\), got a picture \(Image\)"),
        ([THREE[0], PILImage.new("RGB", (6, 4))], r"Image 1: .*got a picture"),
        (["photo.png"], r"Image 0: .*got a picture \(str\)"),
        ([THREE[0], None], "Image 1: region features must be numbers .* got NoneType"),
        (
            [THREE[0][:3]],
            r"Image 0: .* takes region features of shape \(4, 6\), got \(3, 6\).*`num_boxes` and `hidden_size`",
        ),
        (THREE[:, None], r"Image 0: .*got \(1, 4, 6\)"),
        ([[[1.0, 2.0], [3.0]]], "Image 0: .*all boxes of one length, got list"),
        ([[["a", "b"]]], "Image 0: region features must be numbers"),
        ([np.where(np.arange(4)[:, None] == 2, np.nan, THREE[0])], "Image 0: .*finite, but box 2 has"),
        ([], "at least one image, got none"),
    ],
)
def test_what_are_no_region_features_is_named(images, message):
    _, processor = region_model_and_processor()
    with pytest.raises(ValueError, match=message):
        processor(images=images, return_tensors="pt")


def test_other_shapes_are_refused_by_the_model():
    model, _ = region_model_and_processor()
    with pytest.raises(
        ValueError, match=r"`pixel_values` must hold region features of shape \(B, 6, 4, 1\), got \(3, 3, 16, 16\)"
    ):
        model(**tiny_inputs())


@pytest.mark.parametrize("name", ["hidden_size", "num_boxes"])
def test_sizes_below_1_are_refused(name):
    with pytest.raises(StrictDataclassError, match=f"`{name}` must be at least 1, got 0"):
        RegionFeaturesConfig(**{name: 0})


@pytest.mark.parametrize("aligner", [*ALIGNERS])
def test_every_aligner_scores_the_boxes(aligner):
    model, processor = region_model_and_processor(aligner=aligner, patch_dropout=0.5)
    inputs = processor(images=THREE, text=["a dog", "the cat", "on"], return_tensors="pt")
    outputs = model(**inputs)
    assert outputs.spatial_shapes.tolist() == [[4, 1]] * 3
    tokens = torch.nn.functional.normalize(model.patch_projection(torch.from_numpy(THREE)), dim=-1)
    torch.testing.assert_close(outputs.patch_embeds, tokens)
    loss = model.train()(**inputs, return_loss=True).loss
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_model_and_processor_are_saved_and_loaded(tmp_path):
    model, processor = region_model_and_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded.vision_model) is RegionFeaturesModel
    assert type(again.image_processor) is type(AutoImageProcessor.from_pretrained(tmp_path)) is RegionFeaturesProcessor
    assert (again.image_processor.num_boxes, again.image_processor.hidden_size) == (4, 6)
    inputs = again(images=THREE, text=["a dog", "the cat"], return_tensors="pt")
    torch.testing.assert_close(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image, atol=1e-6, rtol=0)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="sdpa")
    assert half.vision_model.dtype == torch.bfloat16
    torch.testing.assert_close(half(**inputs).logits_per_image, model(**inputs).logits_per_image, atol=0.05, rtol=0)


def test_a_dict_is_enough_for_a_config():
    config = GranAlignConfig(vision_config={"model_type": "region_features"}, text_config={"model_type": "gru_encoder"})
    assert (config.vision_config.num_boxes, config.vision_config.hidden_size, config.num_prefix_tokens) == (36, 2048, 0)
    assert config.text_config.embedding_size == 300


# --- data sets ---


def save(folder, columns: dict, kinds: dict) -> str:
    DatasetDict({"train": Dataset.from_dict(columns, features=Features(kinds))}).save_to_disk(folder)
    return str(folder)


CAPTIONS = {"captions": [["a", "b"], ["c"], ["d"]]}, {"captions": List(Value("string"))}


@pytest.mark.parametrize(
    "kind", [LISTS, List(List(Value("float64"))), Array2D((4, 6), "float32")], ids=["lists", "doubles", "array"]
)
def test_a_features_column_takes_the_place_of_images(tmp_path, kind):
    name = save(tmp_path, {"features": list(THREE)} | CAPTIONS[0], {"features": kind} | CAPTIONS[1])
    data = load_split(name, "train")
    assert not data.has_pictures and data.captions == CAPTIONS[0]["captions"]
    for number in range(3):
        features = data.first(None).image(number)
        assert features.dtype == np.float32 and np.array_equal(features, THREE[number])


def test_which_column_holds_the_images(tmp_path):
    pictures = [PILImage.new("RGB", (3, 3))] * 3
    columns = {"features": list(THREE), "boxes": list(-THREE), "image": pictures} | CAPTIONS[0]
    name = save(tmp_path / "both", columns, {"features": LISTS, "boxes": LISTS, "image": Image()} | CAPTIONS[1])
    assert load_split(name, "train").has_pictures
    assert np.array_equal(load_split(name, "train", features_column="boxes").image(1), -THREE[1])
    with pytest.raises(ValueError, match=r"no features column 'feats'.*`features_column`"):
        load_split(name, "train", features_column="feats")
    with pytest.raises(ValueError, match=r"'image' of .* holds pictures: name it with `image_column`"):
        load_split(name, "train", features_column="image")
    with pytest.raises(ValueError, match="`features_column` 'boxes' replaces pictures"):
        load_split(name, "train", features_column="boxes", image_column="image")
    name = save(tmp_path / "other", {"boxes": list(THREE)} | CAPTIONS[0], {"boxes": LISTS} | CAPTIONS[1])
    with pytest.raises(ValueError, match=r"no image column.*`image_column`, or that of the features .* `features_column`"):
        load_split(name, "train")


def test_one_row_a_caption_is_grouped_by_the_features(tmp_path):
    columns = {"features": [THREE[0], THREE[1], THREE[0]], "caption": ["a", "c", "b"]}
    name = save(tmp_path / "rows", columns, {"features": LISTS, "caption": Value("string")})
    assert load_split(name, "train").captions == [["a", "b"], ["c"]]
    columns = {"features": [THREE[0], None], "caption": ["a", "b"]}
    name = save(tmp_path / "missing", columns, {"features": LISTS, "caption": Value("string")})
    with pytest.raises(ValueError, match=r"Row 1 cannot be read: region features must be .* got NoneType"):
        load_split(name, "train")


@pytest.mark.parametrize(
    ("features", "kind", "message"),
    [
        ([[1.0, 2.0], [3.0]], LISTS, "all boxes of one length, got ndarray"),
        ([[1.0, float("inf")], [3.0, 4.0]], LISTS, "must be finite, but box 0"),
        ([[1.0, 2.0], [None, 4.0]], LISTS, "must be finite, but box 1"),
        ([1.0, 2.0], List(Value("float32")), r"got \(2,\)"),
        ([], LISTS, r"got \(0,\)"),
        (None, LISTS, "got NoneType"),
        ("boxes", Value("string"), "must be numbers"),
    ],
)
def test_broken_features_name_their_image(tmp_path, features, kind, message):
    columns = {"features": [features], "captions": [["a"]], "filename": ["x.png"]}
    data = load_split(save(tmp_path, columns, {"features": kind, "filename": Value("string")} | CAPTIONS[1]), "train")
    with pytest.raises(ValueError, match=rf"Image `x\.png` \(row 0\) cannot be read: region features .*{message}"):
        data.image(0)


def test_crops_of_features_are_refused(tmp_path):
    data = load_split(save(tmp_path, {"features": list(THREE)} | CAPTIONS[0], {"features": LISTS} | CAPTIONS[1]), "train")
    with pytest.raises(ValueError, match=r"`crop_scale` 0\.6 crops pictures, but .* features of regions. Set it to 1"):
        TrainingImages(data, 1, crop_scale=0.6, seed=0)
    item = TrainingImages(data, 1, crop_scale=1.0, seed=0)[2]
    assert np.array_equal(item["image"], THREE[2]) and item["captions"] == ["d"]


# --- training ---

NOUNS = "dog cat cow pig hen fox bee ant owl rat elk emu cup jar hat pen".split()
REGIONS = {"model_type": "region_features", "num_boxes": 4, "hidden_size": 16}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    """Images of two nouns: two boxes for each, alike up to noise. A pair of nouns is one image of one split."""
    rng = np.random.default_rng(0)
    meanings = rng.standard_normal((len(NOUNS), REGIONS["hidden_size"]))
    pairs = rng.permutation([(a, b) for a in range(len(NOUNS)) for b in range(a)])
    parts = {"train": pairs[:80], "validation": pairs[80:100], "test": pairs[100:]}
    tables = {}
    for split, chosen in parts.items():
        boxes = meanings[chosen.repeat(2, 1)] + 0.1 * rng.standard_normal((len(chosen), 4, REGIONS["hidden_size"]))
        captions = [[f"the {NOUNS[a]} and the {NOUNS[b]}", f"a {NOUNS[b]} near a {NOUNS[a]}"] for a, b in chosen]
        tables[split] = Dataset.from_dict(
            {"features": list(boxes.astype(np.float32)), "captions": captions},
            features=Features({"features": LISTS} | CAPTIONS[1]),
        )
    folder = tmp_path_factory.mktemp("data") / "regions"
    DatasetDict(tables).save_to_disk(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    """A text encoder with its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(TEXT["bert"]()).save_pretrained(folder)
    word_tokenizer(["the and a near", *NOUNS]).save_pretrained(folder)
    return str(folder)


def words_of_a_run(data: str, output, text: list[str], **settings) -> list[str]:
    settings = {"dataset": data, "output_dir": output, "aligner": "chan", "margin": 0.05, "patch_dropout": 0.2} | settings
    settings = {"epochs": 20, "eval_interval": 20, "batch_size": 16, "learning_rate": 0.01, "projection_dim": 32} | settings
    settings = {"vision_config": json.dumps(REGIONS), "report_to": "none", "crop_scale": 1} | settings
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))] + text


GRU = ["--text_config", json.dumps({"model_type": "gru_encoder", "embedding_size": 16, "hidden_size": 32})]


@pytest.mark.parametrize("text", ["gru", "bert"])
def test_training_on_features_beats_chance(dataset, bert, tmp_path, text):
    words = words_of_a_run(dataset, tmp_path, GRU if text == "gru" else ["--text_encoder", bert])
    state = train.main(words)
    assert state["history"][-1]["validation"]["rsum"] > 400  # by chance 20 images give 5 + 25 + 50 each way, 160 in all
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(model.vision_model) is RegionFeaturesModel and model.config.text_config.model_type.startswith(text)
    assert type(processor.image_processor) is RegionFeaturesProcessor
    result = evaluate.main([str(tmp_path), "--dataset", dataset, "--split", "test"])
    assert result["num_images"] == 20 and result["metrics"]["rsum"] > 400
    assert result["num_images_trained_on"] == 0
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["encoders"] == {"vision": "precomputed", "text": "from scratch" if text == "gru" else Path(bert).name}
    assert "vision precomputed (region_features)" in (tmp_path / "README.md").read_text()


def test_images_of_the_training_are_known_by_their_features(dataset, tmp_path, caplog):
    train.main(words_of_a_run(dataset, tmp_path, GRU, epochs=1))
    result = evaluate.main([str(tmp_path), "--dataset", dataset, "--split", "train"])
    assert result["num_images_trained_on"] == 80
    assert "80 of the 80 images were among the training images" in caplog.text
    other = DatasetDict.load_from_disk(dataset)
    other["test"] = other["train"].select([7]).add_column("filename", ["another.png"])
    other.pop("train")
    other.save_to_disk(tmp_path / "other")
    result = evaluate.main([str(tmp_path), "--dataset", str(tmp_path / "other"), "--features_column", "features"])
    assert result["num_images_trained_on"] == 1 and "another.png (trained on as 7)" in caplog.text


def test_frozen_encoders_on_features_score_the_same(dataset, bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = ["--text_encoder", bert, "--freeze_encoders", "true", "--caption_augmentation", "0"]
    train.main(words_of_a_run(dataset, "run", text, epochs=1))
    model, processor = GranAlignModel.from_pretrained("run"), AutoProcessor.from_pretrained("run")
    data = load_split(dataset, "validation")
    stored = token_features(model, processor, data, tmp_path / "runs" / "features", batch_size=3)
    with scored_split(model, processor, data, 3, tmp_path / "stored", stored) as (mapped, _):
        from_stored = mapped.copy()
    with scored_split(model, processor, data, 3, tmp_path / "whole") as (mapped, _):
        np.testing.assert_allclose(from_stored, mapped, atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "scenes", "num_scenes": 8}, "Image 0: region features must be .* got a picture"),
        (
            {"vision_config": json.dumps(REGIONS | {"num_boxes": 36})},
            r"takes region features of shape \(36, 16\), got \(4, 16\)",
        ),
        ({"vision_config": '{"model_type": "vit", "image_size": 16}'}, r"must be a PIL image.*shape \(4, 16\)"),
    ],
    ids=["pictures", "boxes", "a model of pictures"],
)
def test_a_run_that_does_not_fit_its_data_is_refused(dataset, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train.main(words_of_a_run(dataset, tmp_path, GRU, **settings))
