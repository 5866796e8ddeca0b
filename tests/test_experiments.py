"""The experiments' page shows what the comparisons measured, and every comparison can be run."""

import json
from pathlib import Path

import pytest

from granalign_hf.training import clutter
from granalign_hf.training.arguments import parse_arguments
from granalign_hf.training.compare import Comparison, published_rsum, table
from granalign_hf.training.compare_measures import tables
from granalign_hf.training.parser import as_words

TRAINING = Path(__file__).parents[1] / "training"
RESULTS = sorted(path.parent for path in TRAINING.glob("results/*/results.json"))
MEASURED = sorted(path.parent for path in TRAINING.glob("results/*/measures.json"))
RECIPES = sorted(path for kind in ("compare", "sweep") for path in (TRAINING / "recipes").glob(f"{kind}-*.yaml"))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_the_page_shows_the_measured_table(folder):
    page, written = (TRAINING / "EXPERIMENTS.md").read_text(), (folder / "table.md").read_text()
    assert written in page
    recipe = Comparison.read(TRAINING / "recipes" / f"{folder.name}.yaml")
    result = json.loads((folder / "results.json").read_text())
    assert table(result["runs"], recipe.baselines, recipe.diagnostics) == written
    assert {name: row["settings"] for name, row in result["runs"].items()} == {
        name: settings for name, settings in recipe.runs.items() if name in result["runs"]
    }


@pytest.mark.parametrize("folder", MEASURED, ids=lambda path: path.name)
def test_the_page_shows_where_words_point_and_how_sure_each_run_is(folder):
    page, runs = (TRAINING / "EXPERIMENTS.md").read_text(), json.loads((folder / "measures.json").read_text())["runs"]
    for measure, written in tables(runs).items():
        assert written == (folder / f"{measure}.md").read_text() and written in page


def test_the_page_shows_what_clutter_does():
    folder = TRAINING / "results" / "compare-scenes"
    written = clutter.table(json.loads((folder / "clutter.json").read_text())["runs"])
    assert written == (folder / "clutter.md").read_text() and written in (TRAINING / "EXPERIMENTS.md").read_text()


@pytest.mark.parametrize("run", ["grm", "vse-max"])
def test_the_page_shows_how_well_the_training_photographs_are_ranked(run):
    files = [TRAINING / "results" / "fit" / f"{run}-{split}.json" for split in ("train", "validation")]
    figures = [f"{json.loads(file.read_text())['metrics']['rsum']:.1f}" for file in files]
    assert f"| {run} | {figures[0]} | {figures[1]} |" in (TRAINING / "EXPERIMENTS.md").read_text()


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("side", [7, 14])
def test_the_page_shows_what_a_finer_grid_does(side, split):
    page, file = (TRAINING / "EXPERIMENTS.md").read_text(), TRAINING / "results" / "grid" / f"grid-{side}-{split}.json"
    pointing = {group: row for group, row in json.loads(file.read_text())["pointing"].items() if group != "instruments"}
    for way, name in (("accuracy", "highest patch"), ("densest", "densest")):
        figures = " | ".join(f"{row[way]:.1f}" for row in pointing.values())
        assert f"| {split} | {side} x {side} | {name} | {figures} |" in page


@pytest.mark.parametrize("name", ["variances"])
def test_the_page_shows_what_was_tried_and_not_kept(name):
    folder, page = TRAINING / "results" / name, (TRAINING / "EXPERIMENTS.md").read_text()
    written = (folder / f"{name}.md").read_text()
    assert written in page and "--- a/modeling/aligners.py" in (folder / "trainings.patch").read_text()
    for run, figures in json.loads((folder / f"{name}.json").read_text())["runs"].items():
        assert f"| {run} | {figures['rsum']:.1f} | {figures['image_to_text']['standard_error']:.3f} |" in written


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_run_of_a_comparison_is_accepted(path):
    recipe = Comparison.read(path)
    assert recipe.results_dir == f"training/results/{path.stem}"
    for settings in recipe.runs.values():
        fields = parse_arguments([recipe.base, *as_words(settings)])[1]
        assert fields.items() >= {n: v for n, v in settings.items() if n in fields}.items()
    if recipe.published is not None:
        assert set(published_rsum(**recipe.published)) <= set(recipe.runs)
    if path.stem.startswith("sweep"):
        assert recipe.split == "validation"
