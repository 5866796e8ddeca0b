"""Grounding, foils and uncertainty of the runs of a comparison side by side."""

import json
import shutil
import statistics

import pytest
import yaml
from tiny import tiny_model, tiny_processor

from granalign_hf.training import calibrate, compare_measures, evaluate, jobs
from granalign_hf.training.compare import Comparison, run_folder


class Ended:
    returncode = 0

    def poll(self):
        return 0


@pytest.fixture
def recipe(tmp_path):
    """Two seeds of one run and one of another, which has no saliency."""
    runs = {"grm": {}, "chan": {"aligner": "chan"}, "never-trained": {}}
    content = {"base": "base.yaml", "split": "test", "seeds": [1, 0], "baselines": [], "diagnostics": [], "runs": runs}
    content |= {"output_dir": str(tmp_path / "runs"), "results_dir": str(tmp_path / "results")}
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    (tmp_path / "base.yaml").write_text("dataset: scenes\n")
    for name, seed in (("grm", 0), ("grm", 1), ("chan", 1)):
        folder = run_folder(Comparison.read(path), name, seed)
        tiny_model(seed=seed, **runs[name]).save_pretrained(folder)
        tiny_processor().save_pretrained(folder)
        (folder / "complete").touch()
    return path


@pytest.fixture
def calls(monkeypatch):
    """The measurements that are run, here and of few scenes."""
    calls = []

    def start(step, cores):
        if step.script == "calibrate":
            calls.append((step.folder.name, "uncertainty"))
            calibrate.main([*step.words, "--max_images", "12"])
            (step.folder / "uncertainty-test-first-12.json").rename(step.folder / "uncertainty-test.json")
        else:
            task = step.words[step.words.index("--task") + 1]
            calls.append((step.folder.name, task))
            evaluate.main([*step.words, "--max_images", "4", "--output", str(step.folder / f"{task}-test.json")])
        return Ended()

    monkeypatch.setattr(jobs, "_start", start)
    return calls


def test_what_is_trained_is_measured_once(recipe, calls, tmp_path):
    result = compare_measures.main([str(recipe)])
    assert calls == [
        (name, task) for name in ("grm-seed0", "grm-seed1", "chan-seed1") for task in ("grounding", "foils", "uncertainty")
    ]
    assert compare_measures.main([str(recipe)]) == result and len(calls) == 9
    shutil.rmtree(tmp_path / "runs")  # the measures need no checkpoint any more
    assert compare_measures.main([str(recipe)]) == result and len(calls) == 9
    assert json.loads((tmp_path / "results" / "measures.json").read_text()) == result
    seeds = {name: run["seeds"]["foils"] for name, run in result["runs"].items()}
    assert seeds == {"grm": [0, 1], "chan": [1]} and all(run["dates"]["foils"] for run in result["runs"].values())


def test_what_was_not_measured_is_left_out(recipe, calls, tmp_path):
    """Of the first seed only how sure it is; a checkpoint that is gone is measured no more."""
    compare_measures.main([str(recipe), "--measures", "uncertainty"])
    assert {task for _, task in calls} == {"uncertainty"} and not (tmp_path / "results" / "grounding.md").exists()
    shutil.rmtree(tmp_path / "runs" / "grm-seed0")
    runs = compare_measures.main([str(recipe)])["runs"]
    assert runs["grm"]["seeds"] == {"grounding": [1], "foils": [1], "uncertainty": [0, 1]}
    assert [len(runs["grm"][figure]) for figure in ("pointing", "foils", "text_to_image")] == [1, 1, 2]
    assert "\n| grm | 1 | " in (tmp_path / "results" / "grounding.md").read_text()
    assert "\n| grm | 2 | " in (tmp_path / "results" / "uncertainty.md").read_text()


