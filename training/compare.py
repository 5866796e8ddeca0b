"""Trains aligners and ablations with several seeds under one budget, and writes what the differences are worth.

    python training/compare.py training/recipes/compare-flickr8k-frozen.yaml [--jobs 2]

Each run is a call of train.py (and of evaluate.py, where the split is not the one that selects the epoch) in a folder of its
own. Started again, it skips what is finished and resumes what was interrupted. Of a finished run its settings, metrics and
ranks stay beside the results, in `results_dir`/runs, so that further runs are compared with it wherever those files are,
without its checkpoint; to train again what is recorded there, move that folder away.
Several jobs share the cores and write what they show to `train.log` and `evaluate.log` in the folders of their runs: small
models gain by it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from granalign_hf import card_sections
from granalign_hf.evaluation import PairedDifference, RetrievalRanks, paired_bootstrap_of_runs, ranks_to_metrics
from granalign_hf.model_card import write_model_card
from granalign_hf.training.arguments import DataArguments, parse_arguments
from granalign_hf.training.jobs import Step, finish
from granalign_hf.training.parser import as_words
from granalign_hf.training.plot import plot_comparison
from granalign_hf.training.protocols import read_ranks
from granalign_hf.training.runtime import available_cores, portable
from granalign_hf.whole_files import whole_file, write_whole

COLUMNS = ("rsum", "image_to_text_r1", "text_to_image_r1")
PLACES = ("dataset", "image_folder", "vision_encoder", "text_encoder")


@dataclass
class Comparison:
    """What a comparison recipe says: the runs are the base recipe with some fields changed."""

    base: str  # recipe, beside this one
    output_dir: str  # checkpoints and logs, a folder for each run and seed
    results_dir: str  # table.md, results.json, results.png, and in `runs` the record of each finished run
    split: str
    seeds: list[int]
    baselines: list[str]  # runs that the others are compared with
    diagnostics: list[str]  # of the validation split, as further columns
    runs: dict[str, dict]  # settings; `{seed}` in a checkpoint is the number of the seed
    published: dict | None = None  # protocol and backbone of published.yaml, and the method there of each run that has one

    @property
    def ranks_file(self) -> str:
        """Name of the file with the ranks of a run on the split of the comparison."""
        return f"ranks-{self.split}.npz"

    @classmethod
    def read(cls, path: Path) -> Comparison:
        """Raises ValueError: it cannot be read, a field is missing, unknown or of no use, or a baseline is no run."""
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"The recipe {path} cannot be read: {' '.join(str(error).split())}") from error
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(content, dict) or {*content, "published"} != {*names}:
            raise ValueError(
                f"{path} must have exactly the fields {names} (`published` may be absent), got {sorted(content or ())}."
            )
        comparison = cls(**content)
        if not isinstance(comparison.seeds, list) or not comparison.seeds:
            raise ValueError(f"`seeds` of {path} must be a list such as [0, 1, 2], got {comparison.seeds!r}.")
        wrong = [n for n, own in comparison.runs.items() if not isinstance(own, dict) or None in own.values()]
        if wrong:
            raise ValueError(f"`runs` of {path} must be name: {{field: value}}, {{}} for the base alone; wrong are {wrong}.")
        missing = [name for name in comparison.baselines if name not in comparison.runs]
        if missing:
            raise ValueError(f"`baselines` of {path} names {missing}, which are not among `runs`: {list(comparison.runs)}.")
        comparison.base = str(path.parent / comparison.base)
        if not Path(comparison.base).is_file():
            raise ValueError(f"`base` of {path} names {comparison.base}, which does not exist.")
        if comparison.published is not None:
            try:
                published_rsum(**comparison.published)
            except (KeyError, TypeError) as error:
                raise ValueError(f"`published` of {path}: {error} stands not in published.yaml.") from error
        return comparison


def read_comparison(parser: argparse.ArgumentParser, recipe: Path) -> Comparison:
    """A recipe from the command line, and what is on disk of its runs; ends the program where they do not fit."""
    try:
        comparison = Comparison.read(recipe)
        for name, seed in itertools.product(comparison.runs, comparison.seeds):
            run_settings(comparison, name, seed)
    except ValueError as error:
        parser.error(str(error))
    return comparison


def add_jobs(parser: argparse.ArgumentParser, what: str) -> None:
    """`--jobs` of a script that has several processes do its work."""
    cores = len(available_cores())

    def number(text: str) -> int:
        if not text.isdigit() or not 1 <= int(text) <= cores:
            raise argparse.ArgumentTypeError(f"must lie in 1..{cores}, the number of cores, got {text}")
        return int(text)

    parser.add_argument("--jobs", type=number, default=1, help=f"{what} at a time; each has its share of the cores.")


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="Trains and compares the runs of a recipe (compare-*.yaml).")
    parser.add_argument("recipe", type=Path)
    add_jobs(parser, "Runs")
    arguments = parser.parse_args(argv)
    comparison = read_comparison(parser, arguments.recipe)
    refuse_wrong_runs(parser, comparison)
    command = f"python training/compare.py {arguments.recipe}" + (f" --jobs {arguments.jobs}" if arguments.jobs > 1 else "")
    # Seed by seed, so that an interrupted comparison has all runs of its first seeds.
    runs = [(seed, name) for seed in comparison.seeds for name in comparison.runs]
    finished = {(seed, name) for seed, name in runs if is_recorded(comparison, name, seed)}
    work = [(run, missing_steps(comparison, run[1], run[0])) for run in runs if run not in finished]
    if finished:
        print(f"--- recorded: {', '.join(f'{name}, seed {seed}' for seed, name in runs if (seed, name) in finished)}")
        write_results(comparison, finished, portable(command))
    for seed, name in finish(work, arguments.jobs):
        print(f"--- {name}, seed {seed}: done", flush=True)
        finished.add((seed, name))
        write_results(comparison, finished, portable(command))
    result = json.loads((Path(comparison.results_dir) / "results.json").read_text())
    write_cards(comparison, result)
    print((Path(comparison.results_dir) / "table.md").read_text())
    return result


def write_cards(comparison: Comparison, result: dict) -> None:
    """The cards of the checkpoints that are there, with the figures of all runs beside their own."""
    shared = {key: result[key] for key in ("command", "date", "split")}
    shared["runs"] = {run: {column: row[column] for column in COLUMNS} for run, row in result["runs"].items()}
    for seed, name in itertools.product(comparison.seeds, comparison.runs):
        folder = run_folder(comparison, name, seed)
        if (folder / "config.json").is_file():
            own = {"dataset": Path(run_settings(comparison, name, seed)["dataset"]).name, "own": name}
            write_whole(folder / f"comparison-{comparison.split}.json", json.dumps({**own, **shared}, indent=1) + "\n")
            write_model_card(folder)


def refuse_wrong_runs(parser: argparse.ArgumentParser, comparison: Comparison) -> None:
    """Ends the program, before anything is trained, if train.py would refuse a run that is not recorded yet."""
    for name in comparison.runs:
        waiting = [seed for seed in comparison.seeds if not is_recorded(comparison, name, seed)]
        if waiting:
            try:
                parse_arguments(train_words(comparison, name, waiting[0]))
            except SystemExit:
                parser.error(f"the run {name} has these settings")


def is_recorded(comparison: Comparison, name: str, seed: int) -> bool:
    """Whether all of a run that the results need stands beside them."""
    return (record_folder(comparison, name, seed) / comparison.ranks_file).is_file()


def train_words(comparison: Comparison, name: str, seed: int) -> list[str]:
    """The command line of train.py for a run."""
    whole = run_settings(comparison, name, seed)
    own = (*comparison.runs[name], *(["checkpoint"] if "checkpoint" in whole else []), "seed", "output_dir")
    return [comparison.base, *as_words({field: whole[field] for field in own})]


def missing_steps(comparison: Comparison, name: str, seed: int) -> Iterator[Step]:
    """What is still to be done for a run; each step is asked for when the one before has succeeded.

    Raises:
        ValueError: the folder holds a run of other settings.
    """
    folder, record = run_folder(comparison, name, seed), record_folder(comparison, name, seed)
    whole, ranks = run_settings(comparison, name, seed), comparison.ranks_file
    if not (folder / "complete").is_file():
        is_started = (folder / "settings.json").is_file() and any(folder.glob("state/*/progress.json"))
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "settings.json", json.dumps(whole, indent=1))
        words = train_words(comparison, name, seed)
        yield Step("train", [*words, *(["--resume", "true"] if is_started else [])], folder)
        (folder / "complete").touch()
    if not (folder / ranks).is_file():
        words = [str(folder), *data_words(comparison, name, seed)]
        if comparison.published is not None:
            output = folder / f"metrics-{comparison.split}.json"  # else its name would be that of the protocol
            words += ["--protocol", comparison.published["protocol"], "--output", str(output)]
        yield Step("evaluate", words, folder)
    for file in ("settings.json", "metrics.json", ranks):  # the ranks last: they say that the record is complete
        keep(folder / file, record)


def keep(file: Path, record: Path) -> None:
    """A copy of a file in the folder of a record, whole or not at all."""
    record.mkdir(parents=True, exist_ok=True)
    with whole_file(record / file.name) as unfinished:
        shutil.copy(file, unfinished)


def data_words(comparison: Comparison, name: str, seed: int) -> list[str]:
    """The data of a run and the split of the comparison, as words of evaluate.py's command line."""
    whole = run_settings(comparison, name, seed)
    of_data = {field.name: whole[field.name] for field in dataclasses.fields(DataArguments) if field.name in whole}
    return as_words({**of_data, "split": comparison.split})


