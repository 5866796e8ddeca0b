"""Located phrases: of drawn scenes, of a table beside the photographs, and of nothing that does not fit."""

from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from granalign_hf.training.data import CaptionedImages, load_split
from granalign_hf.training.phrases import LocatedCaption, Phrase, located_captions

FLICKR = Path(__file__).parents[2] / "shared" / "data"
BOX = [1.0, 2.0, 3.0, 4.0]


def photographs() -> CaptionedImages:
    table = Dataset.from_dict(
        {"image": [PILImage.new("RGB", (8, 8))] * 2, "captions": [["a dog"], ["a cat", "it"]]},
        features=Features({"image": Image(), "captions": List(Value("string"))}),
    )
    return CaptionedImages(table, "image", [0, 1], ["dog.jpg", "cat.jpg"], [["a dog"], ["a cat", "it"]])


def save_boxes(folder: Path, rows: list[tuple[str, str, list[dict]]]) -> str:
    names, captions, phrases = (list(column) for column in zip(*rows, strict=True))
    Dataset.from_dict({"filename": names, "caption": captions, "phrases": phrases}).to_parquet(folder / "test.parquet")
    return str(folder)


def phrase(start: int, end: int, boxes=(BOX,)) -> dict:
    return {"char_start": start, "char_end": end, "boxes": list(boxes), "types": ["animals"]}


def test_a_table_is_joined_by_the_name_of_the_picture(tmp_path):
    """In the order of the images, without those of other splits and without captions that have no phrase."""
    rows = [("cat.jpg", "a cat", [phrase(0, 5)]), ("other.jpg", "a bird", [phrase(0, 6)])]
    rows += [("dog.jpg", "a dog", [phrase(2, 5)]), ("dog.jpg", "it", [])]
    found = located_captions(photographs(), save_boxes(tmp_path, rows), "test")
    assert found == [
        LocatedCaption(0, "a dog", (Phrase(2, 5, (tuple(BOX),), ("animals",)),)),
        LocatedCaption(1, "a cat", (Phrase(0, 5, (tuple(BOX),), ("animals",)),)),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("x.jpg", "a dog", [phrase(0, 5)])], r"None of the images .* 'x\.jpg' of `filename` is none of .*'dog\.jpg'"),
        ([("dog.jpg", "a dog", [phrase(2, 9)])], "must be characters of its caption .*, got 2 to 9 of 'a dog'"),
        ([("dog.jpg", "a dog", [phrase(2, 5, boxes=())])], r"with the boxes \[\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, rows, message):
    filler = [("dog.jpg", "a dog", [phrase(2, 5)])] if rows[0][0] == "dog.jpg" else []
    with pytest.raises(ValueError, match=message):
        located_captions(photographs(), save_boxes(tmp_path, rows + filler), "test")


def test_data_without_phrases_are_refused():
    with pytest.raises(ValueError, match="has no column `phrases` of boxes"):
        located_captions(photographs(), None, "test")


def test_scenes_know_where_their_words_are():
    scenes = load_split("scenes", "test", num_scenes=2)
    found = located_captions(scenes, None, "test")
    assert [caption.caption for caption in found] == scenes.all_captions
    entries = [entry for row in scenes.table["phrases"] for caption in row for entry in caption]
    phrases = [(caption.caption[p.start : p.end], p.boxes) for caption in found for p in caption.phrases]
    assert phrases == [(entry["phrase"], tuple(tuple(box) for box in entry["boxes"])) for entry in entries]


@pytest.mark.skipif(not FLICKR.is_dir(), reason="no photographs here")
def test_real_boxes_meet_real_photographs():
    data = load_split(str(FLICKR / "flickr8k"), "test")
    found = located_captions(data, str(FLICKR / "flickr8k_phrase_boxes"), "test")
    assert sum(len(caption.phrases) for caption in found) == 13_061
    assert len({caption.image for caption in found}) > 990
    assert all(caption.caption in data.captions[caption.image] for caption in found[:500])
