"""The training script for real, on a few drawn scenes: a complete folder, resuming, all aligners, refusals."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from processes import run_processes
from safetensors.torch import load_file
from tiny import tiny_model, tiny_processor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModel, AutoProcessor

from granalign_hf import GranAlignModel, GranAlignProcessor
from granalign_hf.evaluation import RetrievalRanks, paired_bootstrap, ranks_to_metrics, retrieval_metrics
from granalign_hf.hub import SENTENCE_TRANSFORMERS
from granalign_hf.training import demo, evaluate, protocols, train
from granalign_hf.training.arguments import parse_arguments
from granalign_hf.training.build import build
from granalign_hf.training.data import load_split
from granalign_hf.training.features import token_features
from granalign_hf.training.record import _encoder_name
from granalign_hf.training.scoring import scored_split

TINY = [
    *("--num_scenes", "24", "--max_eval_images", "12", "--batch_size", "8", "--epochs", "2", "--eval_interval", "1"),
    *("--projection_dim", "16", "--report_to", "none", "--warmup_epochs", "1"),
    *("--vision_config", json.dumps({"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                                     "layer_type": "basic", "image_size": 48, "num_channels": 3})),
    *("--text_config", json.dumps({"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                                   "intermediate_size": 16, "max_position_embeddings": 48})),
]  # fmt: skip


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
    assert {"multi_vectors.py", *SENTENCE_TRANSFORMERS} <= names


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
    weights |= {name: getattr(config, f"{name}_weight") for name in ("reconstruction", "kl", "entropy", "budget")}
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


def test_checkpoint_scores_as_the_run_measured(trained, tmp_path):
    folder, state = trained
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    data = load_split("scenes", "validation").first(12)
    with scored_split(model, processor, data, 5, tmp_path / "scores") as (scores, diagnostics):
        metrics = retrieval_metrics(scores, data.caption_image_index)
    best = next(record for record in state["history"] if record["epoch"] == state["best_epoch"])
    assert metrics == best["validation"]
    assert diagnostics == pytest.approx(best["diagnostics"], rel=1e-5)
    with np.load(folder / "ranks-validation.npz") as kept:
        assert ranks_to_metrics(RetrievalRanks(**kept)) == metrics


def test_evaluate_writes_metrics_and_intervals(trained, capsys, monkeypatch):
    folder, _ = trained
    scenes = load_split("scenes", "test").first(10)
    monkeypatch.setattr(evaluate, "load_split", lambda *args, **kwargs: scenes)
    result = evaluate.main([str(folder), "--dataset", "scenes", "--split", "test"])
    assert json.loads((folder / "metrics-test.json").read_text()) == result
    low, high = result["intervals"]["rsum"]
    assert low <= result["metrics"]["rsum"] <= high
    assert result["num_images"] == 10 and result["num_captions"] == 50
    assert "rsum" in capsys.readouterr().out
    with np.load(folder / "ranks-test.npz") as kept:
        ranks = RetrievalRanks(**kept)
    assert ranks_to_metrics(ranks) == result["metrics"]
    assert paired_bootstrap(ranks, ranks)["rsum"].difference == 0
    assert not list(folder.glob("*unfinished"))
    assert "10 images, 50 captions" in (folder / "README.md").read_text()


def test_a_part_of_a_split_leaves_file_and_card_of_the_whole_alone(trained):
    folder, _ = trained
    (folder / "metrics-test.json").write_text("whole")
    card = (folder / "README.md").read_text()
    try:
        result = evaluate.main([str(folder), "--max_images", "4"])
        assert (folder / "metrics-test.json").read_text() == "whole"
    finally:
        (folder / "metrics-test.json").unlink()
    assert json.loads((folder / "metrics-test-first-4.json").read_text()) == result
    assert (folder / "ranks-test-first-4.npz").is_file()
    assert (folder / "README.md").read_text() == card
    evaluate.write_model_card(folder)
    assert "4 images, 20 captions" not in (folder / "README.md").read_text()


def test_evaluations_of_another_data_set_or_protocol_have_their_own_file(tmp_path):
    (tmp_path / "metrics.json").write_text('{"dataset": "flickr8k"}')

    def name(*words: str) -> str:
        return evaluate.measured_name(evaluate.parse_arguments([str(tmp_path), *words])[1], tmp_path)

    assert name("--dataset", "data/flickr8k") == "test"
    assert name("--dataset", "org/coco", "--split", "val") == "coco-val"
    assert name("--dataset", "flickr8k", "--protocol", "flickr8k-1k") == "flickr8k-1k"
    assert name("--dataset", "org/coco", "--protocol", "coco-5k") == "coco-coco-5k"


def test_evaluate_by_a_protocol(trained, monkeypatch, capsys):
    folder, _ = trained
    scenes = load_split("scenes", "test").first(6)
    monkeypatch.setattr(evaluate, "load_split", lambda *args, **kwargs: scenes)
    monkeypatch.setitem(protocols.PROTOCOLS, "coco-1k-5fold", protocols.Protocol("coco-1k-5fold", "test", 6, num_folds=3))
    result = evaluate.main([str(folder), "--protocol", "coco-1k-5fold"])
    assert json.loads((folder / "metrics-coco-1k-5fold.json").read_text()) == result
    assert result["protocol"].startswith("coco-1k-5fold: 6 images, 30 captions, all pairs, mean over 3 folds of 2 ")
    figures = [line for line in capsys.readouterr().out.splitlines() if "[" in line]
    assert len(figures) == 7 and all(line.startswith("coco-1k-5fold ") for line in figures)
    with np.load(folder / "ranks-coco-1k-5fold.npz") as kept:
        assert {"image_to_text_0", "image_to_text_2"} < set(kept) and len(kept["image_to_text_2"]) == 2
    assert "### scenes, test\n\nProtocol: coco-1k-5fold" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "CHECKPOINT"),
        (["CHECKPOINT", "--splt", "test"], "unknown fields on the command line: splt (did you mean split?)"),
        (["CHECKPOINT", "--max_images", "0"], "max_images must be at least 1, got 0"),
        (["CHECKPOINT", "--matmul_precision", "low"], "matmul_precision must be one of highest, high, medium, got low"),
        (["CHECKPOINT", "--protocol", "coco"], "protocol must be one of "),
        (["CHECKPOINT", "--protocol", "coco-5k", "--max_images", "9"], "max_images must be left out"),
        (
            ["CHECKPOINT", "--protocol", "coco-5k"],
            "defined on the 5000 images of the split 'test' (Karpathy), got 500 images",
        ),
        (["CHECKPOINT", "--split", "dev"], "The data set scenes has no split 'dev'"),
        (["runs/no/such/folder"], "the checkpoint runs/no/such/folder does not exist"),
        (["tests"], "the folder tests holds no checkpoint: it has no config.json"),
    ],
)
def test_evaluate_refuses_in_one_line(trained, words, message, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(SystemExit):
        evaluate.main([str(trained[0]) if word == "CHECKPOINT" else word for word in words])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 2, error


def test_help_of_evaluate(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    text = capsys.readouterr().out
    assert "CHECKPOINT" in text and "--protocol" in text and "--image_column" in text


def test_new_weights_remove_what_was_measured_on_the_old_ones(trained, tmp_path):
    for name in ("metrics-test.json", "ranks-test.npz", "demo.png", "notes.txt"):
        (tmp_path / name).write_text("{}")
    train.main([*TINY, "--output_dir", str(tmp_path), "--epochs", "1"])
    names = {path.name for path in tmp_path.iterdir()}
    assert not names & {"metrics-test.json", "ranks-test.npz", "demo.png", "validation-unfinished"}
    assert {"notes.txt", "ranks-validation.npz", "metrics.json"} <= names


def test_evaluate_of_a_hub_id_writes_to_the_working_directory(trained, tmp_path, monkeypatch, capsys):
    folder, _ = trained
    load_model, load_processor = GranAlignModel.from_pretrained, GranAlignProcessor.from_pretrained
    monkeypatch.setattr(evaluate.GranAlignModel, "from_pretrained", lambda name: load_model(folder))
    monkeypatch.setattr(evaluate.GranAlignProcessor, "from_pretrained", lambda name: load_processor(folder))
    monkeypatch.chdir(tmp_path)
    result = evaluate.main(["org/name", "--max_images", "4"])
    assert json.loads((tmp_path / "metrics-test-first-4.json").read_text()) == result
    assert (tmp_path / "ranks-test-first-4.npz").is_file()
    assert "org/name is no folder" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["nowhere/metrics.json", "."])
def test_evaluate_refuses_an_output_that_it_could_not_write_before_it_loads(output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_split", lambda *args: pytest.fail("loaded"))
    with pytest.raises(SystemExit):
        evaluate.main(["org/name", "--output", output])
    assert f"the output {output} cannot be written" in capsys.readouterr().err


def rates_of_a_run(argv: list[str]) -> list[float]:
    """The learning rate at each step."""
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    train.main(argv)
    hook.remove()
    return rates


def one_of_two_processes(rank: int, folder: Path, argv: list[str]) -> None:
    (folder / f"rates-{rank}.json").write_text(json.dumps(rates_of_a_run(argv)))


def test_two_processes_follow_the_schedule_of_one(tmp_path):
    schedule = [*TINY, "--lr_scheduler", "cosine", "--lr_warmup_share", "0.3", "--max_eval_images", "4"]
    alone = rates_of_a_run([*schedule, "--output_dir", str(tmp_path / "alone"), "--batch_size", "8"])
    argv = [*schedule, "--output_dir", str(tmp_path / "both"), "--batch_size", "4"]
    run_processes(one_of_two_processes, 2, tmp_path, argv)
    assert len(alone) == 6 and len(set(alone)) > 3
    assert [json.loads((tmp_path / f"rates-{rank}.json").read_text()) for rank in range(2)] == [alone] * 2
    names = {path.name for path in (tmp_path / "both" / "state" / "step-6").iterdir()}
    assert {"progress.json", "random_states_0.pkl", "random_states_1.pkl"} <= names


def test_the_rate_stays_where_the_optimizer_skips_its_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", True)
    rates = rates_of_a_run([*TINY, "--output_dir", str(tmp_path), "--lr_scheduler", "linear"])
    assert len(set(rates)) == 1


def test_hours_are_all_of_the_run(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    original = train.build

    def slow_build(*args):
        clock.now += 3600
        return original(*args)

    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train, "build", slow_build)
    train.main([*TINY, "--output_dir", str(tmp_path), "--epochs", "1"])
    assert json.loads((tmp_path / "metrics.json").read_text())["hours"] == 1
    train.main([*TINY, "--output_dir", str(tmp_path), "--epochs", "2", "--resume"])
    assert json.loads((tmp_path / "metrics.json").read_text())["hours"] == 2


def test_captions_that_are_too_long_are_counted_once(tmp_path, caplog):
    config = json.loads(TINY[TINY.index("--text_config") + 1]) | {"max_position_embeddings": 9}
    train.main([*TINY, "--output_dir", str(tmp_path), "--epochs", "1", "--text_config", json.dumps(config)])
    captions = load_split("scenes", "train", num_scenes=24).all_captions
    captions += load_split("scenes", "validation").first(12).all_captions
    count = f" of {len(captions)} captions were cut to the 9 tokens"
    assert len([message for message in caplog.messages if count in message]) == 1


def test_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`batch_size` 800 needs 800 training images for one step, got 24"):
        train.main([*TINY, "--output_dir", str(tmp_path), "--batch_size", "800"])


@pytest.mark.parametrize("aligner", [["chan"], ["laps"], ["vse++", "--pooling", "max"], ["max_mean"]], ids=lambda a: a[0])
def test_the_other_aligners_train_too(tmp_path, aligner):
    state = train.main([*TINY, "--output_dir", str(tmp_path), "--aligner", *aligner, "--epochs", "1"])
    assert math.isfinite(state["history"][0]["loss"])
    assert AutoModel.from_pretrained(tmp_path).config.aligner == aligner[0]


def test_frozen_encoders_train_on_cached_features(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--output_dir", "run", "--freeze_encoders", "true"])
    model, processor = AutoModel.from_pretrained("run").eval(), AutoProcessor.from_pretrained("run")
    data = load_split("scenes", "validation").first(12)
    cache = tmp_path / "runs" / "features"
    features = token_features(model, processor, data, cache, batch_size=5)
    assert len(list(cache.iterdir())) == 2  # those of the run: its encoders have not changed
    with scored_split(model, processor, data, 5, tmp_path / "features", features) as (mapped, _):
        from_features = mapped.copy()
    with scored_split(model, processor, data, 5, tmp_path / "pixels") as (mapped, _):
        from_pixels = mapped.copy()
    assert np.ptp(from_pixels) > 0.01
    np.testing.assert_allclose(from_features, from_pixels, atol=1e-3)


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
    recipe.write_text(f"checkpoint: {folder}\noutput_dir: {tmp_path / 'further'}\n")
    common = TINY[: TINY.index("--projection_dim")]
    train.main([str(recipe), *common, "--report_to", "none", "--epochs", "1", "--learning_rate", "1e-12"])
    before = json.loads((folder / "metrics.json").read_text())
    after = json.loads((tmp_path / "further" / "metrics.json").read_text())
    assert after["started_from"]["best_epoch"] == before["best_epoch"] and after["encoders"] == before["encoders"]
    expected = dict(AutoModel.from_pretrained(folder).named_parameters())
    for name, parameter in AutoModel.from_pretrained(tmp_path / "further").named_parameters():
        torch.testing.assert_close(parameter, expected[name], msg=name)


def test_a_checkpoint_keeps_what_the_recipe_does_not_name(tmp_path):
    model = tiny_model(
        aligner="chan", pooling="logsumexp", margin=0.05, use_special_tokens=False, special_token_ids=[0, 2, 3]
    )
    model.config.vision_config._name_or_path = "org/vit"
    model.save_pretrained(tmp_path / "chan")
    tiny_processor(model_max_length=40).save_pretrained(tmp_path / "chan")
    recipe = tmp_path / "further.yaml"
    recipe.write_text(f"checkpoint: {tmp_path / 'chan'}\noutput_dir: {tmp_path / 'further'}\n")
    train.main([str(recipe), *TINY[: TINY.index("--projection_dim")], "--report_to", "none", "--epochs", "1"])
    config = AutoModel.from_pretrained(tmp_path / "further").config
    assert (config.aligner, config.pooling, config.margin, config.use_special_tokens) == ("chan", "logsumexp", 0.05, False)
    metrics = json.loads((tmp_path / "further" / "metrics.json").read_text())
    assert metrics["encoders"] == {"vision": "org/vit", "text": "from scratch"}


def test_names_of_encoders_hold_no_path(tmp_path):
    assert _encoder_name(str(tmp_path / "vit")) == "vit"
    assert _encoder_name("org/vit") == "org/vit"
    assert _encoder_name("package:some_package/model") == "package:some_package/model"
    assert _encoder_name("") == "from scratch"


def test_notes_reach_metrics_and_card(tmp_path):
    notes = ["--notes", "Squashed.", "--data_notes", "Drawn here.", "Free."]
    train.main([*TINY, "--output_dir", str(tmp_path), "--epochs", "1", *notes])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["notes"] == ["Squashed."] and metrics["data_notes"] == ["Drawn here.", "Free."]
    card = (tmp_path / "README.md").read_text()
    assert "- Squashed." in card and "- Free." in card


def test_demo_measures_unseen_scenes(trained, monkeypatch):
    folder, _ = trained
    scenes = load_split("scenes", "test").first(8)
    monkeypatch.setattr(demo, "load_split", lambda *args: scenes)
    monkeypatch.setattr(demo, "GALLERY", 4)
    result = demo.main([str(folder)])
    assert json.loads((folder / "metrics-demo.json").read_text()) == result
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    hits = [hit for number in range(len(scenes)) for hit in pointing_by_hand(model, processor, scenes, number)]
    assert result["pointing"]["words"] == len(hits) > 40
    assert 0 < sum(hits) < len(hits)
    assert math.isclose(result["pointing"]["accuracy"], 100 * sum(hits) / len(hits))


@torch.no_grad()
def pointing_by_hand(model, processor, scenes, number: int) -> list[bool]:
    """For each located word of a scene whether the centre of its best patch lies in one of its boxes."""
    image, captions = scenes.image(number), scenes.captions[number]
    out = model(**processor(images=image, text=captions, return_tensors="pt"))
    rows, columns = out.spatial_shapes[0].tolist()
    original, key, _ = model.config.level_weights
    hits = []
    for c, (caption, phrases) in enumerate(zip(captions, scenes.table[scenes.rows[number]]["phrases"], strict=True)):
        offsets = processor.tokenizer(caption, return_offsets_mapping=True)["offset_mapping"]
        for phrase in phrases:
            tokens = [
                t for t, (start, end) in enumerate(offsets) if phrase["char_start"] <= start < end <= phrase["char_end"]
            ]
            scores = torch.zeros(rows * columns)
            for t in tokens:
                saliency = out.word_saliency[c, t] * out.patch_saliency[0]
                scores += (original + key * saliency) * (out.patch_embeds[0] @ out.word_embeds[c, t])
            row, column = divmod(scores.argmax().item(), columns)
            x, y = (column + 0.5) * image.width / columns, (row + 0.5) * image.height / rows
            hits.append(any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in phrase["boxes"]))
    return hits