def run_settings(comparison: Comparison, name: str, seed: int) -> dict:
    """All settings of a run.

    Raises:
        ValueError: its folder, or that of its record, holds a run of others.
    """
    folder, base = run_folder(comparison, name, seed), yaml.safe_load(Path(comparison.base).read_text())
    whole = {**base, **comparison.runs[name], "seed": seed, "output_dir": str(folder)}
    if whole.get("checkpoint"):
        whole["checkpoint"] = whole["checkpoint"].format(seed=seed)
    for place, field in ((folder, "output_dir"), (record_folder(comparison, name, seed), "results_dir")):
        settings = place / "settings.json"
        # Of a record only the last part of a path counts: it may have been made elsewhere.
        told = dict if place == folder else _without_places
        if settings.is_file() and told(json.loads(settings.read_text())) != told(whole):
            raise ValueError(f"{place} holds a run of other settings ({settings}). Delete it, or change `{field}`.")
    return whole


def _without_places(settings: dict) -> dict:
    return {name: Path(value).name if name in PLACES and value else value for name, value in settings.items()}


def _ranks(comparison: Comparison, name: str, finished: set[tuple[int, str]]) -> list[RetrievalRanks]:
    """Of the first seeds of a run, as far as they are finished."""
    seeds = itertools.takewhile(lambda seed: (seed, name) in finished, comparison.seeds)
    return [read_ranks(record_folder(comparison, name, seed) / comparison.ranks_file) for seed in seeds]


