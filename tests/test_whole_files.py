"""A file is as before or as it should be."""

import pytest

from granalign_hf.whole_files import whole_file, write_whole


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "record.json"
    write_whole(path, "before")
    with whole_file(path) as unfinished:
        unfinished.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_a_file_that_cannot_be_finished_leaves_the_one_before(tmp_path):
    path = tmp_path / "record.json"
    write_whole(path, "before")
    with pytest.raises(OSError, match="disk is full"), whole_file(path) as unfinished:
        unfinished.write_text("ha")
        raise OSError("disk is full")
    assert path.read_text() == "before"
    write_whole(path, "after")
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]
