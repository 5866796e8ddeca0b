"""The training script for real, on a few drawn scenes: a complete folder, resuming, all aligners, refusals."""

import json
import math

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

import granalign_hf  # noqa: F401  (registers the Auto classes)
from granalign_hf.training import evaluate, train
from granalign_hf.training.arguments import parse_arguments
from granalign_hf.training.build import build
from granalign_hf.training.data import load_split

TINY = [
    *("--num_scenes", "24", "--max_eval_images", "12", "--batch_size", "8", "--epochs", "2", "--eval_interval", "1"),
    *("--projection_dim", "16", "--report_to", "none", "--warmup_epochs", "1"),
    *("--vision_config", json.dumps({"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                                     "layer_type": "basic", "image_size": 48, "num_channels": 3})),
    *("--text_config", json.dumps({"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                                   "intermediate_size": 16, "max_position_embeddings": 48})),
]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trackers and launchers behind Accelerate


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, train.main([*TINY, "--output_dir", str(folder)])


def test_folder_is_complete(trained):
    folder, _ = trained
    names = {path.name for path in folder.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "processor_config.json",
        "tokenizer.json",
        "README.md",
        "metrics.json",
    } <= names
    assert {"learning_curve.png", "modeling_granalign.py", "configuration_granalign.py", "processing_granalign.py"} <= names


def test_metrics_tell_the_run(trained):
    folder, state = trained
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [record["epoch"] for record in metrics["history"]] == [1, 2]
    rsums = [record["validation"]["rsum"] for record in metrics["history"]]
    assert metrics["best_epoch"] == 1 + rsums.index(max(rsums)) == state["best_epoch"]
    assert metrics["validation"]["rsum"] == max(rsums)
    config = AutoModel.from_pretrained(folder).config
    names = ("contrastive_original", "contrastive_key", "contrastive_uncertain")
    weights = dict(zip(names, config.level_weights, strict=True))
    weights |= {name: getattr(config, f"{name}_weight") for name in ("reconstruction", "kl", "entropy")}
    for record in metrics["history"]:
        assert math.isclose(record["loss"], sum(w * record[name] for name, w in weights.items()), rel_tol=1e-4)
    assert metrics["num_train_images"] == 24 and metrics["seed"] == 0 and metrics["hours"] > 0


def test_every_parameter_changed(trained, tmp_path):
    folder, _ = trained
    run, fields, _ = parse_arguments([*TINY, "--output_dir", str(tmp_path)])
    torch.manual_seed(run.seed)
    data = load_split("scenes", "train", num_scenes=24)
    fresh, _ = build(run, fields, [caption for captions in data.captions for caption in captions])
    after = load_file(folder / "model.safetensors")
    for name, before in fresh.named_parameters():
        assert not torch.equal(before, after[name]), name


def test_checkpoint_scores_as_the_run_measured(trained):
    folder, state = trained
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    metrics, _ = train.validate(model, processor, load_split("scenes", "validation").first(12), None, batch_size=5)
    best = next(record for record in state["history"] if record["epoch"] == state["best_epoch"])
    assert metrics == best["validation"]


def test_evaluate_writes_metrics_and_intervals(trained, capsys):
    folder, _ = trained
    result = evaluate.main([str(folder), "--dataset", "scenes", "--split", "test", "--max_images", "10"])
    assert json.loads((folder / "metrics-test.json").read_text()) == result
    low, high = result["intervals"]["rsum"]
    assert low <= result["metrics"]["rsum"] <= high
    assert result["num_images"] == 10 and result["num_captions"] == 50
    assert "rsum" in capsys.readouterr().out


def test_resumed_run_ends_as_the_uninterrupted_one(trained, tmp_path):
    folder, state = trained
    arguments = [*TINY, "--output_dir", str(tmp_path)]
    original = train.save_state

    def interrupt(accelerator, output, progress):
        original(accelerator, output, progress)
        if progress["epoch"] == 1:
            raise KeyboardInterrupt

    train.save_state = interrupt
    try:
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments)
    finally:
        train.save_state = original
    resumed = train.main([*arguments, "--resume"])
    strip = [{k: v for k, v in record.items() if k != "diagnostics"} for record in state["history"]]
    assert [{k: v for k, v in record.items() if k != "diagnostics"} for record in resumed["history"]] == strip
    expected, got = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_resume_without_a_state_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found no saved state"):
        train.main([*TINY, "--output_dir", str(tmp_path), "--resume"])


def test_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`batch_size` 800 is larger than the 24 training images"):
        train.main([*TINY, "--output_dir", str(tmp_path), "--batch_size", "800"])


@pytest.mark.parametrize("aligner", [["chan"], ["vse++", "--pooling", "max"], ["max_mean"]], ids=lambda a: a[0])
def test_the_other_aligners_train_too(tmp_path, aligner):
    state = train.main([*TINY, "--output_dir", str(tmp_path), "--aligner", *aligner, "--epochs", "1"])
    assert math.isfinite(state["history"][0]["loss"])
    assert AutoModel.from_pretrained(tmp_path).config.aligner == aligner[0]


def test_frozen_encoders_train_on_cached_features(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = train.main([*TINY, "--output_dir", "run", "--freeze_encoders", "true"])
    model, processor = AutoModel.from_pretrained("run").eval(), AutoProcessor.from_pretrained("run")
    from_pixels, _ = train.validate(model, processor, load_split("scenes", "validation").first(12), None, batch_size=12)
    best = next(record for record in state["history"] if record["epoch"] == state["best_epoch"])
    assert abs(from_pixels["rsum"] - best["validation"]["rsum"]) < 40  # float16 features may swap near ties
    assert len(list((tmp_path / "runs" / "features").glob("*/complete"))) == 2


def test_collapse_is_named(caplog):
    run, _, _ = parse_arguments(TINY)
    PartialState()  # Accelerate's loggers need it
    with caplog.at_level("WARNING"):
        train.warn_if_stuck({"contrastive_key": 0.4, "kl": 0.4}, run, 0.2, use_hard_negatives=True)
    assert "contrastive_key stays at 2 x margin = 0.400" in caplog.text
    caplog.clear()
    train.warn_if_stuck({"contrastive_key": 0.2}, run, 0.2, use_hard_negatives=True)
    assert not caplog.text


def test_a_run_starts_from_a_checkpoint(trained, tmp_path):
    folder, _ = trained
    recipe = tmp_path / "further.yaml"
    recipe.write_text(f"checkpoint: {folder}\noutput_dir: {tmp_path / 'further'}\nprojection_dim: 16\n")
    common = TINY[: TINY.index("--projection_dim")]
    state = train.main([str(recipe), *common, "--report_to", "none", "--epochs", "1", "--learning_rate", "1e-9"])
    before = json.loads((folder / "metrics.json").read_text())
    after = json.loads((tmp_path / "further" / "metrics.json").read_text())
    assert after["started_from"]["best_epoch"] == before["best_epoch"] and after["encoders"] == before["encoders"]
    assert abs(state["history"][0]["validation"]["rsum"] - before["validation"]["rsum"]) < 60
