"""The comparison of several runs: what it trains, what it skips, and the figures that it writes."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from granalign_hf.evaluation import RetrievalRanks, paired_bootstrap, paired_bootstrap_of_runs, ranks_to_metrics
from granalign_hf.training import compare
from granalign_hf.training import jobs as jobs_module

PROTOCOLS = ("flickr30k-1k", "coco-1k-5fold", "coco-5k")
INDEX = np.repeat(np.arange(40), 2)
RECORD = {"hours": 0.25, "date": "2026-02-03", "hardware": "1 CPU core (x86_64)"}


def draw_ranks(seed, best=12):
    rng = np.random.default_rng(seed)
    return RetrievalRanks(rng.integers(1, best, 40), rng.integers(1, best, 80), INDEX)


@pytest.fixture
def recipe(tmp_path):
    content = {
        "base": "base.yaml",
        "output_dir": str(tmp_path / "runs"),
        "results_dir": str(tmp_path / "results"),
        "split": "test",
        "seeds": [0, 1],
        "baselines": ["plain"],
        "diagnostics": ["region_mean_cosine"],
        "runs": {"plain": {"aligner": "max_mean"}, "grm": {"level_weights": [0.5, 0.3, 0.2]}},
    }
    (tmp_path / "base.yaml").write_text(
        "dataset: somewhere\nsplit_column: part\nepochs: 3\nvision_encoder: a\ntext_encoder: b\n"
    )
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the two scripts: notes how they are called and leaves the files that they leave."""
    calls = []

    def start(step, cores):
        calls.append([step.script, *step.words])
        leave_files(step)
        return Ended()

    monkeypatch.setattr(jobs_module, "_start", start)
    monkeypatch.setattr(jobs_module, "POLL_SECONDS", 0)
    return calls


class Ended:
    """A process that has done its work."""

    returncode = 0

    def poll(self):
        return self.returncode


def leave_files(step):
    is_grm = "grm" in step.folder.name
    diagnostics = {"region_mean_cosine": 0.5} if is_grm else {}
    (step.folder / "config.json").write_text(json.dumps({"model_type": "granalign", "aligner": "grm"}))
    (step.folder / "metrics.json").write_text(json.dumps(RECORD | {"diagnostics": diagnostics}))
    if step.script == "evaluate":
        ranks = draw_ranks(sum(str(step.folder).encode()), best=6 if is_grm else 12)
        np.savez(step.folder / "ranks-test.npz", **vars(ranks))


def test_a_comparison_trains_each_run_with_each_seed_once(recipe, calls, tmp_path, capsys):
    result = compare.main([str(recipe)])
    trained = [call for call in calls if call[0] == "train"]
    assert [Path(call[call.index("--output_dir") + 1]).name for call in trained] == [
        "plain-seed0", "grm-seed0", "plain-seed1", "grm-seed1"
    ]  # fmt: skip
    assert trained[1][1:7] == [str(tmp_path / "base.yaml"), "--level_weights", "0.5", "0.3", "0.2", "--seed"]
    ranks = {
        name: [compare.read_ranks(tmp_path / "runs" / f"{name}-seed{seed}" / "ranks-test.npz") for seed in (0, 1)]
        for name in ("plain", "grm")
    }
    evaluated = [call for call in calls if call[0] == "evaluate"]
    assert evaluated[0][2:] == ["--dataset", "somewhere", "--split_column", "part", "--split", "test"]
    row = result["runs"]["grm"]
    assert row["rsum"] == [ranks_to_metrics(r)["rsum"] for r in ranks["grm"]]
    assert row["minus plain"] == paired_bootstrap_of_runs(ranks["grm"], ranks["plain"])["rsum"]._asdict()
    assert "minus plain" not in result["runs"]["plain"] and row["diagnostics"] == {"region_mean_cosine": 0.5}
    lines = (tmp_path / "results" / "table.md").read_text().splitlines()
    assert f"| grm | 2 | {np.mean(row['rsum']):.1f} ± {np.std(row['rsum'], ddof=1):.1f} |" in lines[3]
    assert lines[2].endswith("| - | - |") and lines[3].endswith("| 0.500 |")
    assert len({line.count("|") for line in lines}) == 1
    assert (tmp_path / "results" / "results.png").stat().st_size > 0
    card = (tmp_path / "runs" / "grm-seed1" / "README.md").read_text().partition("## Beside other aligners")[2]
    assert f"| **grm** | 2 | {np.mean(row['rsum']):.1f} ± {np.std(row['rsum'], ddof=1):.1f} |" in card
    assert "| plain | 2 | " in card and "On somewhere, split test" in card
    assert (result["date"], result["hardware"]) == (RECORD["date"], RECORD["hardware"])  # not those of this call
    calls.clear()
    shutil.rmtree(tmp_path / "runs")  # the records beside the results are enough
    assert compare.main([str(recipe)])["runs"] == result["runs"] and calls == []


