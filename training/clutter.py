"""How each aligner of a comparison on drawn scenes bears clutter: rSum and pointing against the number of distractors.

    python training/clutter.py training/recipes/compare-scenes.yaml

Reads the checkpoints that compare.py has trained and writes clutter.md, clutter.json and clutter.png beside its results. The
scenes are those of the test split, drawn again with more objects that no caption names.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path

from tqdm import tqdm

from granalign_hf import GranAlignModel, GranAlignProcessor
from granalign_hf.evaluation import fold_ranks
from granalign_hf.training.compare import markdown_table, read_comparison, run_folder, run_settings
from granalign_hf.training.data import CaptionedImages, drawn_scenes
from granalign_hf.training.demo import GALLERY, pointing
from granalign_hf.training.plot import plot_curves
from granalign_hf.training.protocols import mean_metrics
from granalign_hf.training.runtime import portable, set_up_torch
from granalign_hf.training.scoring import scored_split
from granalign_hf.training.tables import SCENE_SEEDS
from granalign_hf.whole_files import write_whole

NUM_SCENES = 500
DISTRACTORS = (0, 1, 2, 4, 6, 8)
MEASURES = {"rsum": "rSum in galleries of 100", "pointing": "pointing accuracy (%)"}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="Measures the runs of a comparison on more and more cluttered scenes.")
    parser.add_argument("recipe", type=Path)
    recipe = parser.parse_args(argv).recipe
    comparison = read_comparison(parser, recipe)
    settings = [run_settings(comparison, name, seed) for name in comparison.runs for seed in comparison.seeds]
    if other := {one["dataset"] for one in settings} - {"scenes"}:
        parser.error(f"clutter is measured on drawn scenes; the runs of {recipe} are of {', '.join(sorted(other))}")
    folders = {name: [run_folder(comparison, name, seed) for seed in comparison.seeds] for name in comparison.runs}
    missing = [str(folder) for runs in folders.values() for folder in runs if not (folder / "complete").is_file()]
    if missing:
        parser.error(
            f"not trained yet: {', '.join(missing)}; run python training/compare.py {recipe} first (what is "
            f"recorded in {comparison.results_dir}/runs it takes for done: move that away)"
        )
    folder = Path(comparison.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    set_up_torch("highest")
    measured: dict[str, dict[str, list[list[float]]]] = {name: {m: [] for m in MEASURES} for name in folders}
    for number in tqdm(DISTRACTORS, desc="distractors"):
        scenes = drawn_scenes(NUM_SCENES, SCENE_SEEDS["test"], number)
        for name, runs in folders.items():
            values = [measure(folder, scenes) for folder in runs]
            for measure_name in MEASURES:
                measured[name][measure_name].append([value[measure_name] for value in values])
    result = {
        "command": portable(f"python training/clutter.py {recipe}"),
        "date": datetime.date.today().isoformat(),
        "scenes": NUM_SCENES,
        "seeds": comparison.seeds,
        "distractors": DISTRACTORS,
        "runs": measured,
    }
    write_whole(folder / "clutter.json", json.dumps(result, indent=1) + "\n")
    write_whole(folder / "clutter.md", table(measured))
    plot_curves("distractors", list(DISTRACTORS), MEASURES, measured, folder / "clutter.png")
    print(table(measured))
    return result


def measure(folder: Path, scenes: CaptionedImages) -> dict[str, float]:
    """Both measures of one checkpoint on some scenes."""
    model, processor = GranAlignModel.from_pretrained(folder).eval(), GranAlignProcessor.from_pretrained(folder)
    with scored_split(model, processor, scenes, 64, folder / "clutter-unfinished") as (scores, _):
        folds = fold_ranks(scores, scenes.caption_image_index, len(scenes) // GALLERY)
    return {"rsum": mean_metrics(folds)["rsum"], "pointing": pointing(model, processor, scenes)["accuracy"]}


def table(measured: dict[str, dict[str, list[list[float]]]]) -> str:
    """Markdown: one table a measure, runs by numbers of distractors, means over seeds."""
    parts = []
    for measure_name, title in MEASURES.items():
        lines = [[title, *(f"{number} distractors" for number in DISTRACTORS)]]
        lines += [
            [name, *(f"{statistics.mean(values):.1f}" for values in of_run[measure_name])]
            for name, of_run in measured.items()
        ]
        parts.append(markdown_table(lines))
    return "\n".join(parts)


if __name__ == "__main__":
    main()
