"""Every code block of the README runs, every figure in it comes from a committed file, every file it names exists."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import TEXT, VISION, tiny_tokenizer
from transformers import AutoModel, ViTImageProcessorPil

from granalign_hf.card_sections import mean_and_spread
from granalign_hf.training import evaluate
from granalign_hf.training.arguments import parse_arguments
from granalign_hf.training.columns import CAPTION_COLUMNS
from granalign_hf.training.compare import Comparison, published_rsum
from granalign_hf.training.protocols import PROTOCOLS
from granalign_hf.training.scenes import draw_scene

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
ENCODERS = ("google/vit-base-patch16-224", "google-bert/bert-base-uncased")  # as folders, they need no network
SMALL = ["--num_scenes", "16", "--max_eval_images", "8", "--batch_size", "8", "--report_to", "none"]


@pytest.fixture(scope="module")
def folder_with_demo(tmp_path_factory):
    """A folder that looks like a checkout after a (very short) demo."""
    folder = tmp_path_factory.mktemp("readme")
    # In a process of its own: a run sets the precision and the threads of torch.
    command = [sys.executable, "-m", "granalign_hf.training.train", *SMALL, "--epochs", "1"]
    subprocess.run(command, cwd=folder, env=_offline(), check=True, capture_output=True)
    for name in ("training", "granalign_hf"):
        (folder / name).symlink_to(ROOT / name)
    for name, config in ((ENCODERS[0], VISION["vit"]().config), (ENCODERS[1], TEXT["bert"]())):
        AutoModel.from_config(config).save_pretrained(folder / name)
    ViTImageProcessorPil().save_pretrained(folder / ENCODERS[0])
    tiny_tokenizer().save_pretrained(folder / ENCODERS[1])
    draw_scene(np.random.default_rng(0)).image.save(folder / "scene.png")
    (folder / "pictures").symlink_to(ROOT / "model_cards" / "demo-scenes")
    return folder


@pytest.mark.parametrize("code", [code for kind, code in BLOCKS if kind == "python"], ids=lambda code: code[:30])
def test_python_block_runs(folder_with_demo, code):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder_with_demo, capture_output=True, text=True, env=_offline())
    assert done.returncode == 0, done.stderr[-3000:]


LINES = [line for kind, code in BLOCKS if kind == "bash" for line in code.strip().splitlines()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("accelerate launch")])
def test_command_line_runs(folder_with_demo, line):
    small = SMALL if "train.py" in line else ["--max_images", "12"]
    run_line(folder_with_demo, ["accelerate.commands.accelerate_cli", *shlex.split(line)[1:], *small])


ON_OTHER_DATA = [line for kind, code in BLOCKS if kind == "shell" for line in code.strip().splitlines()]


@pytest.mark.parametrize("line", ON_OTHER_DATA)
def test_command_on_data_that_are_not_here_is_accepted(line, monkeypatch):
    script, *words = line.removeprefix("accelerate launch ").removeprefix("python ").split()
    monkeypatch.chdir(ROOT)
    if script == "training/train.py":
        parse_arguments(words)
    elif script == "training/evaluate.py":
        _parser, args, checkpoint = evaluate.parse_arguments(words)
        assert checkpoint == words[0] and args.protocol in PROTOCOLS
    else:
        assert script == "training/compare.py" and len(Comparison.read(Path(*words)).runs) == 8


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("granalign ")])
def test_command_runs(folder_with_demo, line):
    run_line(folder_with_demo, ["granalign_hf.cli", *shlex.split(line)[1:]])


def run_line(folder, words):
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=_offline())
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_make_target_exists(line):
    done = subprocess.run(["make", "--dry-run", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_all_command_lines_are_covered():
    install = ["git clone ADDRESS granalign && cd granalign", ". .venv/bin/activate"]
    assert LINES and all(
        line.startswith(("make ", "accelerate launch ", "granalign ")) for line in LINES if line not in install
    )


@pytest.mark.parametrize("recipe", [code for kind, code in BLOCKS if kind == "yaml"])
def test_recipe_is_accepted(tmp_path, recipe):
    (tmp_path / "recipe.yaml").write_text(recipe)
    run = parse_arguments([str(tmp_path / "recipe.yaml")])[0]
    assert (run.vision_encoder, run.text_encoder) == ENCODERS
    assert (run.train_split, run.validation_split) == ("train", "validation")


def test_caption_columns_are_those_that_are_found():
    listed = re.search(r"it is called (.*?); any other", " ".join(README.split())).group(1)
    assert tuple(re.findall(r"`(\w+)`", listed)) == CAPTION_COLUMNS


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


TITLES = {  # the runs of a comparison as the results tables call them
    "compare-flickr8k-frozen": {
        "vse-max": "[VSE++, max pooling](model_cards/flickr8k-frozen-vse-max)",
        "max-mean": "bidirectional maximum",
        "grm": "[GRM](model_cards/flickr8k-frozen-grm)",
        "grm-paper-scale": "GRM, region logits as in the paper",
        "chan": "[CHAN](model_cards/flickr8k-frozen-chan)",
        "scan": "SCAN",
        "vse-mean": "VSE++, average pooling",
        "laps": "LAPS",
        "grm-budget": "GRM with a budget for patches (not in the paper)",
    },
    "compare-flickr8k": {
        "vse-max": "VSE++, max pooling",
        "grm": "[GRM](model_cards/flickr8k-vit-tiny)",
        "chan": "CHAN",
    },
}


@pytest.mark.parametrize("comparison", TITLES)
def test_figures_of_the_results_tables_come_from_files(comparison):
    runs = json.loads((ROOT / "training" / "results" / comparison / "results.json").read_text())["runs"]
    assert runs.keys() == TITLES[comparison].keys()
    for name, title in TITLES[comparison].items():
        figures = [runs[name][column] for column in ("image_to_text_r1", "text_to_image_r1", "rsum")]
        row = [title, str(len(figures[0])), *map(mean_and_spread, figures)]
        assert "| " + " | ".join(row) + " |" in README


DEMO, FROZEN, TUNED = "demo-scenes", "flickr8k-frozen-grm", "flickr8k-vit-tiny"
PROSE = [  # the sentence with its figure in brackets, the file, the keys in it
    (r"split, ([\d,]+) test photographs", f"{TUNED}/metrics-test.json", "num_images"),
    (r"test photographs with ([\d,]+) captions", f"{TUNED}/metrics-test.json", "num_captions"),
    (r"mean patch saliency on validation is ([\d.]+),", f"{FROZEN}/metrics.json", "diagnostics patch_saliency_mean"),
    (r"mean word saliency ([\d.]+),", f"{FROZEN}/metrics.json", "diagnostics word_saliency_mean"),
    (r"saliency is idle too, ([\d.]+) in the mean", f"{DEMO}/metrics.json", "diagnostics patch_saliency_mean"),
    (r"saliency is idle too, ([\d.]+) in the mean", f"{DEMO}/metrics.json", "diagnostics word_saliency_mean"),
    (r"regions differ, with a mean cosine of ([\d.]+\d)", f"{DEMO}/metrics.json", "diagnostics region_mean_cosine"),
    (r"training took ([\d.]+) hours", f"{DEMO}/metrics.json", "hours"),
    (r"([\d.]+) and [\d.]+ hours on one CPU core", f"{TUNED}/metrics.json", "started_from hours"),
    (r"[\d.]+ and ([\d.]+) hours on one CPU core", f"{TUNED}/metrics.json", "hours"),
    (r"on ([\d,]+) unseen scenes", f"{DEMO}/metrics-demo.json", "num_images"),
    (r"scenes: rSum ([\d.]+) of 600", f"{DEMO}/metrics-demo.json", "metrics rsum"),
    (r"([\d.]+) % of [\d,]+ words point", f"{DEMO}/metrics-demo.json", "pointing accuracy"),
    (r"% of ([\d,]+) words point", f"{DEMO}/metrics-demo.json", "pointing words"),
    (r"\(a random patch: ([\d.]+) %\)", f"{DEMO}/metrics-demo.json", "pointing random_patch"),
]


@pytest.mark.parametrize(("sentence", "file", "keys"), PROSE, ids=[f"{file}-{keys}" for _, file, keys in PROSE])
def test_figures_of_the_prose_come_from_files(sentence, file, keys):
    value = _measured(file, keys)
    (told,) = re.findall(sentence, " ".join(README.split()))
    assert told == f"{value:,.{len(told.partition('.')[2])}f}"


def test_differences_of_the_prose_come_from_files():
    result = json.loads((ROOT / "training" / "results" / "compare-flickr8k-frozen" / "results.json").read_text())
    runs = result["runs"]
    measures = json.loads((ROOT / "training" / "results" / "compare-flickr8k-frozen" / "measures.json").read_text())["runs"]
    grm, rsum = runs["grm"], {name: sum(run["rsum"]) / len(run["rsum"]) for name, run in runs.items()}
    prose = " ".join(README.split())
    above, below, to_floor = (grm[f"minus {name}"] for name in ("chan", "vse-max", "max-mean"))
    assert f"{above['difference']:.1f} rSum above CHAN and {-below['difference']:.1f} below max-pooled VSE++" in prose
    assert f"(p = {above['p_value']:.3f} and {below['p_value']:.3f} by paired bootstrap" in prose
    assert f"over three seeds, GRM is {above['difference']:.1f}" in prose and len(grm["rsum"]) == 3
    floor = f"reaches {rsum['max-mean']:.1f} ({to_floor['difference']:+.1f}, p = {to_floor['p_value']:.3f};"
    assert floor in prose and to_floor["p_value"] > 0.05
    assert f"average-pooled image: rSum {rsum['grm-paper-scale']:.1f}." in prose
    scaled = grm["minus grm-paper-scale"]
    assert (
        f"two regions of an image is {grm['diagnostics']['region_mean_cosine']:.3f}, and rSum {scaled['difference']:.1f} "
        f"higher, which may be chance (p = {scaled['p_value']:.3f})"
    ) in prose
    above_others = [rsum["grm"] - rsum[name] for name in ("vse-mean", "scan", "laps")]
    assert "{:.1f} above average pooling, {:.1f} above SCAN, {:.1f} above LAPS".format(*above_others) in prose
    printed = published_rsum("flickr30k-1k", "ViT-B-224", {n: n for n in ("GRM", "VSE++", "SCAN", "LAPS", "CHAN")})
    gaps = [printed["GRM"] - printed[name] for name in ("VSE++", "SCAN", "LAPS", "CHAN")]
    assert "{:.1f} above VSE++, {:.1f}, {:.1f}, and {:.1f} above CHAN)".format(*gaps) in prose
    points = measures["grm-paper-scale"]["pointing"][0]["all"]
    pointed = f"finds {points['densest']:.1f} % of {points['num_phrases']:,} phrases (the centre of the image: "
    assert f"{pointed}{points['image_center']:.1f})" in prose
    lost = grm["rsum"][0] - runs["grm-budget"]["rsum"][0]
    told, before = (measures[name]["auroc"][0]["patch_saliency"]["mean"] for name in ("grm-budget", "grm"))
    assert f"(AUROC {told:.2f} instead of {before:.2f}), for {lost:.1f} rSum less with the same seed" in prose
    tuned = json.loads((ROOT / "training" / "results" / "compare-flickr8k" / "results.json").read_text())["runs"]["grm"]
    below, above = tuned["minus vse-max"], tuned["minus chan"]
    assert f"GRM is {-below['difference']:.1f} below max-pooled VSE++ (p = {below['p_value']:.3f})" in prose
    assert f"and {above['difference']:.1f} above CHAN (p = {above['p_value']:.3f})" in prose
    for name in ("grm", "chan", "vse-max"):
        place = result["seeds"].index(_measured(f"flickr8k-frozen-{name}/metrics.json", "seed"))
        assert _measured(f"flickr8k-frozen-{name}/metrics-test.json", "metrics rsum") == runs[name]["rsum"][place]


def test_figures_of_the_clutter_come_from_files():
    measured = json.loads((ROOT / "training" / "results" / "compare-scenes" / "clutter.json").read_text())
    place = measured["distractors"].index(4)
    rsum = {name: f"{run['rsum'][place][0]:.1f}" for name, run in measured["runs"].items()}
    told = f"GRM has rSum {rsum['grm']} in galleries of 100, max-pooled VSE++ {rsum['vse-max']} and CHAN {rsum['chan']} (one"
    assert told in " ".join(README.split())


def test_figures_of_the_search_come_from_files():
    measured = json.loads((ROOT / "training" / "results" / "search" / "search.json").read_text())["grm-seed1"]
    run, curve = measured["run"], {row["stored"]: row for row in measured["curve"]}
    both, exact, none = measured["two_stages"]["rsum"], measured["exact"]["rsum"], curve["first stage alone"]
    prose = " ".join(README.split())
    for told in (
        f"on the {measured['num_images']:,} test photographs of Flickr8k",
        f"and {measured['hardware'].split(' (')[0]}: indexed in {run['index_seconds']:.0f} seconds",
        f"{run['bytes_on_disk'] / 1e6:.0f} MB on the disk, {run['search_ms']:.0f} ms a search",
        f"rSum {both:.1f}, where the exact score of all pairs gives {exact:.1f}",
        f"8 bits ({curve['int8']['bytes'] / 1000:.0f} KB a photograph in all)",
        f"without tokens ({none['bytes'] / 1000:.0f} KB) rSum is {none['rsum']:.1f}",
    ):
        assert told in prose, told
    rows = json.loads((ROOT / "tests" / "benchmarks" / "retrieval.json").read_text())["searching"]["rows"]
    faster = {row["search"]: row["two stages are faster by"] for row in rows}
    assert f"a search is {faster['exact']:.0f} times as fast as the exact score of all from the disk" in prose
    assert f"{faster['kernel alone']:.1f} times as fast as the kernel alone" in prose


def test_figures_of_the_graphs_come_from_files():
    folder = ROOT / "training" / "results" / "export"
    whole, small = (json.loads((folder / f"grm-seed1-{kind}.json").read_text())["metrics"] for kind in ("float", "int8"))
    assert f"falls from rSum {whole['rsum']:.1f} to {small['rsum']:.1f}" in " ".join(README.split())


def _measured(file: str, keys: str) -> float:
    value = json.loads((ROOT / "model_cards" / file).read_text())
    for key in keys.split():
        value = value[key]
    return value


def _offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