def test_the_tables(recipe, calls, tmp_path):
    compare_measures.main([str(recipe)])
    files = [json.loads((tmp_path / "runs" / f"grm-seed{seed}" / "grounding-test.json").read_text()) for seed in (0, 1)]
    accuracy = [file["pointing"]["all"]["accuracy"] for file in files]
    table, densest = (tmp_path / "results" / "grounding.md").read_text().split("\n\n")
    lines = table.splitlines()
    assert lines[2].startswith(f"| grm | 2 | {statistics.mean(accuracy):.1f} ± {statistics.stdev(accuracy):.1f} | ")
    assert lines[3].startswith("| chan | 1 | ") and " | - | - | 0." in lines[3]
    assert lines[5].startswith(f"| image center | - | {files[0]['pointing']['all']['image_center']:.1f} | ")
    of_chan = json.loads((tmp_path / "runs" / "chan-seed1" / "grounding-test.json").read_text())["pointing"]["all"]
    assert densest.splitlines()[3].startswith(f"| chan | 1 | {of_chan['densest']:.1f} |")
    foils = json.loads((tmp_path / "runs" / "chan-seed1" / "foils-test.json").read_text())["foils"]
    preferred, found, before = (tmp_path / "results" / "foils.md").read_text().split("\n\n")
    own = [foils[kind] for kind in foils if kind not in ("all", "swap")]
    replaced = sum(of["found"] * of["number"] for of in own) / sum(of["number"] for of in own)
    assert preferred.splitlines()[3].startswith(f"| chan | 1 | {foils['all']['preferred']:.1f} | ")
    assert found.splitlines()[3].startswith(f"| chan | 1 | {foils['all']['found']:.1f} | {replaced:.1f} | ")
    assert before.splitlines()[3].startswith(f"| chan | 1 | {foils['all']['was_lowest']:.1f} | ")
    assert found.splitlines()[4].startswith(f"| by chance | - | {foils['all']['chance']:.1f} | ")
    sure = json.loads((tmp_path / "runs" / "chan-seed1" / "uncertainty-test.json").read_text())["text_to_image"]
    _, asked_by_text = (tmp_path / "results" / "uncertainty.md").read_text().split("\n\n")
    errors = " | ".join(
        f"{error:.3f}" for error in (*map(sure["softmax"].get, ("ece_before", "ece")), sure["confidence"]["ece"])
    )
    line = asked_by_text.splitlines()[3]
    assert line.startswith(f"| chan | 1 | {sure['r1']:.1f} | {errors} | {sure['answer_sets']['coverage']:.1f} | ")
    margin = sure["is_the_first_wrong"]["margin"]["auroc"]
    assert f" | {margin:.3f} | " in line and " | - | " in line  # CHAN has no standard error
    assert line.endswith(f" | {sure['is_the_first_wrong']['probability']['minus_s_r2']:.2f} | - |")


def test_without_both_kinds_of_foils_none_are_summed_up():
    row = {"preferred": 50.0, "found": 40.0, "was_lowest": 30.0, "chance": 20.0, "number": 5}
    for kind in ("swap", "colour"):
        table = compare_measures.foils_table({"grm": {"foils": [{"all": row, kind: row}]}})
        assert table.splitlines()[0] == f"| true caption higher | seeds | all | {kind} |"


def test_calibration_fits_on_the_split_that_chose_the_epoch(recipe, tmp_path):
    (tmp_path / "base.yaml").write_text("dataset: scenes\nvalidation_split: train\n")
    step = next(compare_measures.missing_steps(Comparison.read(recipe), "grm", 1, ["uncertainty"], None))
    assert step.script == "calibrate" and step.words[step.words.index("--validation_split") + 1] == "train"


def test_an_interrupt_keeps_what_is_measured(recipe, calls, monkeypatch, tmp_path):
    start = jobs._start

    def interrupted(step, cores):
        if step.folder.name == "grm-seed1":
            raise KeyboardInterrupt
        return start(step, cores)

    monkeypatch.setattr(jobs, "_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare_measures.main([str(recipe)])
    runs = json.loads((tmp_path / "results" / "measures.json").read_text())["runs"]
    assert {name: run["seeds"]["uncertainty"] for name, run in runs.items()} == {"grm": [0]}


def test_without_a_run_there_is_nothing_to_compare(recipe, capsys, tmp_path):
    for flag in tmp_path.glob("runs/*/complete"):
        flag.unlink()
    with pytest.raises(SystemExit):
        compare_measures.main([str(recipe)])
    assert "holds no finished run; run python training/compare.py" in capsys.readouterr().err
