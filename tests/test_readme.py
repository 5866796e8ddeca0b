"""Every code block of the README runs, every figure in it comes from a committed file, every file it names exists."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from granalign_hf.training import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
SMALL = ["--num_scenes", "16", "--max_eval_images", "8", "--batch_size", "8", "--report_to", "none"]

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trackers and launchers behind Accelerate


@pytest.fixture(scope="module")
def folder_with_demo(tmp_path_factory):
    """A folder that looks like a checkout after a (very short) demo."""
    folder = tmp_path_factory.mktemp("readme")
    train.main([*SMALL, "--epochs", "1", "--output_dir", str(folder / "runs" / "demo-scenes")])
    for name in ("training", "granalign_hf"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.parametrize("code", [code for kind, code in BLOCKS if kind == "python"], ids=lambda code: code[:30])
def test_python_block_runs(folder_with_demo, code):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder_with_demo, capture_output=True, text=True, env=_offline())
    assert done.returncode == 0, done.stderr[-3000:]


LINES = [line for kind, code in BLOCKS if kind == "bash" for line in code.strip().splitlines()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("accelerate launch")])
def test_command_line_runs(folder_with_demo, line):
    small = ["--max_images", "8"] if "evaluate.py" in line else SMALL
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *shlex.split(line)[1:], *small]
    done = subprocess.run(command, cwd=folder_with_demo, capture_output=True, text=True, env=_offline())
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_make_target_exists(line):
    done = subprocess.run(["make", "--dry-run", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_all_command_lines_are_covered():
    assert LINES and all(line.startswith(("make ", "accelerate launch ")) for line in LINES)


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_figures_of_the_results_table_come_from_files():
    rows = [row for row in README.splitlines() if row.startswith("| [")]
    assert rows
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        card = re.search(r"\((model_cards/[^)]+)\)", cells[0]).group(1)
        result = json.loads((ROOT / card / "metrics-test.json").read_text())
        metrics, (low, high) = result["metrics"], result["intervals"]["rsum"]
        recalls = [f"{metrics[f'{way}_r{k}']:.1f}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
        assert cells[1:7] == recalls, row
        assert cells[7] == f"{metrics['rsum']:.1f} [{low:.1f}, {high:.1f}]", row


def _offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
