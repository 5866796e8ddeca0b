"""Where the words of each run of a comparison point, and whether a wrong word is noticed: grounding and foils side by side.

    python training/compare_grounding.py training/recipes/compare-flickr8k-frozen.yaml [--phrase_boxes NAME] [--jobs 2]

Reads the checkpoints that compare.py has trained, as far as they are there, and calls evaluate.py for each; started again,
it goes on where it stopped. Writes grounding.md, foils.md and grounding.json beside the results of the comparison.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from granalign_hf.card_sections import mean_and_spread
from granalign_hf.training.compare import Comparison, data_words, markdown_table, run_folder
from granalign_hf.training.jobs import Step, finish
from granalign_hf.training.pointing import BASELINES
from granalign_hf.training.runtime import available_cores, hardware, portable

TASKS = ("grounding", "foils")
AREAS = ("patch_saliency", "word_saliency", "content_words")


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="Grounding and foils of the runs of a comparison.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--phrase_boxes", help="As in evaluate.py.")
    parser.add_argument("--jobs", type=int, default=1, help="Evaluations at a time; each has its share of the cores.")
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.jobs <= len(available_cores()):
        parser.error(f"--jobs must lie in 1..{len(available_cores())}, the number of cores, got {arguments.jobs}")
    comparison = Comparison.read(arguments.recipe)
    runs = [
        (seed, name)
        for seed in sorted(comparison.seeds)
        for name in comparison.runs
        if (run_folder(comparison, name, seed) / "complete").is_file()
    ]
    if not runs:
        parser.error(
            f"{comparison.output_dir} holds no finished run; run python training/compare.py {arguments.recipe} first"
        )
    work = [(run, missing_steps(comparison, run[1], run[0], arguments.phrase_boxes)) for run in runs]
    command = portable(shlex.join(["python", "training/compare_grounding.py", *argv]))
    finished: list[tuple[int, str]] = []
    for seed, name in finish(work, arguments.jobs):
        print(f"--- {name}, seed {seed}: done", flush=True)
        finished.append((seed, name))
        result = write_results(comparison, finished, command)
    for task in TASKS:
        print((Path(comparison.results_dir) / f"{task}.md").read_text())
    return result


def write_results(comparison: Comparison, finished: list[tuple[int, str]], command: str) -> dict:
    """grounding.json, grounding.md and foils.md of the runs (seed, name) that are measured."""
    names = {name for _, name in finished}
    result = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "split": comparison.split,
        "runs": {name: _measured(comparison, name, finished) for name in comparison.runs if name in names},
    }
    folder = Path(comparison.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grounding.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "grounding.md").write_text(grounding_table(result["runs"]))
    (folder / "foils.md").write_text(foils_table(result["runs"]))
    return result


def missing_steps(comparison: Comparison, name: str, seed: int, phrase_boxes: str | None) -> Iterator[Step]:
    """The evaluations of a run that are not there yet.

    Raises:
        ValueError: the folder holds a run of other settings.
    """
    folder, data = run_folder(comparison, name, seed), data_words(comparison, name, seed)
    for task in TASKS:
        if not (folder / f"{task}-{comparison.split}.json").is_file():
            boxes = [] if phrase_boxes is None else ["--phrase_boxes", phrase_boxes]
            yield Step("evaluate", [str(folder), *data, "--task", task, *boxes], folder)


def _measured(comparison: Comparison, name: str, runs: list[tuple[int, str]]) -> dict[str, Any]:
    seeds = [seed for seed, of in runs if of == name]
    measured: dict[str, Any] = {"seeds": seeds}
    for task, figures in (("grounding", ("pointing", "corner_share", "auroc")), ("foils", ("foils",))):
        files = [run_folder(comparison, name, seed) / f"{task}-{comparison.split}.json" for seed in seeds]
        measured |= {figure: [json.loads(file.read_text())[figure] for file in files] for figure in figures}
    return measured


def grounding_table(runs: dict[str, dict]) -> str:
    """Markdown: pointing accuracy in percent of all phrases and of each type, the baselines in the last rows; AUROCs."""
    groups = list(next(iter(runs.values()))["pointing"][0])
    lines = [
        [
            "run",
            "seeds",
            *groups,
            "without corners",
            "at a corner",
            *(f"AUROC of {name}".replace("_", " ") for name in AREAS),
        ]
    ]
    for name, run in runs.items():
        pointing = [mean_and_spread([of_seed[group]["accuracy"] for of_seed in run["pointing"]]) for group in groups]
        middle = mean_and_spread([of_seed["all"]["without_corners"] for of_seed in run["pointing"]])
        lines.append([name, str(len(run["seeds"])), *pointing, middle, mean_and_spread(run["corner_share"])])
        for area in AREAS:
            means = [of_seed[area]["mean"] for of_seed in run["auroc"] if area in of_seed]
            lines[-1].append(f"{sum(means) / len(means):.2f}" if means else "-")
    known = next(iter(runs.values()))["pointing"][0]
    for baseline in BASELINES:
        figures = [f"{known[group][baseline]:.1f}" for group in groups]
        lines.append([baseline.replace("_", " "), "-", *figures, *["-"] * (2 + len(AREAS))])
    return markdown_table(lines)


def foils_table(runs: dict[str, dict]) -> str:
    """Markdown: how often the true caption scores higher, and how often the edited word has the lowest share, in percent."""
    kinds, chance = list(next(iter(runs.values()))["foils"][0]), next(iter(runs.values()))["foils"][0]
    tables = []
    for figure, title in (("preferred", "true caption higher"), ("found", "edited word lowest")):
        lines = [[title, "seeds", *kinds]]
        for name, run in runs.items():
            figures = [mean_and_spread([of_seed[kind][figure] for of_seed in run["foils"]]) for kind in kinds]
            lines.append([name, str(len(run["seeds"])), *figures])
        of_chance = [f"{chance[kind]['chance']:.1f}" if figure == "found" else "50.0" for kind in kinds]
        tables.append(markdown_table([*lines, ["by chance", "-", *of_chance]]))
    return "\n".join(tables)


if __name__ == "__main__":
    main()