def test_an_interrupted_comparison_goes_on(recipe, calls, monkeypatch, tmp_path):
    start, stopped = jobs_module._start, []

    def interrupted(step, cores):
        if step.script == "train" and step.folder.name == "grm-seed0" and not stopped:
            (step.folder / "state" / "epoch-1").mkdir(parents=True)
            (step.folder / "state" / "epoch-1" / "progress.json").touch()
            stopped.append(step.words)
            raise KeyboardInterrupt
        return start(step, cores)

    monkeypatch.setattr(jobs_module, "_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare.main([str(recipe)])
    assert list(json.loads((tmp_path / "results" / "results.json").read_text())["runs"]) == ["plain"]
    compare.main([str(recipe)])
    resumed = [call for call in calls if "--resume" in call]
    assert [call[1:-2] for call in resumed] == stopped


@pytest.mark.parametrize(
    ("file", "old", "new"), [("compare.yaml", "max_mean", "chan"), ("base.yaml", "where", "where else")]
)
def test_a_folder_of_other_settings_is_refused(recipe, calls, tmp_path, capsys, file, old, new):
    compare.main([str(recipe)])
    changed = recipe.parent / file
    changed.write_text(changed.read_text().replace(old, new))
    told = r"plain-seed0 holds a run of other settings (.|\n)*Delete it, or change `output_dir`"
    refuses(recipe, capsys, told)
    shutil.rmtree(tmp_path / "runs")
    refuses(recipe, capsys, r"results.runs.plain-seed0 holds a run of other settings (.|\n)*, or change `results_dir`")


def refuses(recipe, capsys, told):
    with pytest.raises(SystemExit):
        compare.main([str(recipe)])
    assert re.search(told, capsys.readouterr().err)


def test_a_seed_before_those_that_are_recorded_is_trained(recipe, calls):
    compare.main([str(recipe)])
    calls.clear()
    recipe.write_text(recipe.read_text().replace("seeds:\n- 0\n", "seeds:\n- 7\n- 0\n"))
    result = compare.main([str(recipe)])
    assert [call[0] for call in calls] == ["train", "evaluate"] * 2 and len(result["runs"]["grm"]["rsum"]) == 3


def test_a_record_holds_wherever_its_data_lie(recipe, calls, tmp_path):
    compare.main([str(recipe)])
    shutil.rmtree(tmp_path / "runs")
    calls.clear()
    base = recipe.parent / "base.yaml"
    base.write_text(base.read_text().replace("dataset: somewhere", "dataset: /elsewhere/somewhere"))
    compare.main([str(recipe)])
    assert calls == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds:", "seed:", "must have exactly the fields"),
        ("- plain", "- vse", r"`baselines` of .* names \['vse'\], which are not among `runs`: \['plain', 'grm'\]"),
        ("seeds:\n- 0\n- 1", "seeds: 0", r"`seeds` of .* must be a list such as \[0, 1, 2\], got 0"),
        ("    aligner: max_mean\n", "", r"`runs` of .*; wrong are \['plain'\]"),
        ("aligner: max_mean", "aligner: null", r"`runs` of .*; wrong are \['plain'\]"),
        ("base.yaml", "bass.yaml", r"`base` of .* names .*bass.yaml, which does not exist"),
        ("split: test", "split: [", r"The recipe .* cannot be read"),
        ("split: test", "split: test\npublished: {protocol: coco-5k, backbone: ViT, methods: {}}", "'ViT' stands not in"),
        ("level_weights", "level_weight", r"unknown fields .*level_weight(.|\n)*the run grm has these settings"),
    ],
)
def test_a_bad_recipe_is_named_before_anything_is_trained(recipe, calls, capsys, old, new, message):
    content = recipe.read_text()
    assert old in content
    recipe.write_text(content.replace(old, new))
    refuses(recipe, capsys, message)
    assert calls == []