def run_folder(comparison: Comparison, name: str, seed: int) -> Path:
    """Where a run has its checkpoint, whether it is there or not."""
    return Path(comparison.output_dir) / f"{name}-seed{seed}"


def record_folder(comparison: Comparison, name: str, seed: int) -> Path:
    """Where the settings, metrics and ranks of a finished run stay, whether they are there or not."""
    return Path(comparison.results_dir) / "runs" / f"{name}-seed{seed}"


def _record(comparison: Comparison, name: str, seed: int) -> dict:
    """metrics.json of a recorded run."""
    return json.loads((record_folder(comparison, name, seed) / "metrics.json").read_text())


def write_results(comparison: Comparison, finished: set[tuple[int, str]], command: str) -> None:
    """table.md, results.json and results.png of the runs (seed, name) that are there, whatever their number of seeds."""
    folder = Path(comparison.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {name: of_run for name in comparison.runs if (of_run := _ranks(comparison, name, finished))}
    if not ranks:  # only later seeds are there
        return
    records = {
        name: [_record(comparison, name, seed) for seed in comparison.seeds[: len(of_run)]] for name, of_run in ranks.items()
    }
    rows = {name: _row(comparison, ranks, records[name], name) for name in ranks}
    every = [record for of_run in records.values() for record in of_run]
    result = {
        "command": command,
        "date": max(record["date"] for record in every),  # of the last run
        "hardware": ", ".join(sorted({record["hardware"] for record in every})),
        "split": comparison.split,
        "seeds": comparison.seeds,
        "runs": rows,
    }
    write_whole(folder / "results.json", json.dumps(result, indent=1) + "\n")
    write_whole(folder / "table.md", table(rows, comparison.baselines, comparison.diagnostics))
    plot_comparison({name: row["rsum"] for name, row in rows.items()}, folder / "results.png")


def _row(comparison: Comparison, ranks: dict[str, list[RetrievalRanks]], records: list[dict], name: str) -> dict:
    metrics = [ranks_to_metrics(r) for r in ranks[name]]
    row: dict = {"settings": comparison.runs[name], **{c: [m[c] for m in metrics] for c in COLUMNS}}
    row["hours"] = [record["hours"] for record in records]
    row["diagnostics"] = {
        diagnostic: statistics.mean(record["diagnostics"][diagnostic] for record in records)
        for diagnostic in comparison.diagnostics
        if all(diagnostic in record["diagnostics"] for record in records)
    }
    for baseline in comparison.baselines:
        if baseline in ranks and baseline != name:
            difference = paired_bootstrap_of_runs(ranks[name], ranks[baseline])["rsum"]
            row[f"minus {baseline}"] = difference._asdict()
    if comparison.published is not None and name in comparison.published["methods"]:
        row["published"] = published_rsum(**comparison.published)[name]
    return row


def published_rsum(protocol: str, backbone: str, methods: dict[str, str]) -> dict[str, float]:
    """The rSum that papers print for a protocol and backbone, by the name of our run.

    Raises:
        KeyError: published.yaml has no such protocol, backbone or method.
    """
    printed = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())[protocol][backbone]
    return {name: printed[method] for name, method in methods.items()}


