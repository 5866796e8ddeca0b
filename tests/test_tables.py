"""Data sets by name: folders of files, what no data set may do, and what is not there."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value
from test_pictures import NOISE, PNG

from granalign_hf.training import tables
from granalign_hf.training.data import load_split
from granalign_hf.training.streams import StreamedImages

pytestmark = [
    pytest.mark.usefixtures("library_cache"),
    # `datasets` leaves a metadata.csv open that it has looked into.
    pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning"),
]


def write_folder(folder: Path, rows: list[dict], kind: str) -> str:
    """Pictures with their metadata beside them; the red of picture n is n."""
    (folder / "train" / "inner").mkdir(parents=True)
    for n in range(3):
        picture = NOISE.copy()
        picture.paste((n, 0, 0), (0, 0, *picture.size))
        picture.save(folder / "train" / ("inner" if n == 2 else "") / f"{n}.png")
    if kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = "\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]) + "\n"
    (folder / "train" / f"metadata.{kind}").write_text(text)
    return str(folder)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_of_pictures_with_one_caption_a_row(tmp_path, kind):
    rows = [{"file_name": name, "text": f"a {name}"} for name in ("0.png", "1.png", "inner/2.png")]
    data = load_split(write_folder(tmp_path / "data", rows, kind), "train")
    assert data.captions == [["a 0.png"], ["a 1.png"], ["a inner/2.png"]]
    assert [data.image(n).getpixel((0, 0))[0] for n in range(3)] == [0, 1, 2]


def test_a_folder_of_pictures_with_lists_of_captions(tmp_path):
    rows = [{"file_name": "0.png", "captions": ["a", "b"]}, {"file_name": "inner/2.png", "captions": ["c"]}]
    name = write_folder(tmp_path / "data", rows, "jsonl")
    data = load_split(name, "train")
    assert data.captions == [["a", "b"], ["c"]] and data.image(1).getpixel((0, 0))[0] == 2
    streamed = load_split(name, "train", streaming=True)
    assert streamed.captions == data.captions and streamed.image(1).tobytes() == data.image(1).tobytes()
    items = list(StreamedImages.open(name, "train", seed=0, batch_size=2, steps_per_epoch=1, shuffle_buffer=2))
    assert sorted(item["image"].getpixel((0, 0))[0] for item in items) == [0, 2]


def test_a_broken_picture_of_a_folder_is_named_by_its_file(tmp_path):
    name = write_folder(tmp_path / "data", [{"file_name": "0.png", "text": "a"}], "jsonl")
    (tmp_path / "data" / "train" / "0.png").write_bytes(PNG[:300])
    with pytest.raises(ValueError, match=r"\(row 0\) \(file .*/data/train/0\.png\) cannot be read: .*truncated"):
        load_split(name, "train").image(0)


def test_a_link_in_a_folder_that_leads_out_is_refused(tmp_path):
    name = write_folder(tmp_path / "data", [{"file_name": "0.png", "text": "a"}], "jsonl")
    (tmp_path / "data" / "train" / "0.png").unlink()
    NOISE.save(tmp_path / "secret.png")
    (tmp_path / "data" / "train" / "0.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match=r"the path '.*0\.png' leads out of the data set"):
        load_split(name, "train").image(0)


@pytest.mark.parametrize("file", ["../secret.png", "{}/secret.png", "file://{}/secret.png", "train/../../secret.png"])
def test_a_file_name_that_leads_out_is_refused(tmp_path, file):
    """In the metadata of a folder, in a column of names, and as the path of a picture."""
    NOISE.save(tmp_path / "secret.png")
    file = file.format(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_split(write_folder(tmp_path / "data", [{"file_name": file, "text": "a"}], "jsonl"), "train")
    (tmp_path / "names").mkdir()
    row = {"filename": [file], "caption": ["a"]}
    Dataset.from_dict(row).to_parquet(tmp_path / "names" / "train.parquet")
    with pytest.raises(ValueError, match=r"leads out of `image_folder`|has no picture '.*', which row 0 of"):
        load_split(str(tmp_path / "names"), "train", image_folder=str(tmp_path / "data"))
    (tmp_path / "paths").mkdir()
    row = {"image": [{"bytes": None, "path": file}], "caption": ["a"], "image_id": ["7"]}
    kinds = Features({"image": Image(), "caption": Value("string"), "image_id": Value("string")})
    pq.write_table(Dataset.from_dict(row, features=kinds).data.table, tmp_path / "paths" / "train.parquet")
    with pytest.raises(ValueError, match=r"Image `7` .*leads out of the data set"):
        load_split(str(tmp_path / "paths"), "train").image(0)


def test_a_link_in_an_image_folder_that_leads_out_is_refused(tmp_path):
    NOISE.save(tmp_path / "secret.png")
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "a.png").symlink_to(tmp_path / "secret.png")
    Dataset.from_dict({"filename": ["a.png"], "caption": ["a"]}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=r"Row 0 of `filename` .* names 'a\.png', which leads out of `image_folder`"):
        load_split(str(tmp_path / "data"), "train", image_folder=str(tmp_path / "photographs"))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_of_a_data_set_is_run(tmp_path):
    """Neither a loading script nor a pickle, whatever its file is called."""
    burst = tmp_path / "burst"
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text(f"open({str(burst)!r}, 'w')\n")
    bomb = pickle.dumps(Bomb(burst))
    (tmp_path / "pickles").mkdir()
    for name in ("train.pkl", "train.parquet", "train.arrow"):
        (tmp_path / "pickles" / name).write_bytes(bomb)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_bytes(bomb)
    np.save(tmp_path / "object.npy", np.array([Bomb(burst)], dtype=object), allow_pickle=True)
    (tmp_path / "picture").mkdir()
    row = {
        "image": [{"bytes": (tmp_path / "object.npy").read_bytes(), "path": "x.png"}],
        "caption": ["a"],
        "image_id": ["7"],
    }
    kinds = Features({"image": Image(), "caption": Value("string"), "image_id": Value("string")})
    Dataset.from_dict(row, features=kinds).to_parquet(tmp_path / "picture" / "train.parquet")
    for name in ("script", "pickles", "saved"):
        for streaming in (False, True):
            with pytest.raises(ValueError):
                load_split(str(tmp_path / name), "train", streaming=streaming)
    with pytest.raises(ValueError, match=r"`7` .*cannot be read"):
        load_split(str(tmp_path / "picture"), "train").image(0)
    assert not burst.exists()
    pickle.loads(bomb)
    assert burst.exists()


def test_remote_code_is_never_asked_for():
    for path in Path(tables.__file__).parent.glob("*.py"):
        assert "trust_remote_code" not in path.read_text(), path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is neither a folder nor on the Hub"),
        ({"train.parquet": b"no parquet"}, "cannot be loaded: .*Name a copy in Parquet"),
        ({"train.jsonl": b'{"caption": '}, "cannot be loaded: "),
        ({"train.jsonl": b""}, "cannot be loaded: |is empty"),
        ({"train.csv": b"a,b\n1,2,3,4\n1\n"}, "cannot be loaded: |no image column"),
        ({"state.json": b"{}"}, "neither a folder nor"),
        ({"dataset_dict.json": b"{}"}, "cannot be loaded: "),
        ({"dataset_dict.json": b'{"splits": ["train"]}'}, "cannot be loaded: |neither a folder nor"),
    ],
)
def test_files_that_are_no_data_set_are_refused(tmp_path, files, message):
    (tmp_path / "data").mkdir()
    for name, content in files.items():
        (tmp_path / "data" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path / 'data'}.*({message})"):
        load_split(str(tmp_path / "data"), "train")


def test_splits_are_listed_without_reading(tmp_path, monkeypatch):
    write_folder(tmp_path / "data", [{"file_name": "0.png", "text": "a"}], "jsonl")
    Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(tables, "load_dataset", lambda *args: pytest.fail("read"))
    assert tables.split_names(str(tmp_path / "data"), None) == tables.split_names(str(tmp_path / "saved"), None) == ["train"]
