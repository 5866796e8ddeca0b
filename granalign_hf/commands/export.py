"""`granalign export`: a checkpoint as graphs that run without this package."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_command, load, show


def add_parser(subparsers: Any) -> None:
    example = "granalign export --model runs/demo-scenes --format onnx --out runs/demo-scenes-onnx"
    parser = add_command(subparsers, "export", run, "a checkpoint as ONNX or torch.export graphs", example)
    parser.add_argument("--model", required=True, metavar="CHECKPOINT", help="a folder, or a name on the Hub")
    parser.add_argument("--format", choices=("onnx", "torch-export"), default="onnx", help="default: onnx")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where vision, text and scorer go")
    parser.add_argument("--int8", action="store_true", help="quantise the weights of both encoders (onnx)")


def run(arguments: argparse.Namespace) -> None:
    from granalign_hf.export import export

    arguments.device = "cpu"
    model, processor = load(arguments)
    exported = export(model.float(), processor, arguments.out, arguments.format, arguments.int8)
    told = [{"file": str(file), "megabytes": round(file.stat().st_size / 1e6, 1)} for file in exported.files]
    lines = [f"{one['file']}  {one['megabytes']} MB" for one in told]
    lines.append(f"scores differ from the model's by {exported.difference:.1e} at most")
    show(arguments, {"files": told, "difference": exported.difference}, lines)