def table(rows: dict[str, dict], baselines: list[str], diagnostics: list[str]) -> str:
    """Markdown: mean and standard deviation over seeds; differences of rSum with 95 % interval and p-value."""
    head = ["run", "seeds", "rSum", "image to text R@1", "text to image R@1", *(f"rSum minus {name}" for name in baselines)]
    head += [name.replace("_", " ") for name in diagnostics]
    has_published = any("published" in row for row in rows.values())
    head += ["published rSum"] * has_published
    lines = [head]
    for name, row in rows.items():
        lines.append([name, str(len(row["rsum"])), *(card_sections.mean_and_spread(row[column]) for column in COLUMNS)])
        for baseline in baselines:
            difference = row.get(f"minus {baseline}")
            lines[-1].append("-" if difference is None else _difference(PairedDifference(**difference)))
        lines[-1] += [f"{row['diagnostics'][d]:.3f}" if d in row["diagnostics"] else "-" for d in diagnostics]
        lines[-1] += [str(row.get("published", "-"))] * has_published
    return markdown_table(lines)


def markdown_table(lines: list[list[str]]) -> str:
    """Rows of cells, the first of which is the head."""
    return card_sections.markdown_table(lines[0], lines[1:]) + "\n"


def _difference(difference: PairedDifference) -> str:
    value, low, high, p_value = difference
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}], p = {p_value:.3f}"


if __name__ == "__main__":
    main()
