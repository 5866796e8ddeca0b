"""Qdrant Edge: the engine of Qdrant in this process, for one machine (`pip install 'granalign-hf[index]'`).

A shard with a log can be open in one process alone, and that one writes. So the writer publishes copies without the log,
which any number of processes read; a reader keeps the copy that it opened.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import qdrant_edge as qdrant

from ..whole_files import write_whole
from . import EXACT_UP_TO, MOST_VECTORS_OF_A_GRAPH, Engine, Hit, Item, Point, conditions, document, item_of, point_id

PAGE = 1000  # items of a scan that are in memory at once
BLOCK = 2**20  # bytes; a block of zeros is not written to a copy, since most of a shard's files is room to grow


class Edge(Engine):
    """
    Args:
        folder: of the shard and its copies. dim: d.
        num_vectors: K, of most items; up to 16, collections above 100,000 items get a graph (HNSW).
        is_writer: `False`: the copy that was published last.

    Raises:
        FileNotFoundError: nothing was published yet.
    """

    def __init__(self, folder: Path, dim: int, num_vectors: int, is_writer: bool):
        super().__init__(dim)
        self.folder, self.is_writer = folder, is_writer
        if not is_writer:
            self.shard = _load_published(folder)
        elif (folder / "shard" / "edge_config.json").is_file():
            self.shard = qdrant.EdgeShard.load(str(folder / "shard"))
        else:
            self.shard = _create(folder / "shard", dim, num_vectors)
            self.publish()

    def _upsert(self, points: Sequence[Point]) -> None:
        self._change(
            qdrant.UpdateOperation.upsert_points(
                [
                    qdrant.Point(
                        point_id(point.item.id), {"regions": point.regions, "pooled": point.pooled}, document(point.item)
                    )
                    for point in points
                ]
            )
        )

    def delete(self, ids: Sequence[str]) -> None:
        self._change(qdrant.UpdateOperation.delete_points([point_id(id) for id in ids]))

    def _change(self, operation: qdrant.UpdateOperation) -> None:
        (self.folder / "unpublished").touch()
        self.shard.update(operation)

    def _search(self, name: str, matrix: np.ndarray, k: int, where: list[list[str]], prefetch: int | None) -> list[Hit]:
        if k < 1:
            return []
        condition = _filter(where)
        first = None if prefetch is None else [_nearest("pooled", matrix.mean(0), prefetch, condition)]
        if name == "pooled":
            query = qdrant.Query.Nearest(matrix.mean(0), using=name)
            scale = 1
        else:
            query, scale = qdrant.Query.Nearest(matrix, using=name), len(matrix)
        request = qdrant.QueryRequest(query=query, limit=k, prefetches=first, filter=condition, with_payload=True)
        return [Hit(item_of(point.payload), point.score / scale) for point in self.shard.query(request)]

    def get(self, ids: Sequence[str]) -> list[Item]:
        return [item_of(record.payload) for record in self.shard.retrieve([point_id(id) for id in ids], True, False)]

    def scan(self, where: dict | None = None) -> Iterator[Item]:
        condition, offset = _filter(conditions(where)), None
        while True:
            request = qdrant.ScrollRequest(offset=offset, limit=PAGE, filter=condition, with_payload=True)
            records, offset = self.shard.scroll(request)
            yield from (item_of(record.payload) for record in records)
            if offset is None:
                return

    def count(self, where: dict | None = None) -> int:
        return self.shard.count(qdrant.CountRequest(exact=True, filter=_filter(conditions(where))))

    def commit(self) -> None:
        self.shard.flush()

    def publish(self) -> None:
        """Makes what was written visible to those who open the folder for reading: a copy, in time and room of the shard."""
        self.shard.optimize()
        self.shard.flush()
        number = _published(self.folder) + 1
        target = self.folder / f"copy-{number}"
        shutil.rmtree(target, ignore_errors=True)  # of a process that was killed while it copied
        shutil.copytree(self.folder / "shard", target, ignore=shutil.ignore_patterns("wal"), copy_function=_copy)
        config = json.loads((target / "edge_config.json").read_text())
        (target / "edge_config.json").write_text(json.dumps(config | {"wal_enabled": False}))
        write_whole(self.folder / "published", str(number))
        (self.folder / "unpublished").unlink(missing_ok=True)
        for old in self.folder.glob("copy-*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)  # who has it open keeps it

    def close(self) -> None:
        if self.is_writer and is_unpublished(self.folder):
            self.publish()
        self.shard.close()


def is_unpublished(folder: Path) -> bool:
    """Whether a writer has written since it last published: it is at work, or was killed."""
    return (folder / "unpublished").is_file()


def _create(folder: Path, dim: int, num_vectors: int) -> qdrant.EdgeShard:
    has_graph = num_vectors <= MOST_VECTORS_OF_A_GRAPH
    half = {"size": dim, "distance": qdrant.Distance.Dot, "datatype": qdrant.VectorStorageDatatype.Float16}
    regions = qdrant.EdgeVectorParams(
        **half,
        multivector_config=qdrant.MultiVectorConfig(qdrant.MultiVectorComparator.MaxSim),
        hnsw_config=qdrant.HnswIndexConfig(m=16 if has_graph else 0, ef_construct=100, full_scan_threshold=10_000),
    )
    kilobytes = EXACT_UP_TO * (num_vectors if has_graph else 1) * dim * 2 // 1024
    config = qdrant.EdgeConfig(
        vectors={"regions": regions, "pooled": qdrant.EdgeVectorParams(**half)},
        optimizers=qdrant.EdgeOptimizersConfig(indexing_threshold=kilobytes),
    )
    folder.mkdir(parents=True, exist_ok=True)
    shard = qdrant.EdgeShard.create(str(folder), config)
    shard.update(qdrant.UpdateOperation.create_field_index("terms", qdrant.PayloadSchemaType.Keyword))
    return shard


def _published(folder: Path) -> int:
    path = folder / "published"
    return int(path.read_text()) if path.is_file() else 0


def _load_published(folder: Path, num_tries: int = 20) -> qdrant.EdgeShard:
    """The last copy. If there is a newer one afterwards, this one may have gone away while it was opened: then that one."""
    for _ in range(num_tries):
        number = _published(folder)
        try:
            shard = qdrant.EdgeShard.load(str(folder / f"copy-{number}"))
        except Exception:
            if number == _published(folder):
                raise
            continue
        if number == _published(folder):
            return shard
        shard.close()  # of a copy that is half gone the engine may have read an empty shard
    raise FileNotFoundError(f"{folder} is published faster than it can be opened.")


def _filter(where: list[list[str]]) -> qdrant.Filter | None:
    if not where:
        return None
    return qdrant.Filter(must=[qdrant.FieldCondition("terms", match=qdrant.MatchAny(words)) for words in where])


def _nearest(name: str, vector: np.ndarray, limit: int, condition: qdrant.Filter | None) -> qdrant.Prefetch:
    return qdrant.Prefetch(limit, qdrant.Query.Nearest(vector, using=name), filter=condition)


def _copy(source: str, target: str) -> None:
    """A file with holes where it has zeros."""
    with open(source, "rb") as read, open(target, "wb") as write:
        while block := read.read(BLOCK):
            if block.count(0) == len(block):
                write.seek(len(block), 1)
            else:
                write.write(block)
        write.truncate(read.tell())
