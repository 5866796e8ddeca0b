"""One contract, all engines: they find what the formula says, filters compare values, a commit outlives the process.

A real server takes part where `QDRANT_URL` is set, such as http://localhost:6333; otherwise it is skipped.
"""

import multiprocessing
import os
import signal
import uuid
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from granalign_hf.engines import Item, Point, conditions, terms
from granalign_hf.engines.brute_force import BruteForce

edge = pytest.importorskip("granalign_hf.engines.edge")
server = pytest.importorskip("granalign_hf.engines.server")

DIM, NUM_VECTORS = 16, 3
URL = os.environ.get("QDRANT_URL")


def unit(rng, *shape):
    vectors = rng.normal(size=(*shape, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def point(number, payload=None, num_vectors=NUM_VECTORS, seed=0):
    rng = np.random.default_rng((seed, number))
    return Point(Item(f"p{number}", payload or {}, [0, number, 7]), unit(rng, num_vectors), unit(rng))


def open_server(client):
    name = f"granalign-test-{uuid.uuid4()}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Payload indexes have no effect in the local Qdrant")
        server.create_collection(client, name, DIM, NUM_VECTORS, {"made for": "tests"})
    return server.Server(client, name, DIM)


@pytest.fixture(params=["brute force", "edge", "client in memory", "server"])
def engine(request, tmp_path):
    if request.param == "brute force":
        yield BruteForce(tmp_path, DIM)
    elif request.param == "edge":
        engine = edge.Edge(tmp_path, DIM, NUM_VECTORS, is_writer=True)
        yield engine
        engine.close()
    else:
        if request.param == "server" and URL is None:
            pytest.skip("QDRANT_URL is not set")
        engine = open_server(server.QdrantClient(":memory:" if request.param != "server" else URL))
        yield engine
        engine.client.delete_collection(engine.collection)
        engine.close()


def expected(points, matrix, name="regions"):
    """By the formula, in float16 vectors: (score, id), best first."""
    found = []
    for one in points:
        vectors = one.regions if name == "regions" else one.pooled[None]
        products = vectors.astype(np.float16).astype(np.float32) @ matrix.T
        score = products.max(0).mean() if name == "regions" else products.mean()
        found.append((float(score), one.item.id))
    return sorted(found, reverse=True)


def found(hits):
    return [hit.item.id for hit in hits]


def test_scores_are_the_mean_over_query_vectors_of_the_best_product(engine):
    points = [point(n, num_vectors=1 + n % 4) for n in range(30)]
    engine.upsert(points)
    matrix = unit(np.random.default_rng(9), 5)
    for name in ("regions", "pooled"):
        hits, oracle = engine.search(name, matrix, 7), expected(points, matrix, name)[:7]
        assert found(hits) == [id for _, id in oracle]
        np.testing.assert_allclose([hit.score for hit in hits], [score for score, _ in oracle], atol=2e-3)
    assert hits[0].item == next(one.item for one in points if one.item.id == hits[0].item.id)


def test_a_prefetch_looks_at_the_nearest_pooled_vectors_only(engine):
    points = [point(n) for n in range(30)]
    engine.upsert(points)
    matrix = unit(np.random.default_rng(5), 4)
    nearest = {id for _, id in expected(points, matrix, "pooled")[:6]}
    oracle = [id for _, id in expected(points, matrix) if id in nearest]
    assert found(engine.search("regions", matrix, 10, prefetch=6)) == oracle != found(engine.search("regions", matrix, 6))


def test_an_upsert_replaces_and_a_delete_forgets(engine):
    engine.upsert([point(n) for n in range(5)])
    engine.upsert([point(3, {"new": True}, seed=1)])
    assert engine.count() == 5
    assert [item.payload for item in engine.get(["p3", "missing"])] == [{"new": True}]
    matrix = point(3, seed=1).regions
    assert engine.search("regions", matrix, 1)[0].item.id == "p3"
    engine.delete(["p3", "missing"])
    assert engine.count() == 4 and engine.get(["p3"]) == []
    assert "p3" not in found(engine.search("regions", matrix, 10))
    assert sorted(item.id for item in engine.scan()) == ["p0", "p1", "p2", "p4"]


PAYLOADS = [
    {"place": "beach", "year": 2019, "is_night": True, "tags": ["dog", "ball"], "a.b": "dot", "ratio": 0.5},
    {"place": "beach", "year": 2020, "is_night": False, "tags": ["dog"], "a": {"b": "dot"}, "ratio": 1.0},
    {"place": "park", "year": 1, "is_night": None, "tags": [], '"] OR true': "x", "number": True},
    {"place": 'be"ach', "year": "2019", "number": 1},
]


@pytest.mark.parametrize(
    ("where", "numbers"),
    [
        ({"place": "beach"}, [0, 1]),
        ({"place": "beach", "year": 2019}, [0]),
        ({"place": ["beach", "park"]}, [0, 1, 2]),
        ({"year": [2019, "2019"]}, [0, 3]),
        ({"is_night": True}, [0]),
        ({"is_night": None}, [2]),
        ({"number": 1}, [3]),
        ({"tags": "dog"}, [0, 1]),
        ({"ratio": 1}, [1]),
        ({"a.b": "dot"}, [0]),
        ({"a": "dot"}, []),
        ({"place": 'be"ach'}, [3]),
        ({"place": '*" OR place != "'}, []),
        ({'"] OR true': "x"}, [2]),
        ({"place": []}, []),
        ({"nothing": "here"}, []),
        ({}, [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_filters_compare_values(engine, where, numbers):
    engine.upsert([point(n, payload) for n, payload in enumerate(PAYLOADS)])
    expected_ids = [f"p{n}" for n in numbers]
    matrix = unit(np.random.default_rng(1), 2)
    assert sorted(item.id for item in engine.scan(where)) == expected_ids
    assert engine.count(where) == len(numbers)
    assert sorted(found(engine.search("regions", matrix, 10, where))) == expected_ids
    assert sorted(found(engine.search("regions", matrix, 10, where, prefetch=4))) == expected_ids


def test_payloads_come_back_as_they_were(engine):
    engine.upsert([point(n, payload) for n, payload in enumerate(PAYLOADS)])
    assert [engine.get([f"p{n}"])[0].payload for n in range(len(PAYLOADS))] == PAYLOADS
    assert engine.get(["p2"])[0].place == [0, 2, 7]


def test_an_empty_engine_finds_nothing(engine):
    assert engine.search("regions", unit(np.random.default_rng(0), 2), 3) == []
    assert engine.count() == 0 and list(engine.scan()) == []
    engine.upsert([])


def test_a_wrong_width_is_refused_before_anything_is_written(engine):
    narrow = Point(Item("narrow", {}), np.ones((2, 3), np.float32), np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"'narrow' must have the shapes \(K, 16\) and \(16,\).* got \(2, 3\)"):
        engine.upsert([point(0), narrow])
    with pytest.raises(ValueError, match=r"`matrix` must have the shape \(Q, 16\)"):
        engine.search("regions", np.ones((2, 3), np.float32), 1)
    with pytest.raises(ValueError, match="`name` must be one of"):
        engine.search("patches", np.ones((2, DIM), np.float32), 1)
    assert engine.count() == 0


@pytest.mark.parametrize("where", [{"key": {"nested": 1}}, {"key": [1, object()]}, {1: "x"}, ["place"]])
def test_a_filter_that_is_none_is_refused(where):
    with pytest.raises(ValueError, match="`where`"):
        conditions(where)


def test_terms_are_json_pairs():
    assert terms({"b": [1, True], "a": "x", "c": {"d": 1}, "e": 2.0}) == [
        '["a", "x"]',
        '["b", 1]',
        '["b", true]',
        '["e", 2]',
    ]


def durable_engines(folder):
    return [BruteForce(folder / "torch", DIM), edge.Edge(folder / "edge", DIM, NUM_VECTORS, is_writer=True)]


def write_and_die(folder):
    for engine in durable_engines(folder):
        engine.upsert([point(n) for n in range(10)])
        engine.delete(["p4"])
        engine.commit()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_commit_outlives_a_kill(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=write_and_die, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    for engine in durable_engines(tmp_path):
        assert sorted(item.id for item in engine.scan()) == sorted(f"p{n}" for n in range(10) if n != 4)
        engine.close()


def test_readers_of_edge_see_what_was_published(tmp_path):
    writer = edge.Edge(tmp_path, DIM, NUM_VECTORS, is_writer=True)
    first = edge.Edge(tmp_path, DIM, NUM_VECTORS, is_writer=False)
    writer.upsert([point(n) for n in range(4)])
    writer.commit()
    assert first.count() == 0 and edge.is_unpublished(tmp_path)
    writer.publish()
    second, third = (edge.Edge(tmp_path, DIM, NUM_VECTORS, is_writer=False) for _ in range(2))
    writer.delete(["p0"])
    matrix = point(0).regions
    assert [reader.count() for reader in (first, second, third)] == [0, 4, 4]
    assert second.search("regions", matrix, 1)[0].item.id == "p0"
    for engine in (first, second, third, writer):
        engine.close()
    assert not edge.is_unpublished(tmp_path)
    last = edge.Edge(tmp_path, DIM, NUM_VECTORS, is_writer=False)
    assert last.count() == 3
    last.close()


def test_a_copy_that_is_replaced_while_it_is_opened_is_not_read(tmp_path, monkeypatch):
    """Half of its files may be gone by then."""
    writer, opened, load = edge.Edge(tmp_path, DIM, NUM_VECTORS, is_writer=True), [], edge.qdrant.EdgeShard.load

    class Shard:
        @staticmethod
        def load(path):
            opened.append(Path(path).name)
            shard = load(path)
            if len(opened) == 1:
                writer.publish()
            return shard

    monkeypatch.setattr(edge, "qdrant", SimpleNamespace(**{**vars(edge.qdrant), "EdgeShard": Shard}))
    edge._load_published(tmp_path).close()
    assert opened == ["copy-1", "copy-2"]
    writer.close()


def test_edge_builds_a_graph_above_its_threshold(tmp_path, monkeypatch):
    monkeypatch.setattr(edge, "EXACT_UP_TO", 100)
    engine = edge.Edge(tmp_path, DIM, NUM_VECTORS, is_writer=True)
    points = [point(n) for n in range(200)]
    engine.upsert(points)
    engine.publish()
    assert engine.shard.info().indexed_vectors_count > 0
    matrix = point(7).regions
    assert engine.search("regions", matrix, 1)[0].item.id == "p7"
    engine.close()


def test_settings_travel_with_a_collection():
    client = server.QdrantClient(":memory:")
    engine = open_server(client)
    assert server.collection_settings(client, engine.collection) == {"made for": "tests"}
    assert server.collection_settings(client, "another") is None
    with pytest.raises(ValueError, match="There is a collection"):
        server.create_collection(client, engine.collection, DIM, NUM_VECTORS, {})
    with pytest.raises(ValueError, match="http://HOST:PORT/COLLECTION"):
        server.connect("http://localhost:6333")
    client.close()
