"""Checkpoint and data set -> recalls with intervals; or where its words point, or whether it notices a wrong one.

accelerate launch training/evaluate.py CHECKPOINT --dataset NAME --split test [--protocol NAME]
accelerate launch training/evaluate.py CHECKPOINT --dataset NAME --split test --task {grounding,foils} --phrase_boxes NAME
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger

from granalign_hf import GranAlignModel, GranAlignProcessor
from granalign_hf.commands.common import HUB_ID
from granalign_hf.evaluation import bootstrap_interval
from granalign_hf.export import ExportedModel
from granalign_hf.model_card import write_model_card
from granalign_hf.training.arguments import PRECISIONS, DataArguments
from granalign_hf.training.data import CaptionedImages, load_split
from granalign_hf.training.foils import foils_table, measure_foils
from granalign_hf.training.leaks import find_leaks, leak_warning
from granalign_hf.training.parser import SettingsParser, choice_problems, range_problems, setting
from granalign_hf.training.phrases import LocatedCaption, located_captions
from granalign_hf.training.pointing import grounding_table, measure_grounding
from granalign_hf.training.protocols import PROTOCOLS, gallery_ranks, mean_metrics, save_ranks
from granalign_hf.training.runtime import portable, set_up_torch
from granalign_hf.training.scoring import scored_split
from granalign_hf.whole_files import write_whole

logger = get_logger(__name__)


@dataclass
class EvaluateArguments(DataArguments):
    """What to evaluate, and where to write it."""

    split: str = setting("test", "Split to evaluate on.")
    task: str = setting(
        "retrieval",
        "retrieval: recalls of all pairs. grounding: the pointing game and saliencies on phrases with boxes. foils: whether "
        "a wrong word in such a phrase is noticed.",
    )
    phrase_boxes: str | None = setting(
        None,
        "Hub name or folder of the boxes of phrases, with the columns filename, caption and phrases, of the same split. "
        "Default: the column `phrases` of the data set.",
    )
    protocol: str | None = setting(
        None, f"One of {', '.join(PROTOCOLS)}: refuses other splits and sizes. Default: the whole split as one gallery."
    )
    max_images: int | None = setting(None, "Evaluate on the first images only; the model card stays as it is.")
    batch_size: int = setting(64, "Images per step, at most 128.")
    graphs: str | None = setting(
        None, "Folder of `granalign export`: tokens come from its graphs, and the figures go there. Default: the model's."
    )
    matmul_precision: str = setting("highest", f"float32 products: {', '.join(PRECISIONS)} (see torch).")
    output: str | None = setting(
        None,
        "File of the figures. Default: metrics-SPLIT.json (or metrics-PROTOCOL.json, grounding-SPLIT.json, foils-SPLIT.json,"
        " with the name of the data set if the "
        "checkpoint was trained on another) in the checkpoint's folder, or, for a Hub id, in the working one.",
    )


def main(argv: list[str] | None = None) -> dict:
    """Evaluates a checkpoint; returns what the file of the metrics holds."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, args, checkpoint = parse_arguments(argv)
    folder = Path(checkpoint)
    output = output_file(args, folder, parser)
    accelerator = Accelerator()
    set_up_torch(args.matmul_precision, accelerator.num_processes)
    data = load_data(args, parser)
    model, processor = load_checkpoint(checkpoint, parser)
    if args.graphs is not None:
        run_graphs(model, args.graphs, parser)
    located = None if args.task == "retrieval" else load_phrases(args, data, parser)
    leaks = find_leaks(data, folder) if accelerator.is_main_process else None  # first: a broken record costs no evaluation
    model.to(accelerator.device)
    started = time.perf_counter()
    if located is None:
        # Beside the metrics, so that an evaluation that was interrupted finds its finished blocks.
        work = output.with_name(f"{output.stem}-unfinished")
        with scored_split(model, processor, data, args.batch_size, work) as (scores, diagnostics):
            galleries = gallery_ranks(scores, data.caption_image_index, PROTOCOLS.get(args.protocol))
        intervals = {name: list(interval) for name, interval in bootstrap_interval(galleries).items()}
        figures = {"metrics": mean_metrics(galleries), "intervals": intervals, "diagnostics": diagnostics}
    else:
        measure = measure_grounding if args.task == "grounding" else measure_foils
        figures = measure(model, processor, data, located, args.batch_size)
    result = {
        "dataset": Path(args.dataset).name,
        "split": args.split,
        "protocol": protocol_in_words(args, data),
        "num_images": len(data),
        "num_captions": len(data.caption_image_index),
        "num_images_trained_on": None if leaks is None else len(leaks),  # null: it is not known what it was trained on
        "matmul_precision": args.matmul_precision,
        "seconds": round(time.perf_counter() - started, 1),
        "date": datetime.date.today().isoformat(),
        "command": portable(shlex.join(["accelerate", "launch", "training/evaluate.py", *argv])),
        **figures,
    }
    if accelerator.is_main_process:
        write_whole(output, json.dumps(result, indent=2) + "\n")
        if located is None:
            # So that another checkpoint can be compared with this one by `paired_bootstrap` without evaluating it again.
            save_ranks(output.with_name(f"ranks-{output.stem.removeprefix('metrics-')}.npz"), galleries)
        if args.max_images is None and args.graphs is None and (folder / "metrics.json").is_file():
            write_model_card(folder)
        print(TABLES[args.task](result))
        if leaks:
            logger.warning(leak_warning(leaks, len(data)))
        print(f"written to {output}" + (", the rank of every query beside it" if located is None else ""))
    accelerator.end_training()
    return result


