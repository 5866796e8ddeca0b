"""How much two stages of search lose, how much fewer bytes a picture do, and how long it takes: checkpoints on a split.

    python training/measure_search.py CHECKPOINT [CHECKPOINT ...] --dataset NAME [--split test] [--output FOLDER]

Every caption looks for its picture in an index of the pictures, every picture for its captions in an index of those. Writes
search.json, search.md and search.png into the output; checkpoints that were measured before stay in them.
"""

from __future__ import annotations

import datetime
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from granalign_hf.candidates import ItemEncoder, search_vectors
from granalign_hf.evaluation import retrieval_metrics
from granalign_hf.retrieval import GranAlignIndex
from granalign_hf.tokens import TokenFormat, from_rows, to_rows
from granalign_hf.training.arguments import PRECISIONS, DataArguments
from granalign_hf.training.compare import markdown_table
from granalign_hf.training.data import CaptionedImages, load_split
from granalign_hf.training.evaluate import load_checkpoint
from granalign_hf.training.parser import SettingsParser, choice_problems, range_problems, setting
from granalign_hf.training.plot import plot_sizes
from granalign_hf.training.runtime import hardware, portable, set_up_torch
from granalign_hf.whole_files import write_whole

SHARES = (0.5, 0.25)  # of the patches that are kept, the most salient ones
CAPTIONS_AT_ONCE = 500
TIMED_SEARCHES = 200
RECALLS = {side: tuple(f"{side}_r{k}" for k in (1, 5, 10)) for side in ("image_to_text", "text_to_image")}


@dataclass
class SearchArguments(DataArguments):
    """What is searched, and where the figures go."""

    split: str = setting("test", "Split whose pictures and captions are indexed.")
    candidates: int = setting(100, "Items of the first stage that get an exact score.")
    max_images: int | None = setting(None, "The first images only.")
    batch_size: int = setting(64, "Images per step of the encoder.")
    matmul_precision: str = setting("highest", f"float32 products: {', '.join(PRECISIONS)} (see torch).")
    output: str = setting("training/results/search", "Folder of the figures.")


def main(argv: list[str] | None = None) -> dict:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = SettingsParser(SearchArguments, description="Measures the search index.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="Folder or Hub id of a GranAlign model.")
    args, rest, unknown = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
    problems = parser.unknown_fields(unknown, "on the command line")
    sizes = ["candidates", "max_images", "batch_size"]
    problems += range_problems(args, sizes, "must be at least 1", lambda value: value >= 1)
    parser.refuse(problems + choice_problems(args, {"matmul_precision": PRECISIONS}))
    set_up_torch(args.matmul_precision)
    data = load_split(args.dataset, args.split, **args.load_options).first(args.max_images)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "search.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    for name in rest.checkpoints:
        model, processor = load_checkpoint(name, parser)
        results[Path(name).name] = {
            "command": portable(shlex.join(["python", "training/measure_search.py", *argv])),
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(),
            "split": f"{Path(args.dataset).name} {args.split}",
            "num_images": len(data),
            "num_captions": len(data.all_captions),
            "candidates": args.candidates,
            **measure(model.eval(), processor, data, args.candidates, args.batch_size),
        }
        write_whole(file, json.dumps(results, indent=1) + "\n")
        write_whole(output / "search.md", tables(results))
        curves = {name: [(row["bytes"], row["rsum"]) for row in of["curve"]] for name, of in results.items()}
        plot_sizes(curves, output / "search.png")
    print(tables(results))
    return results


@torch.no_grad()
def measure(model, processor, data: CaptionedImages, candidates: int, batch_size: int) -> dict[str, Any]:
    """rSum of all pairs, of two stages, and of what is stored in fewer bytes; time and room of an index by default."""
    scores: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        images, captions = (
            GranAlignIndex.create(f"{folder}/{contents}", model, processor, contents=contents)
            for contents in ("images", "captions")
        )
        with images, captions:
            started = time.perf_counter()
            images.add(Pictures(data), data.image_ids, batch_size=batch_size)
            seconds = time.perf_counter() - started
            texts = encode_captions(model, processor, data, captions)
            run = {
                "tokens": images.settings["tokens"],
                "index_seconds": seconds,
                "bytes_on_disk": sum(512 * path.stat().st_blocks for path in Path(f"{folder}/images").rglob("*")),
                "search_ms": search_ms(images, data.all_captions, candidates),
            }
            found = two_stages(images, captions, data, candidates)
        for numbers, features in encode_images(model, processor, data, batch_size):
            for name, (size, rows) in stored_scores(model, features, texts).items():
                sizes[name] = size
                scores.setdefault(name, np.empty((len(data), len(data.all_captions)), np.float32))[numbers] = rows
    index = data.caption_image_index
    rsum = {name: retrieval_metrics(matrix, index)["rsum"] for name, matrix in scores.items()}
    curve = [{"stored": name, "bytes": size, "rsum": rsum[name]} for name, size in sizes.items()]
    exact = retrieval_metrics(scores["float32"], index)
    by_side = {side: retrieval_metrics(matrix, index) for side, matrix in found.items()}
    recalls = {name: by_side[side][name] for side, names in RECALLS.items() for name in names}
    both = recalls | {"rsum": sum(recalls.values())}
    return {"exact": exact, "two_stages": both, "share": both["rsum"] / exact["rsum"], "run": run, "curve": curve}


class Pictures(Sequence):
    """The pictures of a split, each read when it is asked for."""

    def __init__(self, data: CaptionedImages):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number):
        return self.data.image(number)


