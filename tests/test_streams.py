"""A stream gives every image its turn, whoever shares it; an epoch has its steps; what cannot be read is counted."""

import io
import itertools
import json
from collections import Counter

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from safetensors.torch import load_file
from tiny import TEXT, tiny_processor, tiny_tokenizer
from torch.utils.data import DataLoader
from transformers import AutoModel

from granalign_hf.training import train
from granalign_hf.training.batches import Collator
from granalign_hf.training.data import load_split
from granalign_hf.training.loaders import prepare, training_loader
from granalign_hf.training.pictures import UnreadableImageError
from granalign_hf.training.streams import StreamedImages

FEATURES = Features({"image": Image(), "captions": List(Value("string")), "image_id": Value("string")})


def png(number: int) -> dict:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 6), (number, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{number}.png"}


def write(folder, num_files: int, rows_per_file: int, split="train", broken=()) -> str:
    """A folder of Parquet files; the red of picture n is n, and so is its caption."""
    for file in range(num_files):
        numbers = range(file * rows_per_file, (file + 1) * rows_per_file)
        columns = {
            "image": [png(n) if n not in broken else {"bytes": b"nothing", "path": f"{n}.png"} for n in numbers],
            "captions": [[f"a {n}", f"b {n}"] for n in numbers],
            "image_id": [f"id {n}" for n in numbers],
        }
        folder.mkdir(exist_ok=True)
        table = Dataset.from_dict(columns, features=FEATURES)
        table.to_parquet(folder / f"{split}-{file:05}-of-{num_files:05}.parquet")
    return str(folder)


def images(name: str, **settings) -> StreamedImages:
    defaults = {"seed": 0, "batch_size": 2, "steps_per_epoch": 3, "shuffle_buffer": 3, "crop_scale": 1.0}
    return StreamedImages.open(name, "train", **defaults | settings)


def numbers(items) -> list[int]:
    return [item["image"].getpixel((0, 0))[0] for item in items]


def loader(stream: StreamedImages, num_workers: int) -> DataLoader:
    return DataLoader(
        stream, stream.batch_size, num_workers=num_workers, collate_fn=numbers, persistent_workers=num_workers > 0
    )


def test_every_image_has_its_turn_in_another_order(tmp_path):
    stream = images(write(tmp_path / "data", 3, 4), steps_per_epoch=6)
    orders = []
    for epoch in range(3):
        stream.epoch = epoch
        orders.append(numbers(stream))
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in [*orders, list(range(12))]}) == 4
    assert numbers(images(write(tmp_path / "data", 3, 4), steps_per_epoch=6)) == orders[0]
    assert numbers(images(write(tmp_path / "data", 3, 4), steps_per_epoch=6, seed=1)) != orders[0]


def test_an_epoch_goes_on_where_the_last_one_ended(tmp_path):
    stream = images(write(tmp_path / "data", 2, 6))
    seen = []
    for epoch in range(4):
        stream.epoch = epoch
        seen.append(numbers(stream))
    assert [len(part) for part in seen] == [6] * 4
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(12))
    for epoch in (3, 1):  # a run that is resumed, or an epoch that was left, reads the stream again
        fresh = images(write(tmp_path / "data", 2, 6))
        fresh.epoch = stream.epoch = epoch
        next(iter(stream))
        assert numbers(fresh) == numbers(stream) == seen[epoch]


