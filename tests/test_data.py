"""Any data set becomes images with captions, or is refused with the name of what is wrong in it."""

import io

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

from granalign_hf.training.data import _image_ids, load_split


def png(colour: tuple[int, int, int], size=(8, 6)) -> dict:
    buffer = io.BytesIO()
    PILImage.new("RGB", size, colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


RED, BLUE = png((255, 0, 0)), png((0, 0, 255))


def save(folder, columns: dict, features: dict) -> str:
    table = Dataset.from_dict(columns, features=Features(features))
    DatasetDict({"train": table}).save_to_disk(folder)
    return str(folder)


def test_list_of_captions(tmp_path):
    name = save(
        tmp_path,
        {"image": [RED, BLUE], "captions": [["a", "b"], ["c"]]},
        {"image": Image(), "captions": List(Value("string"))},
    )
    data = load_split(name, "train")
    assert data.captions == [["a", "b"], ["c"]]
    assert data.caption_image_index.tolist() == [0, 0, 1]
    assert data.image(1).getpixel((0, 0)) == (0, 0, 255)


def test_one_row_a_caption_is_grouped_by_image_id(tmp_path):
    name = save(
        tmp_path,
        {"picture": [RED, BLUE, RED], "text": ["a", "c", "b"], "filename": ["r.png", "b.png", "r.png"]},
        {"picture": Image(), "text": Value("string"), "filename": Value("string")},
    )
    data = load_split(name, "train")
    assert data.image_ids == ["r.png", "b.png"] and data.captions == [["a", "b"], ["c"]]


def test_one_row_a_caption_is_grouped_by_picture_without_an_id(tmp_path):
    name = save(
        tmp_path, {"image": [RED, BLUE, RED], "caption": ["a", "c", "b"]}, {"image": Image(), "caption": Value("string")}
    )
    assert load_split(name, "train").captions == [["a", "b"], ["c"]]


def test_pictures_of_one_name_and_other_bytes_are_two_images(tmp_path):
    pictures = [RED | {"path": "1.png"}, BLUE | {"path": "1.png"}, RED | {"path": "2.png"}]
    name = save(tmp_path, {"image": pictures, "caption": ["a", "c", "b"]}, {"image": Image(), "caption": Value("string")})
    assert load_split(name, "train").captions == [["a", "b"], ["c"]]


def test_pictures_without_bytes_are_grouped_by_path(tmp_path):
    paths = [str(tmp_path / "red.png"), str(tmp_path / "blue.png")]
    for path, picture in zip(paths, (RED, BLUE), strict=True):
        with open(path, "wb") as file:
            file.write(picture["bytes"])
    table = Dataset.from_dict(
        {"image": [paths[0], paths[1], paths[0]], "caption": ["a", "c", "b"]},
        features=Features({"image": Image(), "caption": Value("string")}),
    )
    ids = _image_ids(table, "image", None, is_one_caption=True)
    assert ids == [paths[0], paths[1], paths[0]]


def test_named_columns_win(tmp_path):
    name = save(
        tmp_path,
        {"a": [RED], "b": [BLUE], "caption": ["no"], "title": ["yes"]},
        {"a": Image(), "b": Image(), "caption": Value("string"), "title": Value("string")},
    )
    data = load_split(name, "train", image_column="b", caption_column="title")
    assert data.captions == [["yes"]] and data.image(0).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("columns", "features", "message"),
    [
        ({"image": [RED]}, {"image": Image()}, "no caption column.*caption_column"),
        ({"caption": ["a"]}, {"caption": Value("string")}, "no image column.*image_column"),
        (
            {"filename": ["a.jpg"], "caption": ["a"]},
            {"filename": Value("string"), "caption": Value("string")},
            "no image column.*image_column`, the folder of the files that it names with `image_folder`",
        ),
        ({"image": [RED, BLUE], "caption": ["a", " "]}, {"image": Image(), "caption": Value("string")}, "Row 1 .*empty"),
        ({"image": [RED], "caption": [None]}, {"image": Image(), "caption": Value("string")}, "Row 0 .*missing caption"),
        ({"image": [RED], "captions": [[]]}, {"image": Image(), "captions": List(Value("string"))}, "Row 0 .*missing"),
        (
            {"image": [RED, None], "caption": ["a", "b"]},
            {"image": Image(), "caption": Value("string")},
            "Row 1 has no image",
        ),
        (
            {"image": [RED, BLUE], "caption": ["a", "b"], "filename": ["r.png", None]},
            {"image": Image(), "caption": Value("string"), "filename": Value("string")},
            "Row 1 has no image id in `filename`",
        ),
    ],
)
def test_broken_data_sets_are_refused_by_name(tmp_path, columns, features, message):
    with pytest.raises(ValueError, match=message):
        load_split(save(tmp_path, columns, features), "train")


