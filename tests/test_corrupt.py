"""Training images that cannot be read are named, counted and left out, up to the share that is allowed."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from processes import run_processes
from test_pictures import NOISE, PNG

from granalign_hf.training import evaluate, train
from granalign_hf.training.corrupt import without_corrupt
from granalign_hf.training.data import CaptionedImages, load_split
from granalign_hf.training.loaders import prepare, training_loader
from granalign_hf.training.pictures import UnreadableImageError
from granalign_hf.training.streams import StreamedImages

FEATURES = Features({"image": Image(), "captions": List(Value("string")), "filename": Value("string")})


def table(num_images: int, broken=()) -> Dataset:
    pictures = [{"bytes": PNG[:300] if n in broken else PNG, "path": None} for n in range(num_images)]
    captions = [[f"a {n}", f"b {n}"] for n in range(num_images)]
    names = [f"{n}.png" for n in range(num_images)]
    return Dataset.from_dict({"image": pictures, "captions": captions, "filename": names}, features=FEATURES)


@pytest.fixture
def data(tmp_path) -> CaptionedImages:
    """Of twenty images the third and the tenth cannot be read."""
    DatasetDict({"train": table(20, broken=(3, 10))}).save_to_disk(tmp_path / "data")
    return load_split(str(tmp_path / "data"), "train")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_cannot_be_read_is_left_out_and_named(data, num_workers, caplog):
    readable = without_corrupt(data, 0.1, num_workers)
    kept = [n for n in range(20) if n not in (3, 10)]
    assert readable.corrupt == ["3.png", "10.png"] and readable.rows == kept
    assert readable.captions == [data.captions[n] for n in kept] and readable.image_ids == [f"{n}.png" for n in kept]
    assert readable.image(3).tobytes() == NOISE.tobytes()
    assert "2 of 20 training images cannot be read and are left out:\nImage `3.png` (row 3) cannot be read" in caplog.text
    assert "Image `10.png` (row 10)" in caplog.text


def test_more_than_the_share_is_refused(data):
    message = r"2 of 20 training images cannot be read, more than `max_corrupt_share` 0\.09 allows.*`3\.png`.*`10\.png`"
    with pytest.raises(ValueError, match=message):
        without_corrupt(data, 0.09, 0)


def test_a_path_that_leads_out_is_no_broken_picture(data, tmp_path):
    NOISE.save(tmp_path / "x.png")
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "x.png")}], "captions": [["a"]], "filename": ["x.png"]}
    outside = CaptionedImages(Dataset.from_dict(rows, features=FEATURES), "image", [0], ["x.png"], [["a"]])
    with pytest.raises(ValueError, match="leads out of the data set"):
        without_corrupt(outside, 0.9, 0)


def words(folder, **settings) -> list[str]:
    common = {"dataset": folder / "data", "output_dir": folder / "run", "batch_size": 4, "epochs": 1, "report_to": "none"}
    return [word for name, value in (common | settings).items() for word in (f"--{name}", str(value))]


def test_a_run_records_what_it_left_out(tmp_path):
    parts = {"train": table(12, broken=(5,)), "validation": table(4), "test": table(4, broken=(2,))}
    DatasetDict(parts).save_to_disk(tmp_path / "data")
    with pytest.raises(UnreadableImageError, match=r"`5\.png` \(row 5\)"):
        train.main(words(tmp_path))
    train.main(words(tmp_path, max_corrupt_share=0.1))
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (record["num_corrupt_images"], record["corrupt_images"]) == (1, ["5.png"])
    assert (record["num_train_images"], record["num_train_captions"]) == (11, 22)
    assert "Images that could not be read were left out: 1." in (tmp_path / "run" / "README.md").read_text()
    assert evaluate.main([str(tmp_path / "run"), *words(tmp_path)[:2], "--split", "validation"])["num_images"] == 4
    with pytest.raises(UnreadableImageError, match=r"`2\.png` \(row 2\)"):  # evaluation never skips
        evaluate.main([str(tmp_path / "run"), *words(tmp_path)[:2], "--split", "test"])


def one_of_two_processes(rank: int, folder: Path) -> None:
    accelerator = Accelerator()
    readable = without_corrupt(load_split(str(folder / "data"), "train"), 0.1, 0)
    settings = {"batch_size": 2, "steps_per_epoch": 4, "shuffle_buffer": 4, "max_corrupt_share": 0.3}
    stream = StreamedImages.open(str(folder / "files"), "train", seed=0, process=(rank, 2), **settings)
    loader = training_loader(stream, lambda items: {"number": [i["number"] for i in items]}, 2, 0, torch.Generator(), False)
    weight = torch.nn.Linear(1, 1)
    *_, loader = prepare(accelerator, weight, torch.optim.SGD(weight.parameters()), loader)
    numbers = [number for batch in loader for number in batch["number"]]
    told = {"left out": readable.corrupt, "numbers": numbers, "steps": len(loader), "corrupt": stream.num_corrupt}
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


def test_two_processes_agree_on_what_is_left_out_and_share_a_stream(data, tmp_path):
    (tmp_path / "files").mkdir()
    data.table.to_parquet(tmp_path / "files" / "train.parquet")
    run_processes(one_of_two_processes, 2, tmp_path)
    one, other = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2))
    assert one["left out"] == other["left out"] == ["3.png", "10.png"]
    assert one["steps"] == other["steps"] == 4 and len(one["numbers"]) == len(other["numbers"]) == 8
    assert len({*one["numbers"], *other["numbers"]}) == 16  # each has rows of its own, whatever cannot be read