@pytest.mark.parametrize("num_files", [8, 3, 1])
def test_processes_and_workers_share_the_rows(tmp_path, num_files):
    """By files where these can be shared evenly, else row by row; the workers live through the epochs."""
    name = write(tmp_path / "data", num_files, 24 // num_files)
    parts = [images(name, process=(p, 2), num_workers=2, batch_size=3, steps_per_epoch=4) for p in range(2)]
    loaders = [loader(part, num_workers=2) for part in parts]
    for epoch in range(2):
        for part in parts:
            part.epoch = epoch
        batches = [list(one) for one in loaders]
        assert [len(one) for one in batches] == [4, 4] and len(loaders[0]) == 4
        assert sorted(itertools.chain(*batches[0], *batches[1])) == list(range(24))


def test_an_uneven_number_of_steps_is_shared_too(tmp_path):
    name = write(tmp_path / "data", 1, 10)
    seen = Counter()
    stream = images(name, num_workers=2, batch_size=2, steps_per_epoch=5)
    batches = loader(stream, num_workers=2)
    for epoch in range(5):
        stream.epoch = epoch
        step = [batch for batch in batches]
        assert len(step) == 5 and all(len(batch) == 2 for batch in step)
        seen.update(itertools.chain(*step))
    assert set(seen) == set(range(10)) and max(seen.values()) - min(seen.values()) <= 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_left_of_an_epoch_can_be_read_anew(tmp_path, num_workers):
    """As a run does that goes on in the middle of an epoch; the next epoch follows as ever."""
    name = write(tmp_path / "data", 2, 7)
    settings = {"steps_per_epoch": 5, "num_workers": num_workers}

    def prepared(stream):
        batches = training_loader(stream, collated, stream.batch_size, num_workers, torch.Generator(), is_pinned=False)
        weight = torch.nn.Linear(1, 1)
        return prepare(Accelerator(cpu=True), weight, torch.optim.SGD(weight.parameters()), batches)[-1]

    def epoch(stream, batches, number):
        stream.epoch = number
        return [batch["reds"].tolist() for batch in batches]

    whole = images(name, **settings)
    batches = prepared(whole)
    expected = [epoch(whole, batches, number) for number in range(3)]
    assert all(len(one) == 5 for one in expected)
    again = images(name, **settings)
    batches = prepared(again)
    assert epoch(again, skip_first_batches(batches, 3), 1) == expected[1][3:]
    assert epoch(again, batches, 2) == expected[2]


def collated(items) -> dict[str, torch.Tensor]:
    return {"reds": torch.tensor(numbers(items))}


def test_items_are_those_of_a_table(tmp_path):
    """Drawn, cropped and numbered alike in every process, and equal ids are one image."""
    name = write(tmp_path / "data", 1, 6)
    first, second = (
        {item["image"].tobytes(): item for item in images(name, process=(p, 2), steps_per_epoch=1, batch_size=3)}
        for p in range(2)
    )
    assert not {item["number"] for item in first.values()} & {item["number"] for item in second.values()}
    again = {item["number"]: item for item in images(name, shuffle_buffer=1, seed=0)}
    for item in (*first.values(), *second.values()):
        assert again[item["number"]]["captions"] == item["captions"] and len(item["captions"]) == 1
    batch = Collator(tiny_processor(), 0.0)(list(again.values()))
    assert batch["image_ids"].tolist() == batch["caption_image_ids"].tolist() == list(again)


def test_without_an_image_id_the_picture_is_the_image(tmp_path):
    table = Dataset.from_dict(
        {"image": [png(1), png(2), png(1)], "caption": ["a", "c", "b"]},
        features=Features({"image": Image(), "caption": Value("string")}),
    )
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "train.parquet")
    items = list(images(str(tmp_path / "data"), batch_size=3, steps_per_epoch=1))
    owner = {item["captions"][0]: item["number"] for item in items}
    assert owner["a"] == owner["b"] != owner["c"]


def test_unreadable_images_are_skipped_and_counted_up_to_the_share(tmp_path, caplog):
    name = write(tmp_path / "data", 1, 12, broken=(3, 7))
    with pytest.raises(
        UnreadableImageError, match=r"Image `id [37]` \(file [37]\.png\) cannot be read.*`max_corrupt_share`"
    ):
        list(images(name, steps_per_epoch=6))
    settings = {"steps_per_epoch": 5, "max_corrupt_share": 0.2}
    stream, seen, counts = images(name, **settings), [], []
    for epoch in range(2):
        stream.epoch = epoch
        seen.append(numbers(stream))
        counts.append(stream.num_corrupt)
    assert sorted(seen[0]) == sorted(seen[1]) == [n for n in range(12) if n not in (3, 7)]
    assert sum(counts) in (3, 4)  # the last one of a pass may not be met before the epoch ends
    assert "left out: Image `id 3` (file 3.png) cannot be read" in caplog.text and "`id 7`" in caplog.text
    fresh = images(name, **settings)
    fresh.epoch = 1
    assert numbers(fresh) == seen[1] and fresh.num_corrupt == counts[1]
    with pytest.raises(ValueError, match=r"2 images cannot be read, more than `max_corrupt_share` 0\.1 of the 10 images"):
        list(images(name, steps_per_epoch=5, max_corrupt_share=0.1))