def test_one_run_each_is_the_paired_bootstrap():
    first, second = draw_ranks(0), draw_ranks(1)
    assert paired_bootstrap_of_runs([first], [second]) == paired_bootstrap(first, second)


def test_several_runs_count_their_own_spread():
    """Runs that differ from each other widen the interval, equal ones do not; the difference is that of the means."""
    alike = paired_bootstrap_of_runs([draw_ranks(0)] * 3, [draw_ranks(1)] * 3)["rsum"]
    assert alike == paired_bootstrap(draw_ranks(0), draw_ranks(1))["rsum"]
    first, second = [draw_ranks(s, best) for s, best in ((0, 6), (1, 12), (2, 24))], [draw_ranks(3)] * 3
    apart = paired_bootstrap_of_runs(first, second)["rsum"]
    means = [np.mean([ranks_to_metrics(r)["rsum"] for r in runs]) for runs in (first, second)]
    assert apart.difference == pytest.approx(means[0] - means[1])
    assert apart.high - apart.low > 1.5 * (alike.high - alike.low)
    assert paired_bootstrap_of_runs(second, first)["rsum"].difference == pytest.approx(-apart.difference)


def test_runs_on_other_captions_are_refused():
    other = RetrievalRanks(np.ones(40, int), np.ones(80, int), INDEX[::-1].copy())
    with pytest.raises(ValueError, match="All runs must rank the same images and captions"):
        paired_bootstrap_of_runs([draw_ranks(0)], [other])


def test_the_published_figures_stand_beside_ours(recipe, calls, tmp_path):
    published = {"protocol": "flickr30k-1k", "backbone": "ViT-B-224", "methods": {"grm": "GRM"}}
    recipe.write_text(recipe.read_text() + yaml.safe_dump({"published": published}))
    assert compare.main([str(recipe)])["runs"]["grm"]["published"] == 516.2
    lines = (tmp_path / "results" / "table.md").read_text().splitlines()
    assert [line.rsplit("|", 2)[1].strip() for line in lines] == ["published rSum", "---", "-", "516.2"]


def test_published_figures_are_whole():
    """Every method has each backbone and protocol, and harder protocols have lower figures."""
    tables = {
        (protocol, backbone): compare.published_rsum(
            protocol, backbone, {name: name for name in ("SCAN", "VSE++", "CHAN", "GRM")}
        )
        for protocol in PROTOCOLS
        for backbone in ("ViT-B-224", "ViT-B-384", "Swin-B-224", "Swin-B-384")
    }
    regions = [compare.published_rsum(p, "Regions-BERT", {"vse": "VSE++", "chan": "CHAN"}) for p in PROTOCOLS]
    assert regions[0] == {"vse": 513.5, "chan": 518.5} and all(rsum["chan"] > rsum["vse"] for rsum in regions)
    for (protocol, backbone), rsum in tables.items():
        assert max(rsum, key=rsum.get) == "GRM"
        if protocol == "coco-5k":
            assert all(value < tables["coco-1k-5fold", backbone][name] for name, value in rsum.items())


