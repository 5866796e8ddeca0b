"""Where candidates are found: items with a few unit-length vectors each, searched by MaxSim. One interface, three engines.

`brute_force.py` is torch and needs nothing else, `edge.py` is Qdrant Edge in the process, `server.py` a Qdrant server or
cluster. Every item has the vectors `regions` (K, d) and `pooled` (d,), in float16.
"""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

VECTORS = ("regions", "pooled")
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_OID, "granalign")  # of the ids of items in an engine
EXACT_UP_TO = 100_000  # items; above, an engine that can build a graph does so
MOST_VECTORS_OF_A_GRAPH = 16  # an item; with more, candidates by `pooled` are cheaper than a graph


@dataclass(frozen=True)
class Item:
    """What is indexed.

    Attributes:
        id: the user's. payload: what the user wants to know of it, as JSON has it.
        place: where its tokens are, see `TokenShards`; `None` without tokens.
    """

    id: str
    payload: dict[str, Any]
    place: list[int] | None = None


@dataclass(frozen=True)
class Point:
    """An item and its vectors: `regions` (K, d), `pooled` (d,), float32 of length 1."""

    item: Item
    regions: np.ndarray
    pooled: np.ndarray


@dataclass(frozen=True)
class Hit:
    """An item and its score: the mean over query vectors of the highest product with one of its vectors."""

    item: Item
    score: float


class Engine(ABC):
    """What the index asks of an engine. What is written is kept after `commit`.

    `where` is a filter of payloads: every key must have the value, or one of a list of values. It never becomes part of a
    query language: see [`terms`].
    """

    def __init__(self, dim: int):
        self.dim = dim

    def upsert(self, points: Sequence[Point]) -> None:
        """Adds items, or replaces those with the same id.

        Raises:
            ValueError: the vectors of an item have another width.
        """
        for point in points:
            if point.regions.ndim != 2 or {point.regions.shape[-1], *point.pooled.shape} != {self.dim}:
                raise ValueError(
                    f"The vectors of {point.item.id!r} must have the shapes (K, {self.dim}) and ({self.dim},) of this "
                    f"index, got {point.regions.shape} and {point.pooled.shape}."
                )
        if points:
            self._upsert(points)

    def search(
        self, name: str, matrix: np.ndarray, k: int, where: dict | None = None, prefetch: int | None = None
    ) -> list[Hit]:
        """The k best items, best first.

        Args:
            name: the vectors to search, `regions` or `pooled`.
            matrix: (Q, d) query vectors.
            prefetch: look only at so many items, whose `pooled` is nearest to the mean query vector.

        Raises:
            ValueError: `name` is neither, or `matrix` has another width.
        """
        if name not in VECTORS:
            raise ValueError(f"`name` must be one of {VECTORS}, got {name!r}.")
        if matrix.ndim != 2 or matrix.shape[1] != self.dim or len(matrix) == 0:
            raise ValueError(f"`matrix` must have the shape (Q, {self.dim}) of this index, got {matrix.shape}.")
        return self._search(name, matrix.astype(np.float32), k, conditions(where), prefetch)

    @abstractmethod
    def _upsert(self, points: Sequence[Point]) -> None: ...

    @abstractmethod
    def _search(self, name: str, matrix: np.ndarray, k: int, where: list[list[str]], prefetch: int | None) -> list[Hit]: ...

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> None:
        """Forgets items; ids that are not there do no harm."""

    @abstractmethod
    def get(self, ids: Sequence[str]) -> list[Item]:
        """Those of the items that are there, in any order."""

    @abstractmethod
    def scan(self, where: dict | None = None) -> Iterator[Item]:
        """All items that the filter leaves."""

    @abstractmethod
    def count(self, where: dict | None = None) -> int: ...

    @abstractmethod
    def commit(self) -> None:
        """What was written is kept from now on, whatever happens to this process."""

    def publish(self) -> None:
        """Those who open the engine from now on see what was written; after a `commit` they do anyway, but for Edge."""
        self.commit()

    @abstractmethod
    def close(self) -> None: ...


# --------------------------------------------------------------------------------------------------- payloads and filters


def terms(payload: dict[str, Any]) -> list[str]:
    """Each (key, value) of a payload as a word of its own, in JSON; of a list each value.

    Filters compare these words as a whole. So true is not 1, a number is not a text, and no key is read as a path. Values
    that are dictionaries cannot be searched for.
    """
    pairs = [(key, one) for key, value in payload.items() for one in (value if isinstance(value, list) else [value])]
    return sorted({_term(key, value) for key, value in pairs if not isinstance(value, dict | list)})


def conditions(where: dict[str, Any] | None) -> list[list[str]]:
    """A filter as words: of each list one must be among the terms of a payload.

    Raises:
        ValueError: it is no dictionary, or asks for what is no text, number, bool or `None`.
    """
    if where is not None and not isinstance(where, dict):
        raise ValueError(f"`where` must be a dictionary of keys and values, got {type(where).__name__}.")
    found = []
    for key, value in (where or {}).items():
        values = list(value) if isinstance(value, list | tuple | set) else [value]
        for one in values:
            if not isinstance(key, str) or not isinstance(one, str | int | float | bool | None):
                raise ValueError(
                    f"`where` takes a text, number, bool or None, or a list of them, for each key, got {one!r} for {key!r}."
                )
        found.append([_term(key, one) for one in values])
    return found


def _term(key: str, value: Any) -> str:
    is_whole = isinstance(value, float) and value.is_integer()
    return json.dumps([key, int(value) if is_whole else value])


# ----------------------------------------------------------------------------------------- what the Qdrant engines share


def point_id(id: str) -> str:
    """The id of an item in an engine."""
    return str(uuid.uuid5(NAMESPACE, id))


def document(item: Item) -> dict[str, Any]:
    """An item as an engine stores it."""
    return asdict(item) | {"terms": terms(item.payload)}


def item_of(stored: dict[str, Any]) -> Item:
    return Item(stored["id"], stored["payload"], stored["place"])
