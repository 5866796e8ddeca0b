"""Every product of all query vectors with all vectors, in torch: the mode without an engine, and the oracle of the tests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..whole_files import whole_file
from . import VECTORS, Engine, Hit, Item, Point, conditions, item_of, terms


class BruteForce(Engine):
    """Items in memory; what changed since the last `commit` becomes a file of its own, so that a commit is whole or absent.

    Args:
        folder: of these files. `None`: in memory alone.
    """

    def __init__(self, folder: Path | None, dim: int):
        super().__init__(dim)
        self.folder = folder
        self.items: dict[str, Item] = {}
        self.vectors: dict[str, tuple[Tensor, Tensor]] = {}
        self._changed: dict[str, None] = {}  # in the order of the first change
        self._stacked: tuple[list[str], dict[str, Tensor]] | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("*.safetensors")):
                self._replay(path)

    def _search(self, name: str, matrix: np.ndarray, k: int, where: list[list[str]], prefetch: int | None) -> list[Hit]:
        ids, stacked = self._stack()
        if not ids:
            return []
        is_left = torch.tensor([_passes(self.items[id], where) for id in ids])
        query = torch.from_numpy(matrix)
        if prefetch is not None:
            nearest = (stacked["pooled"].float() @ query.mean(0, keepdim=True).T)[:, 0, 0].masked_fill(~is_left, -torch.inf)
            is_left &= torch.zeros_like(is_left).index_fill(0, nearest.topk(min(prefetch, len(ids))).indices, True)
        products = (stacked[name].float() @ query.T).nan_to_num(-torch.inf)  # (items, K, Q)
        scores = products.amax(1).mean(1).masked_fill(~is_left, -torch.inf)
        best = scores.topk(min(k, int(is_left.sum())))
        return [Hit(self.items[ids[n]], score) for n, score in zip(best.indices.tolist(), best.values.tolist())]

    def _stack(self) -> tuple[list[str], dict[str, Tensor]]:
        """Ids, and of each name (items, K, d) with NaN where an item has fewer vectors."""
        if self._stacked is None:
            ids = list(self.items)
            stacked = {}
            for number, name in enumerate(VECTORS if ids else ()):
                matrices = [self.vectors[id][number].reshape(-1, self.dim) for id in ids]
                stacked[name] = pad_sequence(matrices, batch_first=True, padding_value=torch.nan)
            self._stacked = ids, stacked
        return self._stacked

    def _upsert(self, points: Sequence[Point]) -> None:
        for point in points:
            self.items[point.item.id] = point.item
            self.vectors[point.item.id] = torch.from_numpy(point.regions).half(), torch.from_numpy(point.pooled).half()
        self._touch([point.item.id for point in points])

    def delete(self, ids: Sequence[str]) -> None:
        for id in ids:
            self.items.pop(id, None)
            self.vectors.pop(id, None)
        self._touch(ids)

    def _touch(self, ids: Sequence[str]) -> None:
        self._changed |= dict.fromkeys(ids)
        self._stacked = None

    def get(self, ids: Sequence[str]) -> list[Item]:
        return [self.items[id] for id in ids if id in self.items]

    def scan(self, where: dict | None = None) -> Iterator[Item]:
        words = conditions(where)
        return (item for item in list(self.items.values()) if _passes(item, words))

    def count(self, where: dict | None = None) -> int:
        return sum(1 for _ in self.scan(where))

    def commit(self) -> None:
        if self.folder is None or not self._changed:
            return
        kept = [id for id in self._changed if id in self.items]
        tensors: dict[str, Tensor] = {}
        for number, id in enumerate(kept):
            tensors |= {f"{number}.{name}": vector for name, vector in zip(VECTORS, self.vectors[id])}
        notes = {
            "items": [asdict(self.items[id]) for id in kept],
            "deleted": [id for id in self._changed if id not in self.items],
        }
        path = self.folder / f"{len(list(self.folder.glob('*.safetensors'))):08d}.safetensors"
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, {name: json.dumps(note) for name, note in notes.items()})
        self._changed = {}

    def _replay(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            notes = {name: json.loads(note) for name, note in file.metadata().items()}
            for id in notes["deleted"]:
                self.items.pop(id, None)
                self.vectors.pop(id, None)
            for number, stored in enumerate(notes["items"]):
                regions, pooled = (file.get_tensor(f"{number}.{name}") for name in VECTORS)
                self.items[stored["id"]], self.vectors[stored["id"]] = item_of(stored), (regions, pooled)

    def close(self) -> None:
        self.commit()


def _passes(item: Item, where: list[list[str]]) -> bool:
    own = set(terms(item.payload)) if where else set()
    return all(own.intersection(words) for words in where)
