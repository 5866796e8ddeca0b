"""Clutter: what a comparison's checkpoints do as scenes fill with objects that no caption names."""

import json
import re

import pytest
import yaml
from tiny import tiny_model, tiny_processor

from granalign_hf.training import clutter
from granalign_hf.training.compare import Comparison, run_folder
from granalign_hf.training.data import drawn_scenes, load_split


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(clutter, "NUM_SCENES", 4)
    monkeypatch.setattr(clutter, "GALLERY", 2)
    monkeypatch.setattr(clutter, "DISTRACTORS", (0, 8))
    runs = {"grm": {}, "chan": {"aligner": "chan"}}
    content = {"base": "base.yaml", "split": "test", "seeds": [0], "baselines": [], "diagnostics": [], "runs": runs}
    content |= {"output_dir": str(tmp_path / "runs"), "results_dir": str(tmp_path)}
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(content))
    (tmp_path / "base.yaml").write_text("dataset: scenes\n")
    for name, fields in runs.items():
        folder = run_folder(Comparison.read(path), name, 0)
        tiny_model(**fields).save_pretrained(folder)
        tiny_processor().save_pretrained(folder)
        (folder / "complete").touch()
    return path


def test_every_run_is_measured_at_every_number_of_distractors(recipe, tmp_path):
    result = clutter.main([str(recipe)])
    assert result == json.loads((tmp_path / "clutter.json").read_text()) | {"distractors": (0, 8)}
    for of_run in result["runs"].values():
        assert [len(seeds) for seeds in of_run["rsum"]] == [len(seeds) for seeds in of_run["pointing"]] == [1, 1]
        assert all(0 <= seeds[0] <= 600 for seeds in of_run["rsum"])
    table = (tmp_path / "clutter.md").read_text()
    assert f"| chan | {result['runs']['chan']['rsum'][0][0]:.1f} | {result['runs']['chan']['rsum'][1][0]:.1f} |" in table
    assert (tmp_path / "clutter.png").stat().st_size > 0


def test_a_run_that_is_not_trained_is_named(recipe, tmp_path, capsys):
    (tmp_path / "runs" / "chan-seed0" / "complete").unlink()
    with pytest.raises(SystemExit):
        clutter.main([str(recipe)])
    assert "not trained yet" in (message := capsys.readouterr().err) and "chan-seed0" in message and "grm" not in message


def test_the_scenes_with_one_distractor_are_those_of_the_test_split():
    drawn, loaded = drawn_scenes(3, clutter.SCENE_SEEDS["test"], 1), load_split("scenes", "test", num_scenes=3)
    assert drawn.captions == loaded.captions and drawn.image(2).tobytes() == loaded.image(2).tobytes()
    assert drawn_scenes(3, 4, 8).image(0).tobytes() != drawn.image(0).tobytes()


def test_a_checkpoint_of_another_recipe_is_refused(recipe, tmp_path, capsys):
    (tmp_path / "runs" / "grm-seed0" / "settings.json").write_text("{}")
    with pytest.raises(SystemExit):
        clutter.main([str(recipe)])
    assert "grm-seed0 holds a run of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "told"), [("no.yaml", "no.yaml cannot be read"), ("compare.yaml", "the runs of .* are of pets")]
)
def test_what_has_no_scenes_is_refused(recipe, tmp_path, capsys, file, told):
    (tmp_path / "base.yaml").write_text("dataset: pets\n")
    with pytest.raises(SystemExit):
        clutter.main([str(tmp_path / file)])
    assert re.search(told, " ".join(capsys.readouterr().err.split()))
