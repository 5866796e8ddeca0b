"""A card tells what the files beside the checkpoint tell, all of it, and nothing else."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from tiny import region_model_and_processor, tiny_model, tiny_processor

from granalign_hf.examples import PHOTOGRAPHS, SCENES
from granalign_hf.model_card import DESCRIPTIONS, write_model_card
from granalign_hf.modeling.aligners import ALIGNERS
from granalign_hf.training.scenes import draw_scene

TRAINING = {
    "recipe": "training/recipes/flickr8k-vit-tiny.yaml",
    "command": "accelerate launch training/train.py training/recipes/flickr8k-vit-tiny.yaml --seed 7",
    "seed": 7,
    "date": "2026-03-04",
    "hours": 0.853,
    "hardware": "2 CPU cores (x86_64) | shared",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "dataset": "someone/flickr8k",
    "train_split": "train",
    "num_train_images": 6001,
    "num_train_captions": 30005,
    "best_epoch": 8,
    "validation": {"image_to_text_r1": 41.93, "rsum": 271.38},
    "history": [{"epoch": epoch, "loss": 1 / epoch, "validation": {"rsum": 200.0 + epoch}} for epoch in range(1, 11)],
    "encoders": {"vision": "google/vit-base-patch16-224", "text": "package:some_encoder/model"},
    "frozen_encoders": False,
    "notes": ["The text encoder was trained on related captions."],
}
TEST = {
    "dataset": "someone/flickr8k",
    "split": "test",
    "protocol": "all pairs",
    "num_images": 1003,
    "num_captions": 5015,
    "date": "2026-03-05",
    "command": "accelerate launch training/evaluate.py flickr8k-vit-tiny --split test",
    "metrics": {"image_to_text_r1": 43.17, "rsum": 288.34, "image_to_text_median_rank": 2.0, "pointing_accuracy": 83.214},
    "intervals": {"image_to_text_r1": [40.26, 46.08], "rsum": [280.44, 296.16]},
}
SIGNS_OF_A_PATH = re.compile(r"/home|/Users|/root|/tmp|/data|/mnt|file:|[A-Z]:\\|\\|~/|\.\./|/\.")


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "flickr8k-vit-tiny"
    folder.mkdir()
    vision_text = {"vision_config": {"model_type": "vit"}, "text_config": {"model_type": "bert"}}
    (folder / "config.json").write_text(json.dumps({"model_type": "granalign", "aligner": "grm", **vision_text}))
    return folder


def save(folder: Path, training=None, **evaluations) -> None:
    if training is not None:
        (folder / "metrics.json").write_text(json.dumps(training))
    for split, content in evaluations.items():
        (folder / f"metrics-{split}.json").write_text(json.dumps(content))


def card_of(folder: Path, **arguments) -> str:
    return write_model_card(folder, **arguments).read_text()


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n")[1].split("\n## ")[0]


# ------------------------------------------------------------------------------------------------------------- figures


def test_all_that_was_measured_is_told(folder):
    save(folder, TRAINING, test=TEST)
    card = card_of(folder)
    results = section(card, "Results")
    assert "### someone/flickr8k, test" in results
    assert "| Image to text, R@1 | 43.2 | 40.3 to 46.1 |" in results
    assert "| rSum | 288.3 | 280.4 to 296.2 |" in results
    assert "| Image to text, median rank | 2 | not measured |" in results
    assert "| Pointing accuracy | 83.21 | not measured |" in results
    assert "all pairs" in results and "1003" in results and "5015" in results and TEST["command"] in results
    training = section(card, "Training")
    for row in (
        "| recipe | training/recipes/flickr8k-vit-tiny.yaml |",
        "| seed | 7 |",
        "| best epoch | 8 of 10 |",
        "| hours | 0.853 |",
        "| frozen encoders | no |",
        "| hardware | 2 CPU cores (x86_64) \\| shared |",
        "| versions | torch 2.13.0, transformers 5.23.0 |",
        "| Image to text, R@1 | 41.9 |",
        "| rSum | 271.4 |",
        f"| command | `{TRAINING['command']}` |",
    ):
        assert row in training
    assert "someone/flickr8k, split train: 6001 images with 30005 captions" in section(card, "Data")
    assert "- The text encoder was trained on related captions." in section(card, "Limits")
    assert "Encoders: vision google/vit-base-patch16-224 (vit), text some_encoder (bert)." in card


def test_both_runs_of_a_model_in_two_stages_are_told(folder):
    first = "accelerate launch training/train.py /root/frozen.yaml"
    energy = {"kwh": 0.03, "co2_kg": 0.0117, "country": "DEU", "source": "CodeCarbon 3.3.2"}
    before = {"command": first, "hours": 0.2, "energy": energy | {"kwh": 0.01, "co2_kg": 0.0039}, "best_epoch": 12}
    save(folder, TRAINING | {"energy": energy, "started_from": before})
    assert ModelCard(card_of(folder)).data.co2_eq_emissions["emissions"] == 15.6
    training = section(card_of(folder), "Training")
    assert "| started from | best epoch, 12, of `accelerate launch training/train.py frozen.yaml` |" in training
    assert "| hours | 0.853, and 0.2 of the run that it started from: 1.053 |" in training
    assert "| energy (kWh) | 0.03, and 0.01 of the run that it started from: 0.04 |" in training
    save(folder, TRAINING | {"started_from": None})
    training = section(card_of(folder), "Training")
    assert "| hours | 0.853 |" in training and "started from" not in training
    assert "| energy (kWh) | not recorded |" in training


def test_no_licence_is_claimed_unless_it_is_given(folder):
    save(folder, TRAINING)
    card = card_of(folder)
    assert ModelCard(card).data.license is None and "apache" not in card
    assert "- No note on the licence of the data was recorded." in section(card, "Data")
    assert "- Licence of the weights: not recorded." in section(card, "Data")
    save(folder, TRAINING | {"license": "cc-by-nc-4.0", "data_notes": ["For research only."]})
    card = card_of(folder)
    assert ModelCard(card).data.license == "cc-by-nc-4.0"
    assert section(card, "Data").strip().endswith("- For research only.\n- Licence of the weights: cc-by-nc-4.0.")


def test_a_changed_file_changes_the_card(folder):
    save(folder, TRAINING, test=TEST)
    before = card_of(folder)
    save(folder, TRAINING | {"hours": 1.5}, test=TEST | {"metrics": TEST["metrics"] | {"rsum": 301.07}})
    after = card_of(folder)
    assert "| rSum | 301.1 |" in after and "| rSum | 288.3 |" not in after
    assert "| hours | 1.5 |" in after and "0.853" not in after
    assert len(set(before.splitlines()) ^ set(after.splitlines())) == 6  # table row, model-index value, hours: old and new


def test_every_decimal_figure_stands_in_a_file(folder):
    save(folder, TRAINING, test=TEST)
    carried = {"0.853", "43.17", "288.34", "2.0", "83.21"}  # the last four: model index
    for figures in (TRAINING["validation"].values(), TEST["metrics"].values(), *TEST["intervals"].values()):
        carried |= {f"{value:.1f}" for value in figures}
    text = card_of(folder).replace("arXiv:2511.07710", "").replace("torch 2.13.0", "").replace("transformers 5.23.0", "")
    assert set(re.findall(r"\d+\.\d+", text)) <= carried


def test_without_files_nothing_is_claimed(folder):
    card = card_of(folder)
    assert section(card, "Results").count("Not measured: the checkpoint has no `metrics-<split>.json`") == 1
    assert "Not measured: the checkpoint has no `metrics.json`" in section(card, "Training")
    assert "Not recorded" in section(card, "Data")
    assert "vision not recorded (vit), text not recorded (bert)" in card
    for title in ("Results", "Training", "Data"):
        assert "|" not in section(card, title)
    assert "model-index" not in card and "base_model" not in card and "datasets" not in card


def test_a_record_with_gaps_says_so(folder):
    save(folder, {"seed": 0}, test={"dataset": "scenes", "split": "test", "metrics": {"rsum": 600}})
    card = card_of(folder)
    training = section(card, "Training")
    assert (
        "| seed | 0 |" in training and "| hours | not recorded |" in training and "| best epoch | not recorded |" in training
    )
    assert "| rSum | 600.0 | not measured |" in card and "Protocol: not recorded." in card


def test_one_table_a_split(folder):
    save(folder, test=TEST, coco=TEST | {"split": "coco", "diagnostics": {"patch_saliency_mean": 0.98765}})
    results = section(card_of(folder), "Results")
    assert results.count("| metric | value | 95 % interval |") == 2
    assert results.index("someone/flickr8k, coco") < results.index("someone/flickr8k, test")
    assert "| Patch saliency mean | 0.9877 |" in results


# ------------------------------------------------------------------------------------------------------- what must fail


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "43.2", True])
def test_a_figure_that_is_no_number_is_refused(folder, value):
    save(folder, test=TEST | {"metrics": {"rsum": value}})
    with pytest.raises(ValueError, match="`rsum` must be a finite number"):
        write_model_card(folder)


def test_a_placeholder_that_nothing_fills_is_refused(folder):
    with pytest.raises(ValueError, match=r"placeholder \$rank, which nothing fills; known are captions, data, description"):
        write_model_card(folder, template="# $model_name\n$rank")
    with pytest.raises(ValueError, match="without a placeholder"):
        write_model_card(folder, template="costs 5 $ a run")
    assert not (folder / "README.md").exists()


def test_dollars_in_the_files_are_text(folder):
    save(folder, TRAINING | {"notes": ["It cost $seed and ${hours}."]})
    assert "- It cost $seed and ${hours}." in card_of(folder)


def test_broken_files_are_named(folder):
    (folder / "metrics-test.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics-test\.json is not JSON"):
        write_model_card(folder)
    (folder / "metrics-test.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        write_model_card(folder)
    (folder / "metrics-test.json").write_text('{"split": "test", "metrics": {}}')
    with pytest.raises(ValueError, match="lacks dataset, metrics"):
        write_model_card(folder)
    with pytest.raises(ValueError, match=r"must hold a config\.json"):
        write_model_card(folder.parent)


# ------------------------------------------------------------------------------------------------------- machine paths


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("/home/ann/encoders/vit-tiny", "vit-tiny"),
        ("/root/vit-tiny/", "vit-tiny"),
        ("../shared/encoders/vit-tiny", "vit-tiny"),
        ("./vit-tiny", "vit-tiny"),
        ("~/models/vit-tiny", "vit-tiny"),
        ("runs/pretrained/vit-tiny", "vit-tiny"),
        ("C:\\Users\\ann\\vit-tiny", "vit-tiny"),
        ("file:///tmp/vit-tiny", "vit-tiny"),
        ("package:some_encoder/model", "some_encoder"),
        ("google/vit-tiny", "google/vit-tiny"),
        ("vit-tiny", "vit-tiny"),
        ("from scratch", "from scratch"),
    ],
)
def test_an_encoder_is_told_by_its_last_name(folder, written, told):
    save(folder, TRAINING | {"encoders": {"vision": written, "text": "t"}})
    assert f"Encoders: vision {told} (vit), text t (bert)." in card_of(folder)


def test_no_machine_path_in_any_field(folder):
    places = "see /home/ann/a.yaml, '../b/c.yaml' (~/d.yaml) x=/tmp/e.yaml C:\\f\\g.yaml:/mnt/h.yaml"
    told = "see a.yaml, 'c.yaml' (d.yaml) x=e.yaml g.yaml:h.yaml"
    training = TRAINING | {name: places for name in ("recipe", "command", "hardware", "dataset", "train_split")}
    training |= {"notes": [places], "encoders": {"vision": places, "text": "/root/bert"}, "versions": {"torch": places}}
    save(folder, training, test=TEST | {name: places for name in ("dataset", "split", "protocol", "command", "date")})
    card = card_of(folder, data_notes=None)
    assert f"| command | `{told}` |" in card and f"- {told}" in card
    assert not SIGNS_OF_A_PATH.search(card.replace("https://", ""))
    assert str(folder.parent) not in card


def test_what_is_no_machine_path_stays(folder):
    note = "R@1 / R@5 and/or 1/2, 50/h, https://example.org/a/b?c=d and training/train.py"
    save(folder, TRAINING | {"notes": [note]})
    assert f"- {note}" in card_of(folder)


# ------------------------------------------------------------------------------------------------------------ metadata


def test_metadata_as_the_hub_reads_it(folder):
    save(folder, TRAINING, test=TEST)
    write_model_card(folder)
    data = ModelCard.load(folder / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "zero-shot-image-classification")
    assert data.datasets == ["someone/flickr8k"] and data.base_model == ["google/vit-base-patch16-224"]
    assert {"granalign", "grm", "image-text-retrieval"} <= set(data.tags)
    assert data.model_name == "flickr8k-vit-tiny"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "image_to_text_r1": 43.17,
        "rsum": 288.34,
        "image_to_text_median_rank": 2.0,
        "pointing_accuracy": 83.21,
    }
    result = data.eval_results[0]
    assert (result.task_type, result.dataset_name, result.dataset_split) == (
        "image-text-retrieval",
        "someone/flickr8k",
        "test",
    )
    assert result.metric_name == "Image to text, R@1"


def test_arguments_come_before_what_was_recorded(folder):
    save(folder, TRAINING | {"data_notes": ["Recorded."]})
    assert "- Recorded." in section(card_of(folder), "Data")
    card = card_of(
        folder,
        repo_id="org/name",
        license="cc-by-4.0",
        datasets=["a/b"],
        base_models=["c/d"],
        data_notes=["For research only."],
    )
    data = ModelCard(card).data
    assert (data.license, data.datasets, data.base_model) == ("cc-by-4.0", ["a/b"], ["c/d"])
    assert "- For research only." in section(card, "Data") and "Recorded." not in card
    assert 'AutoModel.from_pretrained("org/name", trust_remote_code=True)' in card


def test_the_widget_has_examples_on_the_hub_only(folder):
    assert "widget" not in ModelCard(card_of(folder)).data
    save(folder, TRAINING | {"dataset": "scenes"})
    card = ModelCard(card_of(folder, repo_id="org/name"))
    assert card.data.widget[0] == {
        "src": "widget-1.png",
        "example_title": "A purple ring and a star",
        "candidate_labels": "a red cross, a blue cross, two black circles",
    }
    assert [example["src"] for example in card.data.widget] == [example.file for example in SCENES]
    assert "# name" in card.text and "Photographs of the examples" not in card.text
    (folder / "config.json").write_text(
        json.dumps({"vision_config": {"model_type": "region_features", "num_boxes": 4, "hidden_size": 6}})
    )
    assert "widget" not in ModelCard(card_of(folder, repo_id="org/name")).data


def test_a_model_of_photographs_has_photographs_in_its_widget_and_says_whose(folder):
    save(folder, TRAINING)
    card = ModelCard(card_of(folder, repo_id="org/name"))
    assert [example["src"] for example in card.data.widget] == [example.file for example in PHOTOGRAPHS]
    for example in PHOTOGRAPHS:
        assert example.credit.endswith("CC0 1.0") and example.credit in section(card.content, "Data")


@pytest.mark.parametrize(("scene", "seed"), [(SCENES[0], 1), (SCENES[1], 8)])
def test_the_scenes_of_the_widget_are_drawn_by_the_project(scene, seed):
    drawn = draw_scene(np.random.default_rng([7, seed]), image_size=128)
    with Image.open(Path(__file__).parents[1] / "model_cards" / scene.file) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(drawn.image))
    true, *false = scene.labels
    assert any(true in caption for caption in drawn.captions)
    things = {(thing.colour, thing.shape) for thing in drawn.objects}
    assert not any((colour, shape.removesuffix("s")) in things for _, colour, shape in map(str.split, false))


@pytest.mark.parametrize(("aligner", "words"), [("grm", "GRM"), ("chan", "CHAN"), ("vse++", "VSE++"), ("other", "`other`")])
def test_the_aligner_is_described(folder, aligner, words):
    (folder / "config.json").write_text(json.dumps({"aligner": aligner}))
    assert words in card_of(folder).split("## Use")[0].split("# flickr8k-vit-tiny")[1]


def test_pictures_that_exist_are_shown(folder):
    save(folder, TRAINING)
    assert "](learning_curve.png)" not in card_of(folder)
    (folder / "learning_curve.png").touch()
    assert "](learning_curve.png)" in section(card_of(folder), "Training")


def test_the_code_of_a_card_runs(tmp_path, monkeypatch, capsys):
    tiny_model().save_pretrained(tmp_path / "checkpoint")
    tiny_processor().save_pretrained(tmp_path / "checkpoint")
    Image.new("RGB", (20, 30), "red").save(tmp_path / "photo.jpg")
    blocks = re.findall(r"```python\n(.*?)```", card_of(tmp_path / "checkpoint"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3
    assert capsys.readouterr().out.strip() in names["captions"]


def test_the_code_of_a_card_of_region_features_runs(tmp_path, monkeypatch, capsys):
    model, processor = region_model_and_processor()
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    np.save(tmp_path / "features.npy", np.ones((4, 6), np.float32))
    card = card_of(tmp_path / "checkpoint")
    assert "a photograph, given as the features of 4 regions with 6 numbers each:" in card
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(block, names)
    assert capsys.readouterr().out.strip() in names["captions"]


def test_figures_of_a_part_of_a_split_are_no_result(folder):
    save(folder, test=TEST, **{"test-first-10": TEST | {"num_images": 10}})
    card = write_model_card(folder).read_text()
    assert "Images: 1003" in card and "Images: 10," not in card


def test_every_aligner_is_described():
    assert set(DESCRIPTIONS) == set(ALIGNERS)