def parse_arguments(argv: list[str]) -> tuple[SettingsParser, EvaluateArguments, str]:
    """`CHECKPOINT [--field value ...]` -> the parser (for later refusals), the settings, and the checkpoint.

    Raises:
        SystemExit: a field that does not exist or a value that nothing can be done with; the message names them all.
    """
    parser = SettingsParser(EvaluateArguments, description="Evaluates a checkpoint.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="Folder or Hub id of a GranAlign model.")
    args, rest, unknown = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
    problems = parser.unknown_fields(unknown, "on the command line")
    problems += range_problems(args, ["max_images", "batch_size"], "must be at least 1", lambda value: value >= 1)
    problems += choice_problems(args, {"task": [*TABLES], "matmul_precision": PRECISIONS, "protocol": [*PROTOCOLS]})
    if args.task == "retrieval" and args.phrase_boxes is not None:
        problems.append("phrase_boxes has no effect: task is retrieval")
    if args.task != "retrieval" and args.protocol is not None:
        problems.append(f"protocol has no effect: task is {args.task}")
    if args.protocol is not None and args.max_images is not None:
        problems.append(f"protocol {args.protocol} takes all images of its split, so max_images must be left out")
    parser.refuse(problems)
    return parser, args, rest.checkpoint


def output_file(args: EvaluateArguments, folder: Path, parser: SettingsParser) -> Path:
    """Where the metrics go; a refusal if they cannot be written or the folder has no checkpoint."""
    if folder.is_dir() and not (folder / "config.json").is_file():
        parser.error(f"the folder {folder} holds no checkpoint: it has no config.json")
    if not folder.is_dir() and not HUB_ID.fullmatch(str(folder)):
        parser.error(f"the checkpoint {folder} does not exist: it is no folder here, and no Hub id (owner/name)")
    place = Path(args.graphs) if args.graphs is not None else folder if folder.is_dir() else Path()
    output = Path(args.output or place / f"{FILES[args.task]}-{measured_name(args, folder)}.json")
    if output.is_dir() or not os.access(output.parent, os.W_OK | os.X_OK) or not output.parent.is_dir():
        parser.error(f"the output {output} cannot be written: name a file in an existing folder")
    if not folder.is_dir():
        print(f"{folder} is no folder, so it is taken for a Hub id; the metrics will be written to {output}")
    return output


def measured_name(args: EvaluateArguments, folder: Path) -> str:
    """What tells an evaluation from others of a checkpoint; a whole split of the data set of training has the plain name."""
    record, dataset = folder / "metrics.json", Path(args.dataset).name
    trained_on = json.loads(record.read_text()).get("dataset", dataset) if record.is_file() else dataset
    parts = [] if dataset == trained_on else [dataset]
    parts.append(part_name(args.protocol or args.split, args.max_images))
    return "-".join(parts)


def part_name(split: str, max_images: int | None) -> str:
    """A split, or its first images; `card_sections.is_part` tells them apart."""
    return split if max_images is None else f"{split}-first-{max_images}"


def load_data(args: EvaluateArguments, parser: SettingsParser) -> CaptionedImages:
    try:
        data = load_split(args.dataset, args.split, **args.load_options).first(args.max_images)
        if args.protocol is not None:
            data = PROTOCOLS[args.protocol].select(data, args.dataset, args.split)
    except ValueError as error:
        parser.error(str(error))
    return data


def load_phrases(args: EvaluateArguments, data: CaptionedImages, parser: SettingsParser) -> list[LocatedCaption]:
    try:
        located = located_captions(data, args.phrase_boxes, args.split)
    except ValueError as error:
        parser.error(str(error))
    return located


def load_checkpoint(name: str, parser: SettingsParser) -> tuple[GranAlignModel, GranAlignProcessor]:
    try:
        model, processor = GranAlignModel.from_pretrained(name), GranAlignProcessor.from_pretrained(name)
    except OSError as error:
        where = "" if Path(name).is_dir() else " (it is no folder here, so it was looked for on the Hub)"
        parser.error(f"the checkpoint {name} cannot be loaded{where}: {' '.join(str(error).split())}")
    return model, processor


def run_graphs(model: GranAlignModel, folder: str, parser: SettingsParser) -> None:
    """From now on the tokens of images and captions are those of exported graphs; the scores are the model's own."""
    try:
        exported = ExportedModel(folder)
    except ValueError as error:
        parser.error(f"graphs: {error}")
    model.get_image_features, model.get_text_features = exported.get_image_features, exported.get_text_features


def protocol_in_words(args: EvaluateArguments, data: CaptionedImages) -> str:
    num_captions = len(data.caption_image_index)
    if args.protocol is not None:
        return PROTOCOLS[args.protocol].describe(num_captions)
    if args.task != "retrieval":
        return f"{len(data)} images, the captions with phrases that have boxes"
    return f"{len(data)} images, {num_captions} captions, all pairs"


def recalls_table(result: dict) -> str:
    """The metrics as lines of text, each with the name of its protocol and its 95 % interval over images."""
    name_of_protocol, is_named, _ = result["protocol"].partition(": ")
    label = f"{name_of_protocol} " if is_named else ""
    lines = [f"{result['dataset']} {result['split']}: {result['protocol']}"]
    for name, (low, high) in result["intervals"].items():
        lines.append(f"{label}{name:<20} {result['metrics'][name]:6.1f}   [{low:.1f}, {high:.1f}]")
    return "\n".join(lines)


TABLES = {"retrieval": recalls_table, "grounding": grounding_table, "foils": foils_table}
FILES = {"retrieval": "metrics", "grounding": "grounding", "foils": "foils"}


if __name__ == "__main__":
    main()
