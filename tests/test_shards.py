"""Rows come back from where they were put, whatever was cut off in between."""

import numpy as np
import pytest

from granalign_hf import shards
from granalign_hf.shards import TokenShards

SHORT = np.dtype([("tokens", "<f2", (3, 4)), ("weights", "|i1", (3,))])
LONG = np.dtype([("tokens", "<f2", (5, 4)), ("weights", "|i1", (5,))])


def rows(dtype, count, seed=0):
    rng = np.random.default_rng(seed)
    made = np.zeros(count, dtype)
    made["tokens"] = rng.normal(size=made["tokens"].shape)
    made["weights"] = rng.integers(-128, 128, made["weights"].shape)
    return made


def read(store, places):
    found = {}
    for numbers, shard, rows in store.read(places):
        found |= dict(zip(numbers, shard[rows]))
    return [found[n] for n in range(len(places))]


def test_rows_of_two_layouts_come_back_from_both_writer_and_reader(tmp_path):
    writer, reader = TokenShards(tmp_path, True), TokenShards(tmp_path, False)
    written, places = [], []
    for seed, dtype in enumerate([SHORT, LONG, SHORT, LONG, SHORT]):
        written += list(rows(dtype, 4, seed))
        places += writer.append(rows(dtype, 4, seed))
        for store in (writer, reader):  # the reader's maps grow with the file
            order = np.random.default_rng(seed).permutation(len(places))
            for n, row in zip(order, read(store, [places[n] for n in order])):
                assert row.tobytes() == written[n].tobytes()
    assert {place[0] for place in places} == {0, 1}
    assert all(reader.is_whole(place) for place in places)
    assert reader.num_bytes() == sum(row.nbytes for row in written)


def test_a_full_shard_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 2 * SHORT.itemsize)
    store = TokenShards(tmp_path, True)
    places = [store.append(rows(SHORT, 1, seed))[0] for seed in range(5)]
    places += TokenShards(tmp_path, True).append(rows(SHORT, 1, 5))
    assert [place[:2] for place in places] == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]


def test_what_is_left_of_a_half_written_row_is_cut_off(tmp_path):
    places = TokenShards(tmp_path, True).append(rows(SHORT, 3))
    with open(tmp_path / "000000.bin", "ab") as file:
        file.write(b"half")
    store = TokenShards(tmp_path, True)
    places += store.append(rows(SHORT, 2, 1))
    assert [place[1] for place in places] == [0, 1, 2, 3, 4]
    assert all(store.is_whole(place) for place in places)


def test_a_row_that_did_not_fit_on_the_disk_misplaces_none_after_it(tmp_path):
    store = TokenShards(tmp_path, True)
    places = store.append(rows(SHORT, 3))
    with open(tmp_path / "000000.bin", "ab") as file:
        file.write(b"half")  # what a write that failed has left, in a store that stays open
    places += store.append(rows(SHORT, 2, 1))
    assert all(store.is_whole(place) for place in places)


def test_what_is_missing_or_changed_is_noticed(tmp_path):
    store = TokenShards(tmp_path, True)
    places = store.append(rows(SHORT, 3))
    with open(tmp_path / "000000.bin", "r+b") as file:
        file.seek(SHORT.itemsize)
        file.write(b"\xff\xff")
    reader = TokenShards(tmp_path, False)
    assert [reader.is_whole(place) for place in places] == [True, False, True]
    assert not reader.is_whole([0, 3, 0]) and not reader.is_whole([1, 0, 0])
    with pytest.raises(ValueError, match=r"row 7 of .* are missing"):
        list(reader.read([places[0], [0, 7, 0]]))
