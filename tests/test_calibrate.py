"""The command that fits what the config of a checkpoint says about being sure, and measures it on another split."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from tiny import tiny_model, tiny_processor
from transformers import pipeline

from granalign_hf import GranAlignConfig, GranAlignModel, GranAlignProcessor
from granalign_hf.calibration import WAYS, fit_logit_scale
from granalign_hf.modeling.configuration_granalign import CALIBRATED_FIELDS, CONFIDENCE_MEASURES, ERROR_MEASURES
from granalign_hf.training import calibrate, scoring
from granalign_hf.training.arguments import RunArguments
from granalign_hf.training.build import build
from granalign_hf.uncertainty import answer, standard_errors

NUM_IMAGES, WORDS = 14, "the red blue green dog cat square circle".split()
MEASURES = (*CONFIDENCE_MEASURES, "caption_length", "image_entropy")


def split(seed: int) -> Dataset:
    """Noise with two captions of one to five words."""
    rng = np.random.default_rng(seed)
    pictures = [PILImage.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)) for _ in range(NUM_IMAGES)]
    captions = [[" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(2)] for _ in pictures]
    features = Features({"image": Image(), "captions": List(Value("string"))})
    return Dataset.from_dict({"image": pictures, "captions": captions}, features=features)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data") / "noise"
    DatasetDict({"validation": split(0), "test": split(1)}).save_to_disk(folder)
    return str(folder)


def checkpoint(folder, **fields):
    tiny_model(**fields).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, dataset):
    folder = checkpoint(tmp_path_factory.mktemp("run") / "model")
    before = json.loads((folder / "config.json").read_text())
    return folder, before, calibrate.main([str(folder), "--dataset", dataset])


def test_config_has_the_fitted_values_and_is_else_the_same(calibrated):
    folder, before, result = calibrated
    after = json.loads((folder / "config.json").read_text())
    assert after == before | result["fitted"] and set(result["fitted"]) == set(CALIBRATED_FIELDS)
    config = GranAlignConfig.from_pretrained(folder)
    for name, value in result["fitted"].items():
        assert getattr(config, name) == value != getattr(GranAlignConfig, name) or name == "confidence_measure"
    assert result["fitted"]["standard_error_factor"] == result["sampled_over_closed_form"]["fitted_on"]["all_pairs"]


def test_file_has_every_figure(calibrated):
    folder, _, result = calibrated
    assert json.loads((folder / "uncertainty-test.json").read_text()) == result
    assert (result["fitted_on"], result["split"], result["num_images"]) == ("validation", "test", NUM_IMAGES)
    for way in WAYS:
        figures = result[way]
        assert figures["num_queries"] == 2 * NUM_IMAGES
        assert set(figures["is_the_first_wrong"]) == {*MEASURES}
        for values in figures["is_the_first_wrong"].values():
            low, high = values["auroc_interval"]
            assert low <= values["auroc"] <= high and len(values["r1_by_level"]) == 10
        assert 0 <= figures["softmax"]["ece"] <= 1
        assert figures["confidence"]["measure"] in CONFIDENCE_MEASURES
        assert 1 <= figures["answer_sets"]["mean_size"] <= NUM_IMAGES
    assert {"region_mean_cosine", "distinct_regions", "effective_patches"} <= set(result["diagnostics"])
    losses = result["confidence_log_loss"]
    assert set(losses) == {*CONFIDENCE_MEASURES} and min(losses, key=losses.get) == result["fitted"]["confidence_measure"]
    assert not list(folder.glob("*unfinished"))


def test_fitted_values_are_those_of_the_scores(calibrated, dataset):
    folder, _, result = calibrated
    model, processor = GranAlignModel.from_pretrained(folder).eval(), GranAlignProcessor.from_pretrained(folder)
    galleries = {name: [] for name in ("validation", "test")}
    for name in galleries:
        table = DatasetDict.load_from_disk(dataset)[name]
        for place in range(2):
            inputs = processor(images=table["image"][:], text=[c[place] for c in table["captions"]], return_tensors="pt")
            with torch.no_grad():
                image = model.get_image_features(inputs.pop("pixel_values"))
                galleries[name].append(model.score(image, model.get_text_features(**inputs)).numpy())
    assert result["fitted"]["logit_scale"] == pytest.approx(fit_logit_scale(galleries["validation"]), rel=1e-3)
    for number, way in enumerate(WAYS):
        validation, test = (
            [g if way == "image_to_text" else g.T for g in galleries[name]] for name in ("validation", "test")
        )
        gaps = np.sort(np.concatenate([g.max(1) - np.diag(g) for g in validation]))
        threshold = result["fitted"]["conformal_thresholds"][number]
        assert threshold == pytest.approx(gaps[int(np.ceil(29 * 0.9)) - 1], abs=1e-5)
        inside = np.concatenate([g >= g.max(1, keepdims=True) - threshold for g in test])
        assert result[way]["answer_sets"]["mean_size"] == pytest.approx(inside.sum(1).mean(), abs=0.2)
        right = np.concatenate([np.diag(g) == g.max(1) for g in test])
        assert result[way]["r1"] == pytest.approx(100 * right.mean(), abs=4)  # a shared caption ties


def test_calibrated_checkpoint_is_used_as_such(calibrated):
    folder, _, result = calibrated
    model, processor = GranAlignModel.from_pretrained(folder).eval(), GranAlignProcessor.from_pretrained(folder)
    picture, labels = split(1)["image"][0], ["a red dog", "blue", "the cat"]
    inputs = processor(images=picture, text=labels, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
        image = model.get_image_features(inputs.pop("pixel_values"))
        text = model.get_text_features(**inputs)
    scores = model.score(image, text)
    torch.testing.assert_close(outputs.logits_per_image, result["fitted"]["logit_scale"] * scores)
    classify = pipeline("zero-shot-image-classification", model=model, processor=processor,
        image_processor=processor.image_processor, tokenizer=processor.tokenizer)  # fmt: skip
    found = {row["label"]: row["score"] for row in classify(picture, candidate_labels=labels, hypothesis_template="{}")}
    expected = outputs.logits_per_image.softmax(1)[0].tolist()
    assert [found[label] for label in labels] == pytest.approx(expected, abs=1e-5)
    answers = answer(model, image, text)
    assert answers.first.tolist() == [scores.argmax().item()] and 0 < answers.confidence[0] < 1
    model.config.standard_error_factor = 1.0
    torch.testing.assert_close(
        standard_errors(GranAlignModel.from_pretrained(folder).eval(), image, text),
        result["fitted"]["standard_error_factor"] * standard_errors(model, image, text),
    )


def test_calibrating_again_fits_the_same(calibrated, dataset, tmp_path):
    """What is in the config already changes nothing that is fitted."""
    _, _, result = calibrated
    folder = checkpoint(tmp_path / "model", logit_scale=3.0, standard_error_factor=0.5, conformal_thresholds=[0.1, 0.1])
    again = calibrate.main([str(folder), "--dataset", dataset])["fitted"]
    for name, value in result["fitted"].items():
        assert again[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), name


@pytest.mark.parametrize("fields", [{"aligner": "chan"}, {"level_weights": [0.5, 0.5, 0.0]}], ids=str)
def test_scores_without_variance_are_calibrated_too(dataset, tmp_path, fields):
    folder = checkpoint(tmp_path / "model", **fields)
    result = calibrate.main([str(folder), "--dataset", dataset])
    assert set(result["fitted"]) == {*CALIBRATED_FIELDS} and result["fitted"]["standard_error_factor"] == 1
    assert set(result["image_to_text"]["is_the_first_wrong"]) == {*MEASURES} - {*ERROR_MEASURES, "image_entropy"}
    assert result["sampled_over_closed_form"]["fitted_on"] is None
    GranAlignConfig.from_pretrained(folder)


def test_a_part_of_the_split_is_measured_and_the_checkpoint_stays_as_it_is(calibrated, dataset, capsys):
    folder, _, result = calibrated
    before = (folder / "config.json").read_bytes()
    part = calibrate.main([str(folder), "--dataset", dataset, "--max_images", "12"])
    assert part["num_images"] == 12 and part["fitted"] != result["fitted"] and "not stored" in capsys.readouterr().out
    assert (folder / "config.json").read_bytes() == before
    assert json.loads((folder / "uncertainty-test.json").read_text()) == result
    (folder / "uncertainty-test-first-12.json").unlink()


def test_an_interrupted_calibration_goes_on_where_it_was(dataset, calibrated, tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "model")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(calibrate, "fit", interrupt)
        calibrate.main([str(folder), "--dataset", dataset])
    monkeypatch.setattr(scoring, "_score_blocks", interrupt)  # all scores are there
    again = calibrate.main([str(folder), "--dataset", dataset])
    assert again["fitted"] == calibrated[2]["fitted"] and not list(folder.glob("*unfinished"))


def interrupt(*_args):
    raise KeyboardInterrupt


def test_training_from_a_calibrated_checkpoint_starts_uncalibrated(calibrated):
    model, _ = build(RunArguments(checkpoint=str(calibrated[0])), {"margin": 0.1}, [])
    assert model.config.margin == 0.1
    for name in CALIBRATED_FIELDS:
        assert getattr(model.config, name) == getattr(GranAlignConfig, name), name


def test_loss_knows_nothing_of_the_logit_scale():
    """Its hinge is on scores, whose margin a scale would change."""
    inputs = {"pixel_values": torch.randn(3, 3, 16, 16), "input_ids": torch.randint(5, 90, (3, 6)), "return_loss": True}
    plain, scaled = tiny_model()(**inputs), tiny_model(logit_scale=7.0)(**inputs)
    assert plain.loss == scaled.loss
    torch.testing.assert_close(scaled.logits_per_image, 7 * plain.logits_per_image)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "validation"], "split and validation_split are both validation: measure on images that nothing"),
        (["--max_images", "5"], "max_images must be at least 10, got 5"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--matmul_precision", "low"], "matmul_precision must be one of"),
        (["--spilt", "test"], "unknown fields on the command line: spilt"),
        (["--split", "dev"], "has no split 'dev'"),
    ],
)
def test_bad_settings_are_refused_in_one_line(words, message, calibrated, dataset, capsys):
    with pytest.raises(SystemExit):
        calibrate.main([str(calibrated[0]), "--dataset", dataset, *words])
    assert message in capsys.readouterr().err


def test_what_is_no_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        calibrate.main([str(tmp_path), "--dataset", "scenes"])
    assert "is no folder with a config.json, which the fitted values go into" in capsys.readouterr().err
