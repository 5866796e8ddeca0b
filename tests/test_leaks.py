"""Photographs seen in training are found again under other names, sizes and qualities, and others are not."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from granalign_hf.training import evaluate, leaks, train
from granalign_hf.training.data import CaptionedImages, load_split

FLICKR = Path(__file__).parents[2] / "shared" / "data" / "flickr8k"


def picture(seed, size=(60, 40)):
    """Soft random blobs: as smooth as a photograph."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def changed(image, size, quality=60):
    file = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return Image.open(file)


def split(pictures, prefix):
    table = datasets.Dataset.from_dict(
        {"image": pictures}, features=datasets.Features({"image": datasets.Image()})
    )  # fmt: skip
    names = [f"{prefix}{number}" for number in range(len(pictures))]
    return CaptionedImages(table, "image", list(range(len(pictures))), names, [["a picture"]] * len(pictures))


def test_a_hash_tells_where_it_grows_brighter():
    ramp = Image.fromarray(np.tile(np.arange(17, dtype=np.uint8) * 10, (16, 1)))
    assert (leaks.difference_hash(ramp) == 255).all()
    assert not leaks.difference_hash(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).any()


def test_seen_pictures_are_found_under_another_name_and_size(tmp_path):
    leaks.save_training_images(split([picture(seed) for seed in range(20)], "train"), tmp_path, is_quiet=True)
    tested = [changed(picture(7), (224, 224)), picture(100), changed(picture(3), (90, 60), quality=30), picture(101)]
    found = leaks.find_leaks(split(tested, "test"), tmp_path)
    assert found == [("test0", "train7"), ("test2", "train3")]
    message = leaks.leak_warning(found, 4)
    assert "2 of the 4 images" in message and "test0 (trained on as train7)" in message


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    others = rng.integers(0, 256, (50, 32), dtype=np.uint8)
    hashes = np.concatenate([others[[4, 40]], rng.integers(0, 256, (7, 32), dtype=np.uint8)])
    whole = leaks.nearest(hashes, others)
    monkeypatch.setattr(leaks, "_BLOCK", 100)
    assert leaks.nearest(hashes, others) == whole == [(0, 4), (1, 40)]


def test_without_a_record_nothing_is_found_and_a_broken_one_is_named(tmp_path):
    data = split([picture(0)], "test")
    assert leaks.find_leaks(data, tmp_path) is None
    (tmp_path / leaks.FILE).write_text("nothing")
    with pytest.raises(ValueError, match=r"training_images.npz cannot be read .* Remove it"):
        leaks.find_leaks(data, tmp_path)


def test_a_run_records_its_images_and_an_evaluation_on_them_warns(tmp_path, caplog):
    scenes = load_split("scenes", "test").first(24)
    parts = {name: scenes.table.select(range(*span)) for name, span in (("train", (0, 16)), ("validation", (16, 24)))}
    datasets.DatasetDict({**parts, "test": scenes.table.select(range(8, 20))}).save_to_disk(tmp_path / "data")
    data, folder = str(tmp_path / "data"), str(tmp_path / "run")
    train.main(["--dataset", data, "--output_dir", folder, "--epochs", "1", "--batch_size", "8", "--report_to", "none"])
    result = evaluate.main([folder, "--dataset", data, "--split", "test"])
    assert result["num_images_trained_on"] == 8
    assert "8 of the 12 images were among the training images of this checkpoint" in caplog.text
    assert evaluate.main([folder, "--dataset", data, "--split", "validation"])["num_images_trained_on"] == 0
    (Path(folder) / leaks.FILE).unlink()
    assert evaluate.main([folder, "--dataset", data, "--split", "validation"])["num_images_trained_on"] is None
    assert "images that the training had seen: not recorded" in (Path(folder) / "README.md").read_text()


def test_a_run_records_what_its_checkpoint_was_trained_on_too(tmp_path):
    first, second = split([picture(0), picture(1)], "first"), split([picture(1), picture(2)], "second")
    before, after = tmp_path / "before", tmp_path / "after"
    for folder, data, start in ((before, first, tmp_path / "none"), (after, second, before)):
        folder.mkdir()
        leaks.save_training_images(data, folder, start)
    with np.load(after / leaks.FILE) as record:
        assert len(record["image_ids"]) == len(record["hashes"]) == 3
    assert len(leaks.find_leaks(first, after)) == 2 and len(leaks.find_leaks(second, before)) == 1


@pytest.mark.slow
@pytest.mark.skipif(not FLICKR.is_dir(), reason="needs the photographs of Flickr8k")
def test_photographs():
    """No test photograph is taken for one of 6,000 others; every one is found in its own proportions and another JPEG."""
    train, test = load_split(str(FLICKR), "train"), load_split(str(FLICKR), "test").first(300)
    trained = leaks.image_hashes(train)
    assert leaks.nearest(leaks.image_hashes(test), trained) == []
    rows = [test.table[row] for row in test.rows]
    again = np.stack([leaks.difference_hash(changed(r["image"], (r["orig_width"], r["orig_height"]))) for r in rows])
    assert leaks.nearest(again, leaks.image_hashes(test)) == [(number, number) for number in range(len(test))]