@pytest.fixture
def real_processes(monkeypatch, tmp_path):
    """Real processes that run a small script in the place of train.py and evaluate.py, with the folder as its last word."""
    script, popen = tmp_path / "script.py", jobs_module.subprocess.Popen

    def start(command, **options):
        folder = command[command.index("--output_dir") + 1] if "--output_dir" in command else command[3]
        return popen([sys.executable, str(script), command[2].rpartition(".")[2], folder], **options)

    monkeypatch.setattr(jobs_module.subprocess, "Popen", start)
    np.savez(tmp_path / "ranks.npz", **vars(draw_ranks(0)))
    head = (
        "import json, os, pathlib, shutil, sys, time\n"
        "script, folder = sys.argv[1], pathlib.Path(sys.argv[2])\n"
        f"(folder / 'metrics.json').write_text(json.dumps({RECORD | {'diagnostics': {}}}))\n"
        f"shutil.copy({str(tmp_path / 'ranks.npz')!r}, folder / 'ranks-test.npz')\n"
    )
    return lambda body: script.write_text(head + body)


def test_jobs_run_side_by_side_on_their_own_cores(recipe, real_processes, tmp_path):
    """Each process notes its cores and waits until the other one runs too."""
    if len(compare.available_cores()) < 2:
        pytest.skip("needs two cores")
    real_processes(
        "time.sleep(0.5)\n"  # it is pinned right after its start
        "(folder / 'cores').write_text(' '.join(map(str, sorted(os.sched_getaffinity(0)))))\n"
        "others = [folder.with_name(f'{name}-seed0') / 'cores' for name in ('plain', 'grm')]\n"
        "while not all(other.is_file() for other in others): time.sleep(0.01)\n"
        "print('trained')\n"
    )
    compare.main([str(recipe), "--jobs", "2"])
    used = [(tmp_path / "runs" / f"{name}-seed0" / "cores").read_text().split() for name in ("plain", "grm")]
    assert all(used) and not {*used[0]} & {*used[1]}
    assert (tmp_path / "runs" / "grm-seed1" / "train.log").read_text() == "trained\n"


def test_a_failed_run_ends_the_others_and_is_named(recipe, real_processes, tmp_path):
    real_processes("time.sleep(0.3 if folder.name.startswith('plain') else 60)\nsys.exit('out of luck')\n")
    jobs = str(min(2, len(compare.available_cores())))
    with pytest.raises(RuntimeError, match=r"train of .*plain-seed0 failed with exit status 1") as caught:
        compare.main([str(recipe), "--jobs", jobs])
    if jobs == "2":
        log = Path(str(caught.value).rpartition("see ")[2])
        assert log.read_text() == "out of luck\n"
        assert not (tmp_path / "runs" / "grm-seed0" / "complete").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process(recipe, real_processes, monkeypatch, tmp_path, number):
    real_processes("(folder / 'started').touch()\ntime.sleep(60)\n")
    started, sleep = tmp_path / "runs" / "plain-seed0" / "started", jobs_module.time.sleep
    processes, start = [], jobs_module._start

    def sleep_until_it_runs(seconds):
        sleep(seconds)
        if started.exists():
            os.kill(os.getpid(), number)

    monkeypatch.setattr(jobs_module.time, "sleep", sleep_until_it_runs)
    monkeypatch.setattr(jobs_module, "_start", lambda *args: processes.append(start(*args)) or processes[-1])
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        compare.main([str(recipe)])
    assert caught.type is KeyboardInterrupt or caught.value.code == 128 + number
    assert [process.returncode for process in processes] == [-15]


@pytest.mark.parametrize("jobs", ["0", "1000000"])
def test_a_bad_number_of_jobs_is_refused(recipe, jobs, capsys):
    with pytest.raises(SystemExit):
        compare.main([str(recipe), "--jobs", jobs])
    assert "--jobs: must lie in 1.." in capsys.readouterr().err
