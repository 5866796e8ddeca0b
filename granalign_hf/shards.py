"""Rows of numbers in files that only grow, read memory-mapped: where the tokens of an index are.

A shard is a file of rows of one numpy dtype, and a JSON file beside it that says which. A place is [shard, row, checksum].
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .whole_files import write_whole

SHARD_BYTES = 2**28  # a shard that is larger gets no further rows


class TokenShards:
    """
    Args:
        folder: of the shards; made by a writer.
        is_writer: rows may be appended, by one process at a time. What is left of a row half-written by a process that was
            killed is cut off.
    """

    def __init__(self, folder: Path, is_writer: bool):
        self.folder, self.is_writer = folder, is_writer
        self._maps: dict[int, np.memmap] = {}
        self._growing: dict[str, int] = {}  # of each dtype the shard that gets its rows
        if is_writer:
            folder.mkdir(parents=True, exist_ok=True)
            for number in self._numbers():
                size, row = self._file(number).stat().st_size, self._dtype(number).itemsize
                os.truncate(self._file(number), size - size % row)

    def append(self, rows: np.ndarray) -> list[list[int]]:
        """Rows, a structured array (n,) -> their places. They are on the disk when this returns."""
        number = self._shard_for(rows.dtype)
        content = [row.tobytes() for row in rows]
        with open(self._file(number), "ab") as file:
            first = file.tell() // rows.dtype.itemsize
            file.truncate(first * rows.dtype.itemsize)  # what is left of a row that could not be written, on a full disk
            file.write(b"".join(content))
            file.flush()
            os.fsync(file.fileno())
        return [[number, first + n, zlib.crc32(one)] for n, one in enumerate(content)]

    def read(self, places: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], np.memmap, list[int]]]:
        """One shard after another: which of the places are there, the shard as a structured array, and their rows in it.

        Raises:
            ValueError: a place is not there.
        """
        numbers = np.array([place[0] for place in places], int)
        for number in np.unique(numbers):
            chosen = np.flatnonzero(numbers == number).tolist()
            rows = [places[n][1] for n in chosen]
            yield chosen, self._map(int(number), max(rows)), rows

    def is_whole(self, place: Sequence[int]) -> bool:
        """Whether the row is there and is what was written."""
        try:
            ((_, shard, (row,)),) = self.read([place])
        except ValueError:
            return False
        return zlib.crc32(shard[row].tobytes()) == place[2]

    def num_bytes(self) -> int:
        return sum(self._file(number).stat().st_size for number in self._numbers())

    def _shard_for(self, dtype: np.dtype) -> int:
        """The last shard of this dtype, or a new one if there is none or it is full."""
        key = _describe(dtype)
        if key not in self._growing:
            own = [number for number in self._numbers() if _describe(self._dtype(number)) == key]
            self._growing[key] = own[-1] if own else self._new(key)
        if self._file(self._growing[key]).stat().st_size >= SHARD_BYTES:
            self._growing[key] = self._new(key)
        return self._growing[key]

    def _new(self, key: str) -> int:
        number = max(self._numbers(), default=-1) + 1
        self._file(number).touch()
        write_whole(self._file(number).with_suffix(".json"), key)
        return number

    def _map(self, number: int, row: int) -> np.memmap:
        """A shard as far as it has grown."""
        if number not in self._maps or row >= len(self._maps[number]):
            path = self._file(number)
            if not path.is_file() or path.stat().st_size < (row + 1) * self._dtype(number).itemsize:
                raise ValueError(f"The tokens in row {row} of {path} are missing. Add their items to the index again.")
            dtype = self._dtype(number)
            length = path.stat().st_size // dtype.itemsize
            self._maps[number] = np.memmap(path, dtype, "r", shape=(length,))
        return self._maps[number]

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.json"))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.bin"

    def _dtype(self, number: int) -> np.dtype:
        fields = json.loads(self._file(number).with_suffix(".json").read_text())
        return np.dtype([(name, kind, tuple(shape)) for name, kind, shape in fields])


def _describe(dtype: np.dtype) -> str:
    """A structured dtype as JSON: name, kind and shape of each field."""
    return json.dumps([(name, dtype[name].base.str, dtype[name].shape) for name in dtype.names or ()])
