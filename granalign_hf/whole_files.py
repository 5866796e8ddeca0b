"""Files that are either as before or as they should be, whenever the process or the machine stops."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file, beside `path`, whose place it takes when the block ends without an error."""
    unfinished = path.with_name(f"{path.name}{UNFINISHED}")
    yield unfinished
    to_disk(unfinished)
    unfinished.replace(path)


def to_disk(path: Path) -> None:
    """Brings a file to the disk, so that not even a power cut leaves what comes after it without it."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
