"""Run settings: recipes and overrides go through the same checks, and the command line is frozen."""

import dataclasses
import json
import re
import shlex

import pytest
import torch
import yaml
from PIL import Image
from tiny import tiny_model

from granalign_hf.training import arguments, train
from granalign_hf.training.arguments import (
    DEFAULT_RECIPE,
    SCHEDULERS,
    ModelArguments,
    RunArguments,
    parse_arguments,
    resolve,
)
from granalign_hf.training.compare import Comparison
from granalign_hf.training.parser import as_words
from granalign_hf.training.runtime import portable
from granalign_hf.training.tables import data_problems
from granalign_hf.training.train import make_scheduler

# Those of train.py; compare.py reads the others.
RECIPES = [path for path in sorted(DEFAULT_RECIPE.parent.glob("*.yaml")) if not path.stem.startswith(("compare-", "sweep-"))]
COMPARISONS = [path for path in sorted(DEFAULT_RECIPE.parent.glob("*.yaml")) if path not in RECIPES]
MODEL_FIELDS = [f.name for f in dataclasses.fields(ModelArguments)]
COMMAND_LINE = """
aligner attention_direction batch_size budget_weight caption_augmentation caption_column caption_noise
captions_per_image checkpoint crop_scale data_notes dataset dataset_config emissions_country encoder_lr_factor
entropy_weight epochs eval_batch_size eval_interval features_column freeze_encoders gradient_accumulation_steps
hub_model_id hub_private_repo image_column image_folder image_id_column kl_weight layer_decay learning_rate
level_weights lora_alpha lora_encoders lora_rank lr_gamma lr_milestones lr_scheduler lr_warmup_share margin
matmul_precision max_corrupt_share max_eval_images max_grad_norm max_train_images measure_energy micro_batch_size
mixed_precision notes num_prefix_tokens num_regions num_scenes num_workers output_dir patch_budget patch_dropout
patch_keep_share patch_pool_size pooling projection_dim projection_type push_to_hub reconstruction_weight
region_logit_scale report_to resume saliency_temperature save_steps seed shuffle_buffer special_token_ids split_column
steps_per_epoch streaming text_config text_encoder total_limit train_split use_patch_adapter use_prefix_tokens
use_region_prompts use_region_uncertainty use_special_tokens use_word_adapter validation_split vision_config
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
    assert command == "accelerate launch training/train.py"


def test_overrides_win_over_the_recipe():
    run, fields, command = parse_arguments([str(DEFAULT_RECIPE), "--epochs", "3", "--level_weights", "0.2", "0.2", "0.6"])
    assert run.epochs == 3 and fields["level_weights"] == [0.2, 0.2, 0.6]
    assert "--epochs 3" in command


def test_fields_that_nobody_names_are_left_to_the_config_or_the_checkpoint(tmp_path):
    recipe = tmp_path / "further.yaml"
    recipe.write_text(f"checkpoint: {tmp_path}\noutput_dir: out\nmargin: 0.1\n")
    assert parse_arguments([str(recipe)])[1] == {"margin": 0.1}
    words = ["--use_special_tokens", "false", "--level_weights", "0.2", "0.2", "0.6", "--num_regions=7"]
    given = {"margin": 0.1, "use_special_tokens": False, "level_weights": [0.2, 0.2, 0.6], "num_regions": 7}
    assert parse_arguments([str(recipe), *words])[1] == given


def test_command_keeps_its_quotes_and_loses_its_paths():
    argv = [str(DEFAULT_RECIPE), "--dataset", "/data/my photos", "--notes", "a note", "b's"]
    run, _, command = parse_arguments(argv)
    assert run.notes == ["a note", "b's"]
    assert shlex.split(command)[3:] == argv
    expected = ["demo-scenes.yaml", "--dataset", "my photos", "--notes", "a note", "b's"]
    assert shlex.split(portable(command))[3:] == expected


@pytest.mark.parametrize("notes", ["one sentence: the only", ["first", "second one"]])
def test_notes_of_a_recipe(tmp_path, notes):
    recipe = tmp_path / "noted.yaml"
    recipe.write_text(DEFAULT_RECIPE.read_text() + yaml.safe_dump({"notes": notes, "data_notes": notes}))
    run, _, _ = parse_arguments([str(recipe)])
    assert run.notes == run.data_notes == (notes if isinstance(notes, list) else [notes])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_lowers_or_keeps_the_rate(name):
    milestones = ["--lr_milestones", "1"] if name == "multistep" else []
    run, _, _ = parse_arguments([str(DEFAULT_RECIPE), "--lr_scheduler", name, "--epochs", "2", *milestones])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=1.0)
    scheduler = make_scheduler(optimizer, run, steps_per_epoch=20)
    rates = []
    for _ in range(40):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert max(rates) == 1.0 and 0 <= rates[-1] <= 1.0
    assert name.startswith("constant") or rates[-1] < 1.0


def assert_one_line_a_problem(error: str) -> None:
    first, *problems, hint = error.splitlines()
    number = re.search(r"error: (\d+) problems$", first)
    assert len(problems) == (int(number[1]) if number else 0) and hint == "(--help lists all fields)", error
    assert all(problem.startswith("- ") for problem in problems), error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--epoch", "3"], "epoch .did you mean epochs"),
        (
            ["--learning_rat", "1", "--marginn", "1"],
            "learning_rat .did you mean learning_rate.*marginn .did you mean margin",
        ),
        (["--epochs", "many"], "invalid int value"),
        (["--epochs", "0", "--crop_scale", "2"], "epochs must be at least 1, got 0 - crop_scale must lie in"),
        (
            ["--vision_encoder", "a", "--vision_config", "{}"],
            "the vision side has 2 sources, vision_encoder .on the command line. and vision_config .on the command line.",
        ),
        (["--checkpoint", "a", "--text_encoder", "b"], "the text side has 2 sources, checkpoint .on the command line. and"),
        (
            ["--learning_rate", "-1", "--lr_gamma", "nan"],
            "learning_rate must be greater than 0 .*got -1.0 - lr_gamma must be",
        ),
        (
            ["--weight_decay", "-1", "--num_workers", "-2"],
            "weight_decay must be at least 0, got -1.0 - .*num_workers must be",
        ),
        (
            ["--max_eval_images", "0", "--lr_warmup_share", "2"],
            "max_eval_images must be at least 1.*lr_warmup_share must lie",
        ),
        (["--vision_config", "{"], "vision_config must be a JSON object with a model_type"),
        (
            ["--freeze_encoders", "true", "--crop_scale", "0.6"],
            "freeze_encoders .* set crop_scale 1 and caption_augmentation 0",
        ),
        (["--freeze_encoders", "true", "--caption_augmentation", "0.2"], "freeze_encoders .* which cannot change"),
        (
            ["--freeze_encoders", "true", "--lora_rank", "4"],
            "lora_rank has no effect: freeze_encoders leaves nothing in the encoders to train",
        ),
        (
            ["--layer_decay", "0", "--lora_encoders", "image"],
            "layer_decay must lie in .*lora_encoders must be one of vision",
        ),
        (["--captions_per_image", "-1"], "captions_per_image must be at least 0, got -1"),
        (["--lr_scheduler", "cosin"], "lr_scheduler must be one of multistep, .*cosine.*, got cosin"),
        (["--lr_scheduler", "reduce_lr_on_plateau"], "lr_scheduler must be one of"),
        (["--report_to", "tensorbord"], "report_to must be one of all, none, .*got tensorbord"),
        (["--report_to", "none", "tensorboard"], "report_to takes all and none alone, got none tensorboard"),
        (
            ["--aligner", "chan", "--num_regions", "7"],
            "num_regions .on the command line. has no effect: the aligner chan does",
        ),
        (
            ["--use_region_prompts", "false", "--num_regions", "7"],
            "num_regions .* has no effect: use_region_prompts is false",
        ),
        (["--aligner", "gmr"], "`aligner` must be one of"),
        (["--aligner", "vse++", "--pooling", "min"], "`pooling` of the aligner 'vse\\+\\+' must be one of"),
        (["--margin", "0", "--patch_dropout", "1"], "`patch_dropout` must lie in .*`margin` must be greater than 0"),
        (["--max_corrupt_share", "1"], "max_corrupt_share must lie in .0, 1., got 1.0"),
        (["--steps_per_epoch", "5"], "steps_per_epoch is for streaming"),
        (
            ["--push_to_hub"],
            "push_to_hub needs hub_model_id, the repository as org/name - push_to_hub needs a token of the Hub",
        ),
        (["--push_to_hub", "--hub_model_id", "a b"], "hub_model_id: A repository on the Hub is named org/name, got 'a b'"),
        (
            ["--hub_model_id", "a/b", "--hub_private_repo", "true"],
            "hub_model_id has no effect: push_to_hub is False - hub_private_repo",
        ),
        (["--streaming", "true"], "streaming needs steps_per_epoch.*excludes text_config, .*excludes dataset scenes"),
        (["--features_column", "f", "--image_folder", "x"], "features_column replaces pictures"),
        (
            ["--vision_config", '{"model_type": "region_features"}', "--crop_scale", "0.6"],
            "crop_scale must be 1 for region_features",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(words, expected, capsys, monkeypatch):
    monkeypatch.setattr(arguments, "get_token", lambda: None)
    with pytest.raises(SystemExit):
        parse_arguments([str(DEFAULT_RECIPE), *words])
    error = capsys.readouterr().err
    assert_one_line_a_problem(error)
    message = " ".join(error.split())
    assert re.search(expected, message), message


def test_all_problems_stand_in_one_message(tmp_path, capsys):
    """Of the recipe and the command line; of types, ranges, sources, the model and the data set."""
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text(
        "dataset: scenes\nbatchsize: 3\naligner: chan\nnum_regions: 7\nseed: one\nmargin: -1\nvision_encoder: a\n"
    )
    words = ["--epochs", "many", "--crop-scale", "2", "--epoch", "3", "--validation_split", "dev"]
    with pytest.raises(SystemExit):
        parse_arguments([str(recipe), *words], data_problems)
    error = capsys.readouterr().err
    told = (
        *("argument --seed: invalid int value: 'one'", "argument --epochs: invalid int value: 'many'"),
        *("batchsize (did you mean batch_size?)", "epoch (did you mean epochs?)", "crop_scale must lie in (0, 1], got 2.0"),
        *("the text side has no source", f"num_regions (in {recipe}) has no effect", "`margin` must be greater than 0"),
        "validation_split: The data set scenes has no split 'dev'",
    )
    for part in told:
        assert part in error
    assert_one_line_a_problem(error)


def test_another_aligner_on_the_command_line_drops_what_the_recipe_says_of_its_own(tmp_path, capsys):
    recipe = tmp_path / "grm.yaml"
    recipe.write_text("checkpoint: a\naligner: grm\nnum_regions: 50\nlevel_weights: [0.7, 0.2, 0.1]\nmargin: 0.1\n")
    assert parse_arguments([str(recipe)])[1]["num_regions"] == 50
    assert parse_arguments([str(recipe), "--aligner", "chan"])[1] == {"aligner": "chan", "margin": 0.1}
    assert parse_arguments([str(recipe), "--aligner", "laps"])[1]["num_regions"] == 50
    assert "num_regions" not in parse_arguments([str(recipe), "--use_region_prompts", "false"])[1]
    for wrong in ("aligner: chan\nnum_regions: 50\n", "aligner: grm\nuse_region_prompts: false\nnum_regions: 50\n"):
        recipe.write_text(f"checkpoint: a\n{wrong}")
        with pytest.raises(SystemExit):
            parse_arguments([str(recipe)])
        assert f"num_regions (in {recipe}) has no effect" in capsys.readouterr().err


def test_a_small_number_is_no_option():
    words = as_words({"entropy_weight": -0.00001, "learning_rate": 2e-4, "epochs": 3})
    assert words == ["--entropy_weight", "-0.00001", "--learning_rate", "0.0002", "--epochs", "3"]
    assert parse_arguments(words)[1]["entropy_weight"] == -1e-5


def test_a_bare_no_of_yaml_is_told(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(DEFAULT_RECIPE.read_text() + "mixed_precision: no\n")
    with pytest.raises(SystemExit):
        parse_arguments([str(recipe)])
    assert "mixed_precision must be one of no, bf16, fp16, got False (YAML reads" in capsys.readouterr().err


def test_fields_are_held_against_the_aligner_of_the_checkpoint(tmp_path, capsys):
    tiny_model(aligner="chan", pooling="logsumexp").config.save_pretrained(tmp_path)
    assert parse_arguments(["--checkpoint", str(tmp_path), "--margin", "0.1"])[1] == {"margin": 0.1}
    with pytest.raises(SystemExit):
        parse_arguments(["--checkpoint", str(tmp_path), "--level_weights", "1", "0", "0"])
    assert "level_weights (on the command line) has no effect: the aligner chan" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_arguments(["--checkpoint", str(tmp_path), "--aligner", "vse++"])
    assert "`pooling` of the aligner 'vse++' must be one of" in capsys.readouterr().err


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_the_runs_of_every_comparison_are_accepted(path):
    comparison = Comparison.read(path)
    for name, settings in comparison.runs.items():
        fields = parse_arguments([comparison.base, *as_words(settings)])[1]
        assert all(fields[field] == value for field, value in settings.items() if field in MODEL_FIELDS), name


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda folder: None, "is neither a folder nor on the Hub"),
        (lambda folder: folder.mkdir(), "is neither a folder nor on the Hub"),
        (
            lambda folder: save_splits(folder, "train"),
            r"validation_split: .* has no split 'validation'; its splits are \['train'\]",
        ),
        (
            lambda folder: save_splits(folder, "train", "test"),
            r"validation_split: .* no split 'validation'; its splits are \['test', ",
        ),
        (lambda folder: save_splits(folder, "test"), "train_split: .*no split 'train'.* - validation_split: "),
    ],
)
def test_a_data_set_without_the_split_is_refused_before_a_model_is_built(tmp_path, make, problem, monkeypatch, capsys):
    make(tmp_path / "data")
    monkeypatch.setattr(train, "build", lambda *args: pytest.fail("built"))
    with pytest.raises(SystemExit):
        train.main(["--dataset", str(tmp_path / "data"), "--epochs", "0"])
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(problem, error) and "epochs must be at least 1" in error


def save_splits(folder, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "a"}\n')
        Image.new("RGB", (4, 4)).save(folder / name / "a.png")


def test_unknown_field_of_a_recipe_is_refused_by_name(tmp_path, capsys):
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("dataset: scenes\nbatchsize: 3\n")
    with pytest.raises(SystemExit):
        parse_arguments([str(recipe)])
    assert "batchsize (did you mean batch_size?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: [1", "is not YAML: while parsing"),
        ("- dataset\n- scenes", "must be lines of `field: value`, got list"),
        ("scenes", "must be lines of `field: value`, got str: 'scenes'"),
    ],
)
def test_a_recipe_that_is_none_is_named(tmp_path, capsys, text, message):
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parse_arguments([str(tmp_path / "odd.yaml")])
    error = capsys.readouterr().err
    assert f"the recipe {tmp_path / 'odd.yaml'} {message}" in error and error.count("\n") == 2


def test_sources_on_the_command_line_replace_those_of_the_recipe(tmp_path):
    run, fields, _ = parse_arguments(["--vision_encoder", "a", "--text_encoder=b"])
    assert (run.vision_encoder, run.text_encoder, run.vision_config, run.text_config) == ("a", "b", None, None)
    assert fields["projection_dim"] == 64  # of the recipe
    recipe = tmp_path / "further.yaml"
    recipe.write_text("checkpoint: before\nmargin: 0.1\n")
    run, fields, _ = parse_arguments([str(recipe), "--checkpoint", "other"])
    assert run.checkpoint == "other" and fields == {"margin": 0.1}
    run, fields, _ = parse_arguments([str(recipe), "--vision_encoder", "a", "--text_encoder", "b"])
    assert run.checkpoint is None and fields == {"margin": 0.1}


def test_one_side_may_be_pretrained_and_the_other_from_scratch():
    run = parse_arguments(["--vision_encoder", "somewhere"])[0]
    assert run.vision_config is None and json.loads(run.text_config)["model_type"] == "modernbert"
    run = parse_arguments(["--text_encoder", "somewhere"])[0]
    assert run.text_config is None and json.loads(run.vision_config)["model_type"] == "resnet"


def test_a_checkpoint_on_the_command_line_replaces_the_model_of_the_recipe():
    run, fields, _ = parse_arguments(["--checkpoint", "other", "--margin", "0.3"])
    assert (run.checkpoint, run.vision_config, run.text_config) == ("other", None, None)
    assert fields == {"margin": 0.3}  # projection_dim and the like describe the model that is not trained


def test_a_side_without_a_source_is_named(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("checkpoint: before\n")
    with pytest.raises(SystemExit):
        parse_arguments([str(tmp_path / "recipe.yaml"), "--vision_encoder", "a"])
    assert "the text side has no source: give text_encoder" in capsys.readouterr().err


def test_fields_without_a_default_can_be_set():
    fields = parse_arguments(["--special_token_ids", "0", "2", "--num_prefix_tokens", "1"])[1]
    assert fields["special_token_ids"] == [0, 2] and fields["num_prefix_tokens"] == 1


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
    assert "Margin of the hinge loss [alpha]." in " ".join(text.split())
    assert arguments.DEFAULT_RECIPE.is_file()
