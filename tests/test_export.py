"""Exported graphs against the model, at other sizes than they were traced with."""

import json

import pytest
import torch
from tiny import TEXT, region_model_and_processor, tiny_inputs, tiny_model, tiny_processor
from transformers import AutoProcessor

from granalign_hf.cli import main
from granalign_hf.export import ExportedModel, export
from granalign_hf.training import evaluate

CASES = [("onnx", "grm"), ("onnx", "laps"), ("torch-export", "grm"), ("torch-export", "scan")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def exported(request, tmp_path_factory):
    format, aligner = request.param
    folder, fields = tmp_path_factory.mktemp("graphs"), {"use_special_tokens": False, "special_token_ids": [0, 2, 3]}
    model = tiny_model(aligner=aligner, logit_scale=2.0, **(fields if aligner == "grm" else {}))
    files, difference = export(model, tiny_processor(), folder, format)
    assert 0 <= difference < 1e-4
    assert [file.name for file in files] == [p + {"onnx": ".onnx"}.get(format, ".pt2") for p in ("vision", "text", "scorer")]
    return model, folder


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 5, 9), (5, 1, 20)])
def test_the_scores_are_those_of_the_model(exported, sizes):
    model, folder = exported
    inputs = tiny_inputs(*sizes, seed=3)
    inputs["attention_mask"][-1, max(sizes[2] // 2, 1) :] = 0
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
    torch.testing.assert_close(ExportedModel(folder)(**inputs), expected, atol=1e-5, rtol=0)


def test_the_features_are_those_of_the_model(exported):
    model, folder = exported
    inputs, graphs = tiny_inputs(2, 3, 6), ExportedModel(folder)
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        pairs = [
            (graphs.get_image_features(pixels), model.get_image_features(pixels)),
            (graphs.get_text_features(**inputs), model.get_text_features(**inputs)),
        ]
    for found, expected in pairs:
        own = {*expected} - {"last_hidden_state", "pooler_output"}
        assert {*found} == own
        for name in own:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)


def test_the_folder_has_a_processor_of_its_own(exported):
    captions = ["a red dog", "the cat on a circle"]
    own = AutoProcessor.from_pretrained(exported[1])
    assert own(text=captions)["input_ids"] == tiny_processor()(text=captions)["input_ids"]


def test_the_difference_is_that_of_scores_whatever_the_scale_of_the_logits(tmp_path):
    found = [
        export(tiny_model(logit_scale=scale), tiny_processor(), tmp_path / str(scale), is_int8=True).difference
        for scale in (1.0, 50.0)
    ]
    assert found[1] == pytest.approx(found[0], rel=0.01)
    with pytest.raises(ValueError, match=r"must be in float32, got torch\.bfloat16"):
        export(tiny_model().bfloat16(), tiny_processor(), tmp_path / "other")


def test_int8_is_smaller_and_close(tmp_path):
    """The encoders' matrices are a part of these small files only."""
    model, sizes = tiny_model(), {}
    for name, is_int8 in (("whole", False), ("int8", True)):
        exported = export(model, tiny_processor(), tmp_path / name, is_int8=is_int8)
        assert (exported.difference > 1e-6) == is_int8
        sizes[name] = [file.stat().st_size for file in exported.files]
        assert {file.suffix for file in (tmp_path / name).iterdir()} == {".onnx", ".json", ".py"}
    assert all(small < 0.9 * large for small, large in zip(sizes["int8"][:2], sizes["whole"][:2]))
    inputs = tiny_inputs(4, 4, 6)
    with torch.no_grad():
        difference = ExportedModel(tmp_path / "int8")(**inputs) - model(**inputs).logits_per_image
    assert 1e-6 < difference.abs().max() < 0.1


def test_evaluation_of_graphs_is_that_of_the_model(tmp_path):
    model, words = tiny_model(), ["--dataset", "scenes", "--max_images", "12"]
    model.save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    main(["export", "--model", str(tmp_path / "model"), "--format", "torch-export", "--out", str(tmp_path / "graphs")])
    expected = evaluate.main([str(tmp_path / "model"), *words])
    found = evaluate.main([str(tmp_path / "model"), *words, "--graphs", str(tmp_path / "graphs")])
    assert found["metrics"] == expected["metrics"]
    assert found["diagnostics"] == pytest.approx(expected["diagnostics"], abs=1e-5)
    written = json.loads((tmp_path / "graphs" / "metrics-test-first-12.json").read_text())
    assert written["command"].endswith("--graphs graphs") and written["metrics"] == expected["metrics"]


def test_what_cannot_be_exported_is_refused(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    for arguments, told in (
        ((model, processor, tmp_path, "tflite"), "`format` must be one of"),
        ((model, processor, tmp_path, "torch-export", True), '`is_int8` needs `format="onnx"`'),
        ((tiny_model().train(), processor, tmp_path), "training mode"),
        ((*region_model_and_processor(), tmp_path), "takes features of regions"),
        ((tiny_model(text=TEXT["gru"]()), processor, tmp_path), "has a GRU"),
    ):
        with pytest.raises(ValueError, match=told):
            export(*arguments)
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "text.onnx").touch()
    with pytest.raises(ValueError, match=r"has graphs of another format \(text.onnx\)"):
        export(model, processor, tmp_path / "both", "torch-export")
    with pytest.raises(ValueError, match="`folder` must hold vision, text and scorer"):
        ExportedModel(tmp_path)


def test_graphs_that_are_not_there(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path), "--dataset", "scenes", "--max_images", "2", "--graphs", str(tmp_path)])
    assert "graphs: `folder` must hold vision, text and scorer" in capsys.readouterr().err
