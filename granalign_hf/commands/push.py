"""`granalign push`: a checkpoint on the Hub."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from .common import add_command, show


def add_parser(subparsers: Any) -> None:
    summary = "publish a checkpoint on the Hub, and compare what comes back from there with what is here"
    parser = add_command(subparsers, "push", run, summary, "granalign push runs/demo-scenes org/granalign --private")
    parser.add_argument("folder", metavar="FOLDER", help="a checkpoint, such as the output_dir of a training")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="the repository; it is made if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="if it is made, only for the members of ORG")
    parser.add_argument("--revision", metavar="BRANCH", help="made if it does not exist (default: main)")
    parser.add_argument("--license", metavar="NAME", help="of the weights, such as cc-by-nc-4.0 (default: none is claimed)")
    parser.add_argument("--message", default="Upload model", help="of the commit (default: Upload model)")


def run(arguments: argparse.Namespace) -> None:
    from granalign_hf.hub import push

    options = {"private": arguments.private, "revision": arguments.revision, "license": arguments.license}
    published = push(arguments.folder, arguments.repo_id, commit_message=arguments.message, **options)
    lines = [f"{len(published.files)} files are at {published.url}", "Downloaded again, they give the same scores."]
    show(arguments, asdict(published), lines)
