"""`granalign index`: a folder of pictures becomes an index that can be searched."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import add_command, add_model, load, show


def add_parser(subparsers: Any) -> None:
    summary = "make a folder of pictures searchable, or go on with it"
    parser = add_command(
        subparsers, "index", run, summary, "granalign index photographs --out my.index --model runs/photographs"
    )
    parser.add_argument(
        "folder", help="its pictures, and those of the folders in it; the name of a picture is its path there"
    )
    parser.add_argument("--out", required=True, metavar="INDEX", help="a folder; if it is an index, new pictures are added")
    parser.add_argument(
        "--tokens",
        choices=("auto", "int8", "float16", "none"),
        default="auto",
        help="kept for the exact score (default: int8, none for VSE++, which needs none)",
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures in a step (default: 32)")
    add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    """Raises ValueError: there are no pictures in the folder, or the index has others of their names, or other tokens."""
    from PIL import Image

    from granalign_hf.retrieval import GranAlignIndex

    folder, formats = Path(arguments.folder), Image.registered_extensions()
    endings = {ending for ending, name in formats.items() if name in Image.OPEN}
    names = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file()
    )
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Name the one that has the pictures.")
    if not names:
        raise ValueError(f"There are no pictures in {folder}: no file there has the ending of one, such as .jpg.")
    model, processor = load(arguments)
    tokens = None if arguments.tokens == "none" else arguments.tokens
    if (Path(arguments.out) / "index.json").is_file():
        index = GranAlignIndex.open(arguments.out, model, processor, mode="a")
    else:
        index = GranAlignIndex.create(arguments.out, model, processor, tokens=tokens)
    with index:
        if tokens not in ("auto", index.settings["tokens"]):
            raise ValueError(f"{arguments.out} has tokens as {index.settings['tokens']}: leave out --tokens.")
        paths = [{"path": str((folder / name).resolve())} for name in names]
        others = index.get(names)
        for name, path in zip(names, paths, strict=True):
            if others.get(name, path) != path:
                raise ValueError(
                    f"{name} is in {arguments.out} already, as that of {others[name]['path']}. Give each folder an index of "
                    "its own, or index the folder that they are in."
                )
        added = index.add([folder / name for name in names], names, paths, batch_size=arguments.batch_size)
        size = len(index)
    answer = {"num_added": added.num_added, "num_skipped": added.num_skipped, "refused": added.refused, "num_items": size}
    lines = [f"{added.num_added} added, {added.num_skipped} were in already, {size} in {arguments.out}"]
    show(arguments, answer, [*lines, *(f"refused: {name}: {reason}" for name, reason in added.refused.items())])
