"""A Qdrant server or cluster, where one machine is not enough (`pip install 'granalign-hf[server]'`).

The layout of a collection is that of `edge.py`; sharding and replication are the server's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from qdrant_client import QdrantClient, models

from . import EXACT_UP_TO, MOST_VECTORS_OF_A_GRAPH, Engine, Hit, Item, Point, conditions, document, item_of, point_id

PAGE = 1000


class Server(Engine):
    """
    Args:
        client: of the server. collection: its name there. dim: d.
    """

    def __init__(self, client: QdrantClient, collection: str, dim: int):
        super().__init__(dim)
        self.client, self.collection = client, collection

    def _upsert(self, points: Sequence[Point]) -> None:
        structs = [
            models.PointStruct(
                id=point_id(point.item.id),
                vector={"regions": point.regions.tolist(), "pooled": point.pooled.tolist()},
                payload=document(point.item),
            )
            for point in points
        ]
        self.client.upsert(self.collection, structs, wait=True)

    def delete(self, ids: Sequence[str]) -> None:
        self.client.delete(self.collection, models.PointIdsList(points=[point_id(id) for id in ids]), wait=True)

    def _search(self, name: str, matrix: np.ndarray, k: int, where: list[list[str]], prefetch: int | None) -> list[Hit]:
        if k < 1:
            return []
        condition, mean = _filter(where), matrix.mean(0).tolist()
        first = None if prefetch is None else models.Prefetch(query=mean, using="pooled", limit=prefetch, filter=condition)
        found = self.client.query_points(
            self.collection,
            query=mean if name == "pooled" else matrix.tolist(),
            using=name,
            prefetch=first,
            query_filter=condition,
            limit=k,
        )
        scale = 1 if name == "pooled" else len(matrix)
        return [Hit(item_of(point.payload or {}), point.score / scale) for point in found.points]

    def get(self, ids: Sequence[str]) -> list[Item]:
        records = self.client.retrieve(self.collection, [point_id(id) for id in ids], with_payload=True)
        return [item_of(record.payload or {}) for record in records]

    def scan(self, where: dict | None = None) -> Iterator[Item]:
        condition, offset = _filter(conditions(where)), None
        while True:
            records, offset = self.client.scroll(self.collection, condition, limit=PAGE, offset=offset, with_payload=True)
            yield from (item_of(record.payload or {}) for record in records)
            if offset is None:
                return

    def count(self, where: dict | None = None) -> int:
        return self.client.count(self.collection, count_filter=_filter(conditions(where)), exact=True).count

    def commit(self) -> None:
        """Nothing to do: the server answers after it has written."""

    def close(self) -> None:
        self.client.close()


def connect(url: str) -> tuple[QdrantClient, str]:
    """`http://HOST:PORT/COLLECTION` -> a client and the name of the collection.

    Raises:
        ValueError: the name is missing. ConnectionError: no server answers there.
    """
    parts = urlsplit(url)
    collection = parts.path.strip("/")
    if not collection or "/" in collection:
        raise ValueError(f"The address of an index must be http://HOST:PORT/COLLECTION, got {url!r}.")
    client = QdrantClient(url=f"{parts.scheme}://{parts.netloc}", prefer_grpc=True, check_compatibility=False)
    try:
        client.get_collections()
    except Exception as error:  # gRPC and HTTP have their own
        told = str(error).strip().splitlines()
        raise ConnectionError(
            f"No Qdrant server answers at {parts.netloc}, or its gRPC port 6334 is closed: {told[0] if told else error!r}."
        ) from error
    return client, collection


def create_collection(
    client: QdrantClient, collection: str, dim: int, num_vectors: int, settings: dict[str, Any], **options: Any
) -> None:
    """An empty collection that carries `settings`. `options` are those of `QdrantClient.create_collection`, such as
    `shard_number` and `replication_factor`.

    Raises:
        ValueError: there is a collection of this name.
    """
    has_graph = num_vectors <= MOST_VECTORS_OF_A_GRAPH
    half: dict[str, Any] = {"size": dim, "distance": models.Distance.DOT, "datatype": models.Datatype.FLOAT16}
    regions = models.VectorParams(
        **half,
        multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
        hnsw_config=models.HnswConfigDiff(m=16 if has_graph else 0),
    )
    if client.collection_exists(collection):
        raise ValueError(f"There is a collection {collection!r} already. Open it, or choose another name.")
    kilobytes = EXACT_UP_TO * (num_vectors if has_graph else 1) * dim * 2 // 1024
    client.create_collection(
        collection,
        {"regions": regions, "pooled": models.VectorParams(**half)},
        optimizers_config=models.OptimizersConfigDiff(indexing_threshold=kilobytes),
        metadata=settings,
        **options,
    )
    client.create_payload_index(collection, "terms", models.PayloadSchemaType.KEYWORD)


def collection_settings(client: QdrantClient, collection: str) -> dict[str, Any] | None:
    """What [`create_collection`] was given; `None` if there is no such collection."""
    if not client.collection_exists(collection):
        return None
    return client.get_collection(collection).config.metadata or {}


def _filter(where: list[list[str]]) -> models.Filter | None:
    if not where:
        return None
    return models.Filter(must=[models.FieldCondition(key="terms", match=models.MatchAny(any=words)) for words in where])