def test_missing_split_names_those_that_exist(tmp_path):
    name = save(tmp_path, {"image": [RED], "caption": ["a"]}, {"image": Image(), "caption": Value("string")})
    with pytest.raises(ValueError, match=r"no split 'test'; its splits are \['train'\]"):
        load_split(name, "test")
    with pytest.raises(ValueError, match="no split 'dev'"):
        load_split("scenes", "dev")


def test_unreadable_image_is_named(tmp_path):
    broken = {"bytes": RED["bytes"][:40], "path": None}
    name = save(
        tmp_path,
        {"image": [broken], "caption": ["a"], "filename": ["x.png"]},
        {"image": Image(), "caption": Value("string"), "filename": Value("string")},
    )
    with pytest.raises(ValueError, match=r"`x\.png` \(row 0\) cannot be read"):
        load_split(name, "train").image(0)


def test_grey_and_transparent_images_become_rgb(tmp_path):
    images = []
    for mode in ("L", "RGBA", "P"):
        buffer = io.BytesIO()
        PILImage.new(mode, (3, 3)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    name = save(tmp_path, {"image": images, "captions": [["a"]] * 3}, {"image": Image(), "captions": List(Value("string"))})
    data = load_split(name, "train")
    assert [data.image(n).mode for n in range(3)] == ["RGB"] * 3


def test_pictures_are_read_by_the_rules_of_the_processor(tmp_path):
    turned = PILImage.new("RGB", (8, 6), (255, 0, 0))
    turned.getexif()[0x0112] = 6
    deep = PILImage.fromarray(np.full((6, 8), 128 * 256, dtype=np.uint16))
    encoded = []
    for picture, options in ((deep, {}), (turned, {"exif": turned.getexif()})):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", **options)
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    name = save(tmp_path, {"image": encoded, "captions": [["a"]] * 2}, {"image": Image(), "captions": List(Value("string"))})
    data = load_split(name, "train")
    assert data.image(0).getpixel((0, 0)) == (128, 128, 128)
    assert data.image(1).size == (6, 8)


# ------------------------------------------------------------------------------------ the usual copies of the data sets


def test_reordered_captions_keep_the_number_of_each_image(tmp_path):
    columns = {"image": [RED, BLUE], "captions": [["a", "b", "c"], ["d"]]}
    data = load_split(save(tmp_path, columns, {"image": Image(), "captions": List(Value("string"))}), "train")
    assert data.reordered(np.array([3, 1, 0, 2])).captions == [["d", "b", "a"], ["c"]]
    assert data.captions == [["a", "b", "c"], ["d"]]


def test_flickr30k_of_the_hub(tmp_path):
    """nlphuji/flickr30k: all photographs are in one table, called test; a column says to which split they belong."""
    table = Dataset.from_dict(
        {
            "image": [RED, BLUE, RED, BLUE],
            "caption": [["a", "b"], ["c"], ["d"], ["e", "f"]],
            "sentids": [["0", "1"], ["2"], ["3"], ["4", "5"]],
            "split": ["train", "test", "val", "test"],
            "img_id": ["0", "1", "2", "3"],
            "filename": ["1.jpg", "2.jpg", "3.jpg", "4.jpg"],
        },
        features=Features(
            {
                "image": Image(),
                "caption": List(Value("string")),
                "sentids": List(Value("string")),
                "split": Value("string"),
                "img_id": Value("string"),
                "filename": Value("string"),
            }
        ),
    )
    DatasetDict({"test": table}).save_to_disk(tmp_path)
    data = load_split(str(tmp_path), "test")
    assert data.image_ids == ["2.jpg", "4.jpg"] and data.captions == [["c"], ["e", "f"]]
    assert data.image(0).getpixel((0, 0)) == (0, 0, 255)
    assert load_split(str(tmp_path), "train+val").captions == [["a", "b"], ["d"]]
    assert load_split(str(tmp_path), "2", split_column="img_id").image_ids == ["3.jpg"]
    with pytest.raises(
        ValueError, match=r"no split 'validation'; its splits are \['test', 'train', 'val'\].*validation_split"
    ):
        load_split(str(tmp_path), "validation")
    with pytest.raises(ValueError, match=r"no split column 'fold'.*split_column"):
        load_split(str(tmp_path), "test", split_column="fold")


def coco(folder) -> str:
    """yerevann/coco-karpathy: captions and addresses, no pictures; the usual folders of the photographs beside it."""
    columns = {
        "filepath": Value("string"),
        "sentids": List(Value("int64")),
        "filename": Value("string"),
        "imgid": Value("int64"),
        "sentences": List(Value("string")),
        "cocoid": Value("int64"),
        "url": Value("string"),
    }
    tables = {}
    for number, (split, colour) in enumerate({"train": RED, "restval": BLUE, "test": BLUE}.items()):
        within = "train2014" if split == "train" else "val2014"
        (folder / "photographs" / within).mkdir(parents=True, exist_ok=True)
        (folder / "photographs" / within / f"{number}.png").write_bytes(colour["bytes"])
        row = [within, [0, 1], f"{number}.png", number, ["a", "b"], number, f"http://localhost/{number}.png"]
        values = {name: [value] for name, value in zip(columns, row, strict=True)}
        tables[split] = Dataset.from_dict(values, features=Features(columns))
    DatasetDict(tables).save_to_disk(folder / "coco")
    return str(folder / "coco")


def test_coco_of_the_hub(tmp_path):
    name, folder = coco(tmp_path), str(tmp_path / "photographs")
    data = load_split(name, "train+restval", image_folder=folder)
    assert data.image_ids == ["0.png", "1.png"] and data.captions == [["a", "b"]] * 2
    assert [data.image(n).getpixel((0, 0)) for n in range(2)] == [(255, 0, 0), (0, 0, 255)]
    with pytest.raises(ValueError, match=r"no image column.*image_column"):
        load_split(name, "test")
    with pytest.raises(ValueError, match=r"'url' of .* holds .*, no images.*image_folder"):
        load_split(name, "test", image_column="url")
    with pytest.raises(ValueError, match=r"`image_folder` .* has no picture '2\.png'"):
        load_split(name, "test", image_folder=str(tmp_path / "coco"))


def test_sentences_of_karpathy_s_files(tmp_path):
    sentences = [[{"tokens": ["a"], "raw": "a"}, {"tokens": ["b"], "raw": "b"}], [{"tokens": ["c"], "raw": "c"}]]
    kind = List({"tokens": List(Value("string")), "raw": Value("string")})
    name = save(tmp_path, {"image": [RED, BLUE], "sentences": sentences}, {"image": Image(), "sentences": kind})
    assert load_split(name, "train").captions == [["a", "b"], ["c"]]


def test_columns_of_another_kind_are_refused(tmp_path):
    name = save(tmp_path, {"image": [RED], "caption": [3]}, {"image": Image(), "caption": Value("int64")})
    with pytest.raises(ValueError, match=r"Row 0 has no caption .* in `caption` of .*: 3.*caption_column"):
        load_split(name, "train")
    with pytest.raises(ValueError, match=r"no image_id column 'number'.*image_id_column"):
        load_split(name, "train", image_id_column="number")