def test_pictures_of_a_folder_whose_names_come_as_a_stream(tmp_path):
    (tmp_path / "photographs").mkdir()
    (tmp_path / "data").mkdir()
    for n in range(4):
        (tmp_path / "photographs" / f"{n}.png").write_bytes(png(n)["bytes"])
    rows = [{"filename": f"{n}.png", "caption": f"a {n}"} for n in range(4)]
    file = tmp_path / "data" / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"columns": {"image_folder": str(tmp_path / "photographs")}, "steps_per_epoch": 2}
    assert sorted(numbers(images(str(tmp_path / "data"), **options))) == list(range(4))
    file.write_text(json.dumps({"filename": "../data/train.jsonl", "caption": "a"}) + "\n")
    with pytest.raises(ValueError, match=r"Row of the stream of `filename` .* leads out of `image_folder`"):
        list(images(str(tmp_path / "data"), **options))


def test_a_column_chooses_the_rows_of_a_stream(tmp_path):
    columns = {"image": [png(n) for n in range(4)], "caption": list("abcd"), "part": ["x", "y", "x", "z"]}
    kinds = Features({"image": Image(), "caption": Value("string"), "part": Value("string")})
    (tmp_path / "data").mkdir()
    Dataset.from_dict(columns, features=kinds).to_parquet(tmp_path / "data" / "test.parquet")
    settings = {"seed": 0, "batch_size": 1, "shuffle_buffer": 1}
    parts = [("x", 2, [0, 2]), ("x+z", 3, [0, 2, 3])]
    for split, count, expected in parts:
        stream = StreamedImages.open(str(tmp_path / "data"), split, split_column="part", steps_per_epoch=count, **settings)
        assert sorted(numbers(stream)) == expected
    data = load_split(str(tmp_path / "data"), "y", split_column="part", streaming=True)
    assert data.captions == [["b"]] and data.image(0).getpixel((0, 0)) == (1, 0, 0)


def test_what_is_no_stream_is_refused(tmp_path):
    Dataset.from_dict({"caption": ["a"]}).save_to_disk(tmp_path / "saved")
    for name in ("scenes", str(tmp_path / "saved")):
        with pytest.raises(ValueError, match="`streaming` is for data sets that are read from files"):
            images(name)
    name = write(tmp_path / "data", 1, 2)
    with pytest.raises(ValueError, match="has no row for one of 3 processes and workers"):
        list(images(name, process=(2, 3)))
    with pytest.raises(ValueError, match=r"no split 'dev'; its splits are \['train'\]"):
        load_split(name, "dev", streaming=True)


def test_a_run_on_a_stream(tmp_path, capsys):
    """The record says that nobody counted, the card too; resumed, it ends with the same bits."""
    name = write(tmp_path / "data", 2, 8, broken=(5,))
    write(tmp_path / "data", 1, 6, split="validation")
    TEXT["bert"]().save_pretrained(tmp_path / "bert")
    AutoModel.from_config(TEXT["bert"]()).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    vision = {"model_type": "vit", "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "intermediate_size": 16}
    words = ["--dataset", name, "--streaming", "true", "--steps_per_epoch", "4", "--batch_size", "4", "--epochs", "2"]
    words += ["--text_encoder", str(tmp_path / "bert"), "--vision_config", json.dumps(vision), "--report_to", "none"]
    words += ["--max_corrupt_share", "0.2", "--lr_scheduler", "constant", "--num_workers", "1"]
    words += ["--eval_interval", "1"]
    state = train.main([*words, "--output_dir", str(tmp_path / "run")])
    assert [record["corrupt_images"] for record in state["history"]] == [1, 1]
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["num_train_images"] is None and record["num_corrupt_images"] == 2
    card = (tmp_path / "run" / "README.md").read_text()
    assert "a stream of images, which was not counted. Images that could not be read were left out: 2." in card
    assert not (tmp_path / "run" / "training_images.npz").exists()
    resumed = [*words, "--output_dir", str(tmp_path / "resumed")]
    train.main([*resumed, "--epochs", "1"])
    assert train.main([*resumed, "--resume"])["history"] == state["history"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "resumed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    shown = capsys.readouterr().err
    assert "pairs/s=" in shown and "waiting=" in shown and "corrupt=1" in shown
