"""What else is measured of each run of a comparison, side by side: grounding, foils and uncertainty.

    python training/compare_measures.py training/recipes/compare-flickr8k-frozen.yaml [--phrase_boxes NAME] [--jobs 2]

Reads the checkpoints that compare.py has trained, as far as they are there, and calls evaluate.py and calibrate.py for each;
started again, it goes on where it stopped. What was measured stays beside the results of the comparison, in `runs`, where it
needs no checkpoint any more; grounding.md, foils.md, uncertainty.md and measures.json have it all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from granalign_hf.calibration import WAYS
from granalign_hf.card_sections import BASELINES, FOIL_FIGURES, mean_and_spread
from granalign_hf.training.compare import (
    Comparison,
    add_jobs,
    data_words,
    keep,
    markdown_table,
    read_comparison,
    record_folder,
    run_folder,
    run_settings,
)
from granalign_hf.training.jobs import Step, finish
from granalign_hf.training.parser import as_words
from granalign_hf.whole_files import write_whole

# What is measured -> its figures.
MEASURES = {"grounding": ("pointing", "corner_share", "auroc"), "foils": ("foils",), "uncertainty": WAYS}
AREAS = ("patch_saliency", "word_saliency", "content_words")
DOUBTS = ("margin", "probability", "entropy", "standard_error", "image_entropy", "caption_length")
OF_LEVELS = ("probability", "standard_error")  # whose -S R^2 is shown


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="Grounding, foils and uncertainty of the runs of a comparison.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--phrase_boxes", help="As in evaluate.py.")
    parser.add_argument("--measures", nargs="+", choices=[*MEASURES], default=[*MEASURES], help="Default: all of them.")
    add_jobs(parser, "Evaluations")
    arguments = parser.parse_args(argv)
    comparison = read_comparison(parser, arguments.recipe)
    runs = [
        (seed, name)
        for seed in sorted(comparison.seeds)
        for name in comparison.runs
        if is_trained(comparison, name, seed) or any(file.is_file() for file in records(comparison, name, seed).values())
    ]
    if not runs:
        parser.error(
            f"{comparison.output_dir} holds no finished run; run python training/compare.py {arguments.recipe} first"
        )
    measures = [measure for measure in measures_of(comparison) if measure in arguments.measures]
    work = [(run, missing_steps(comparison, run[1], run[0], measures, arguments.phrase_boxes)) for run in runs]
    finished: list[tuple[int, str]] = []
    for seed, name in finish(work, arguments.jobs):
        print(f"--- {name}, seed {seed}: done", flush=True)
        finished.append((seed, name))
        result = write_results(comparison, finished)
    for table in tables(result["runs"]).values():
        print(table)
    return result


def measures_of(comparison: Comparison) -> list[str]:
    """On the validation split no uncertainty, which is fitted there."""
    return [measure for measure in MEASURES if measure != "uncertainty" or comparison.split != "validation"]


def is_trained(comparison: Comparison, name: str, seed: int) -> bool:
    """Whether the checkpoint is there."""
    return (run_folder(comparison, name, seed) / "complete").is_file()


def records(comparison: Comparison, name: str, seed: int) -> dict[str, Path]:
    """Measure -> where its file stays, whether it is there or not."""
    folder = record_folder(comparison, name, seed)
    return {measure: folder / f"{measure}-{comparison.split}.json" for measure in measures_of(comparison)}


def write_results(comparison: Comparison, finished: list[tuple[int, str]]) -> dict:
    """measures.json and the tables of the runs (seed, name), as far as they are measured."""
    names = {name for _, name in finished}
    result = {
        "split": comparison.split,
        "runs": {name: _measured(comparison, name, finished) for name in comparison.runs if name in names},
    }
    folder = Path(comparison.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "measures.json", json.dumps(result, indent=1) + "\n")
    for measure, table in tables(result["runs"]).items():
        write_whole(folder / f"{measure}.md", table)
    return result


def missing_steps(
    comparison: Comparison, name: str, seed: int, measures: list[str], phrase_boxes: str | None
) -> Iterator[Step]:
    """The measurements of a run that are not there yet.

    Raises:
        ValueError: the folder holds a run of other settings.
    """
    folder, data = run_folder(comparison, name, seed), data_words(comparison, name, seed)
    fitted_on = {"validation_split": run_settings(comparison, name, seed).get("validation_split")}
    boxes = [] if phrase_boxes is None else ["--phrase_boxes", phrase_boxes]
    for measure in measures:
        record = records(comparison, name, seed)[measure]
        if record.is_file() or not is_trained(comparison, name, seed):
            continue
        if not (folder / record.name).is_file():
            if measure == "uncertainty":
                yield Step("calibrate", [str(folder), *data, *as_words(fitted_on)], folder)
            else:
                yield Step("evaluate", [str(folder), *data, "--task", measure, *boxes], folder)
        keep(folder / record.name, record.parent)


def _measured(comparison: Comparison, name: str, runs: list[tuple[int, str]]) -> dict[str, Any]:
    """Of each measure the seeds and the dates, and each of its figures, in the order of the seeds."""
    measured: dict[str, Any] = {"seeds": {}, "dates": {}}
    for measure in measures_of(comparison):
        paths = {seed: records(comparison, name, seed)[measure] for seed, of in runs if of == name}
        files = {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.is_file()}
        measured["seeds"][measure], measured["dates"][measure] = [*files], [file["date"] for file in files.values()]
        measured |= {figure: [file[figure] for file in files.values()] for figure in MEASURES[measure]}
    return measured


def grounding_table(runs: dict[str, dict]) -> str:
    """Markdown: pointing accuracy in percent of all phrases and of each type, of the highest patch of a map and of a
    density (see `location_density`); AUROCs. The baselines stand in the last rows.
    """
    known = next(iter(runs.values()))["pointing"][0]
    others = ["without corners", "at a corner", *(f"AUROC of {name}".replace("_", " ") for name in AREAS)]
    lines, densest = [["run", "seeds", *known, *others]], []
    for name, run in runs.items():
        lines.append([name, str(len(run["pointing"])), *_accuracies(run, "accuracy", known)])
        lines[-1] += [*_accuracies(run, "without_corners", ["all"]), mean_and_spread(run["corner_share"])]
        for area in AREAS:
            means = [of_seed[area]["mean"] for of_seed in run["auroc"] if area in of_seed]
            lines[-1].append(_mean(means, 2))
        if all("densest" in of_seed["all"] for of_seed in run["pointing"]):
            densest.append([name, str(len(run["pointing"])), *_accuracies(run, "densest", known)])
    baselines = [
        [name.replace("_", " "), "-", *(f"{of_type[name]:.1f}" for of_type in known.values())] for name in BASELINES
    ]
    tables = [lines + [[*row, *["-"] * len(others)] for row in baselines]]
    if densest:
        tables.append([["densest place", "seeds", *known], *densest, *baselines])
    return "\n".join(map(markdown_table, tables))


def _accuracies(run: dict, way: str, groups: Iterable[str]) -> list[str]:
    return [mean_and_spread([of_seed[group][way] for of_seed in run["pointing"]]) for group in groups]


def foils_table(runs: dict[str, dict]) -> str:
    """Markdown: how often the true caption scores higher, and how often the edited word has the lowest share, in percent.

    A third table, of the runs that have it: how often the word that stood there had the lowest share before it was edited.
    """
    known = next(iter(runs.values()))["foils"][0]
    edits, tables = [kind for kind in known if kind != "all"], []
    kinds = ["all", *(["replaced"] if "swap" in edits and len(edits) > 1 else []), *edits]
    for figure, title in FOIL_FIGURES.items():
        lines = [[title, "seeds", *kinds]]
        for name, run in runs.items():
            if all(figure in of_seed["all"] for of_seed in run["foils"]):
                figures = [mean_and_spread([_of_kind(of, kind, figure) for of in run["foils"]]) for kind in kinds]
                lines.append([name, str(len(run["foils"])), *figures])
        blind = ["50.0" if figure == "preferred" else f"{_of_kind(known, kind, 'chance'):.1f}" for kind in kinds]
        if len(lines) > 1:
            tables.append(markdown_table([*lines, ["by chance", "-", *blind]]))
    return "\n".join(tables)


def _of_kind(foils: dict[str, dict], kind: str, figure: str) -> float:
    """Of "replaced" the mean over all foils but those where two phrases change places."""
    if kind != "replaced":
        return foils[kind][figure]
    own = [of for name, of in foils.items() if name not in ("all", "swap")]
    return sum(of["number"] * of[figure] for of in own) / sum(of["number"] for of in own)


def uncertainty_table(runs: dict[str, dict]) -> str:
    """Markdown, a table for each way: calibration errors (ECE) of the softmax, before and after, and of the probability that
    the first answer is right; answer sets; for a wrong first answer the AUROC of each doubt, and -S R^2 of some.
    """
    head = ["seeds", "R@1", "ECE before", "ECE", "ECE of first is right", "right one in the set (%)", "answers in a set"]
    told_by = [*(f"AUROC of {name}" for name in DOUBTS), *(f"-S R^2 of {name}" for name in OF_LEVELS)]
    tables = []
    for way in WAYS:
        lines = [[way.replace("_", " "), *head, *(name.replace("_", " ") for name in told_by)]]
        for name, run in runs.items():
            figures = run[way]
            lines.append([name, str(len(figures)), mean_and_spread([of["r1"] for of in figures])])
            lines[-1] += [_mean([of["softmax"][error] for of in figures], 3) for error in ("ece_before", "ece")]
            lines[-1].append(_mean([of["confidence"]["ece"] for of in figures], 3))
            lines[-1] += [_mean([of["answer_sets"][figure] for of in figures], 1) for figure in ("coverage", "mean_size")]
            told = [of["is_the_first_wrong"] for of in figures]
            lines[-1] += [_mean([of[doubt]["auroc"] for of in told if doubt in of], 3) for doubt in DOUBTS]
            lines[-1] += [_mean([of[doubt]["minus_s_r2"] for of in told if doubt in of], 2) for doubt in OF_LEVELS]
        tables.append(markdown_table(lines))
    return "\n".join(tables)


def _mean(values: list[float], digits: int) -> str:
    return f"{sum(values) / len(values):.{digits}f}" if values else "-"


def tables(runs: dict[str, dict]) -> dict[str, str]:
    """Measure -> Markdown, of the runs that have it."""
    write = {"grounding": grounding_table, "foils": foils_table, "uncertainty": uncertainty_table}
    measured = {measure: {n: r for n, r in runs.items() if r.get(MEASURES[measure][0])} for measure in MEASURES}
    return {measure: write[measure](of_measure) for measure, of_measure in measured.items() if of_measure}


if __name__ == "__main__":
    main()