def encode_captions(model, processor, data: CaptionedImages, index: GranAlignIndex) -> list[Any]:
    """Features of all captions in blocks, which go into the index, too."""
    encoder, blocks = ItemEncoder(model, processor, has_captions=True), []
    for start in range(0, len(data.all_captions), CAPTIONS_AT_ONCE):
        blocks.append(encoder.features(data.all_captions[start : start + CAPTIONS_AT_ONCE]))
        numbers = range(start, start + len(blocks[-1].word_embeds))
        index.add_features(blocks[-1], [str(n) for n in numbers], [{}] * len(numbers))
    return blocks


def encode_images(model, processor, data: CaptionedImages, batch_size: int) -> Iterator[tuple[list[int], Any]]:
    encoder = ItemEncoder(model, processor, has_captions=False)
    for start in tqdm(range(0, len(data), batch_size), desc="images"):
        numbers = list(range(start, min(start + batch_size, len(data))))
        yield numbers, encoder.features([data.image(n) for n in numbers])


def stored_scores(model, image: Any, texts: list[Any]) -> dict[str, tuple[int, np.ndarray]]:
    """For each way to store pictures: bytes of one, vectors of the first stage included, and scores with all captions."""
    vectors = search_vectors(model, image)
    first = 2 * vectors[0].shape[1] * (len(vectors[0]) + 1)
    forms = {"float16": TokenFormat(), "int8": TokenFormat("int8")}
    if image.patch_saliency is not None:
        num_patches = image.patch_embeds.shape[1]
        for share in SHARES:
            for dtype in ("float16", "int8"):
                forms[f"{share:.0%} of the patches, {dtype}"] = TokenFormat(dtype, max(round(share * num_patches), 1))
    found = {"float32": (2 * to_rows(image, TokenFormat()).itemsize + first, _scores(model, image, texts))}
    for name, form in forms.items():
        rows = to_rows(image, form)
        found[name] = rows.itemsize + first, _scores(model, from_rows(rows, device=model.device), texts)
    matrices = torch.nn.functional.normalize(torch.stack(vectors), dim=-1).half().float()
    found["first stage alone"] = first, torch.cat([_max_sim(model, matrices, text) for text in texts], 1).cpu().numpy()
    return found


def _scores(model, image: Any, texts: list[Any]) -> np.ndarray:
    return torch.cat([model.score(image, text) for text in texts], dim=1).cpu().numpy()


def _max_sim(model, matrices: torch.Tensor, text: Any) -> torch.Tensor:
    """(B, K, d) and C captions -> (B, C)."""
    return torch.stack([(matrices @ words.T).amax(1).mean(1) for words in search_vectors(model, text)], dim=1)


def two_stages(
    images: GranAlignIndex, captions: GranAlignIndex, data: CaptionedImages, candidates: int
) -> dict[str, np.ndarray]:
    """Scores (images, captions) of both ways to search; what is no candidate has minus infinity."""
    row_of = {name: n for n, name in enumerate(data.image_ids)}
    shape = len(data), len(data.all_captions)
    found = {side: np.full(shape, -np.inf, np.float32) for side in RECALLS}
    for column, caption in enumerate(tqdm(data.all_captions, desc="captions")):
        for result in images.search(text=caption, top_k=candidates, candidates=candidates):
            found["text_to_image"][row_of[result.id], column] = result.score
    for row in tqdm(range(len(data)), desc="images"):
        for result in captions.search(image=data.image(row), top_k=candidates, candidates=candidates):
            found["image_to_text"][row, int(result.id)] = result.score
    return found


def search_ms(index: GranAlignIndex, captions: list[str], candidates: int) -> float:
    """The median time of a search for the ten best of some captions, text encoder included."""
    seconds = []
    for caption in captions[:: max(len(captions) // TIMED_SEARCHES, 1)]:
        started = time.perf_counter()
        index.search(text=caption, candidates=candidates)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def tables(results: dict[str, Any]) -> str:
    head = ["checkpoint", "rSum, all pairs", "rSum, two stages", "share of it (%)", "candidates", "images", "captions"]
    shares = [
        [name, f"{of['exact']['rsum']:.1f}", f"{of['two_stages']['rsum']:.1f}", f"{100 * of['share']:.2f}"]
        + [str(of[size]) for size in ("candidates", "num_images", "num_captions")]
        for name, of in results.items()
    ]
    rows = [
        [name, row["stored"], f"{row['bytes']:,}", f"{row['rsum']:.1f}"]
        for name, of in results.items()
        for row in of["curve"]
    ]
    curve = markdown_table([["checkpoint", "stored", "bytes a picture", "rSum"], *rows])
    runs = [
        [
            name,
            str(run["tokens"]),
            f"{run['index_seconds']:.0f}",
            f"{run['bytes_on_disk'] / 1e6:.0f}",
            f"{run['search_ms']:.0f}",
        ]
        for name, run in ((name, of["run"]) for name, of in results.items())
    ]
    times = ["checkpoint", "tokens", "seconds to index", "MB on disk", "ms a search"]
    return f"{markdown_table([head, *shares])}\n{markdown_table([times, *runs])}\n{curve}"


if __name__ == "__main__":
    main()
