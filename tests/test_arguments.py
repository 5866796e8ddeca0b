"""Run settings: recipes and overrides go through the same checks, and the command line is frozen."""

import dataclasses
import json
import re

import pytest
import yaml

from granalign_hf.training import arguments
from granalign_hf.training.arguments import DEFAULT_RECIPE, ModelArguments, RunArguments, parse_arguments, resolve

RECIPES = sorted(DEFAULT_RECIPE.parent.glob("*.yaml"))
COMMAND_LINE = """
aligner batch_size caption_augmentation caption_column captions_per_image checkpoint crop_scale dataset dataset_config
encoder_lr_factor entropy_weight epochs eval_batch_size eval_interval freeze_encoders image_column image_id_column
kl_weight learning_rate level_weights lr_gamma lr_milestones lr_scheduler lr_warmup_share margin matmul_precision
max_eval_images max_grad_norm max_train_images mixed_precision num_regions num_scenes num_workers output_dir
patch_pool_size pooling projection_dim reconstruction_weight region_logit_scale report_to resume saliency_temperature
seed text_config text_encoder train_split use_prefix_tokens use_special_tokens validation_split vision_config
vision_encoder warmup_epochs weight_decay
""".split()


def test_command_line_is_frozen():
    names = sorted(f.name for kind in (RunArguments, ModelArguments) for f in dataclasses.fields(kind))
    assert names == COMMAND_LINE


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_its_first_line_is_its_command(recipe):
    run, fields, _ = parse_arguments([str(recipe)])
    given = yaml.safe_load(recipe.read_text())
    values = dataclasses.asdict(run) | fields
    for name, value in given.items():
        expected = json.dumps(value) if isinstance(value, dict) else value
        assert values[name] == expected, name
    first_line = recipe.read_text().splitlines()[0]
    assert first_line.startswith("# accelerate launch training/train.py")
    assert recipe == DEFAULT_RECIPE or recipe.name in first_line


def test_no_arguments_means_the_demo():
    run, fields, command = parse_arguments([])
    assert run.dataset == "scenes" and run.output_dir == "runs/demo-scenes" and fields["aligner"] == "grm"
    assert command.strip() == "accelerate launch training/train.py"


def test_overrides_win_over_the_recipe():
    run, fields, command = parse_arguments([str(DEFAULT_RECIPE), "--epochs", "3", "--level_weights", "0.2", "0.2", "0.6"])
    assert run.epochs == 3 and fields["level_weights"] == [0.2, 0.2, 0.6]
    assert "--epochs 3" in command


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--epoch", "3"], "epoch .did you mean epochs"),
        (
            ["--learning_rat", "1", "--marginn", "1"],
            "learning_rat .did you mean learning_rate.*marginn .did you mean margin",
        ),
        (["--epochs", "many"], "invalid int value"),
        (["--epochs", "0", "--crop_scale", "2"], "epochs must be at least 1, got 0; crop_scale must lie in"),
        (["--vision_encoder", "somewhere"], "give one of vision_encoder .pretrained. and vision_config"),
    ],
)
def test_what_cannot_work_is_refused_by_name(words, expected, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([str(DEFAULT_RECIPE), *words])
    message = " ".join(capsys.readouterr().err.split())
    assert re.search(expected, message), message


def test_unknown_field_of_a_recipe_is_refused_by_name(tmp_path, capsys):
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("dataset: scenes\nbatchsize: 3\n")
    with pytest.raises(SystemExit):
        parse_arguments([str(recipe)])
    assert "batchsize (did you mean batch_size?)" in capsys.readouterr().err


def test_missing_recipe(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["nowhere.yaml"])
    assert "nowhere.yaml does not exist" in capsys.readouterr().err


def test_resolve_finds_a_folder_of_an_installed_package():
    assert resolve("org/name") == "org/name"
    assert resolve("package:granalign_hf/recipes").endswith("granalign_hf/recipes")
    with pytest.raises(ValueError, match="no_such_package"):
        resolve("package:no_such_package/model")


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit):
        parse_arguments([str(DEFAULT_RECIPE), "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in COMMAND_LINE)
    assert arguments.DEFAULT_RECIPE.is_file()
