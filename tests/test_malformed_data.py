"""Data sets of every wrong kind: each is refused with its name and row, or read by a stated rule with nothing lost."""

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pictures import BROKEN, NOISE, PNG

from granalign_hf.training.columns import CAPTION_COLUMNS, captions_of
from granalign_hf.training.data import CaptionedImages, load_split

# ------------------------------------------------------------------------------------------------ what a row may hold

words = st.text(st.characters(codec="utf-8"), max_size=5)
good = words.filter(str.strip)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["raw", "tokens"]), inner),
)


@given(st.lists(good, min_size=1), st.sampled_from([str, dict, "columns"]))
def test_captions_come_out_as_they_went_in(captions, kind):
    """Strings, mappings with `raw`, and the form in which `datasets` stores some lists of mappings."""
    value = {str: captions, dict: [{"raw": c, "tokens": c.split()} for c in captions], "columns": {"raw": captions}}[kind]
    assert captions_of(value, 0, "x") == captions
    assert captions_of(captions[0], 0, "x") == [captions[0]]


@given(anything)
def test_a_row_has_captions_or_is_refused_by_its_number(value):
    try:
        captions = captions_of(value, 17, "`c` of d")
    except ValueError as error:
        assert "Row 17 " in str(error) and "`c` of d" in str(error)
    else:
        assert captions and all(isinstance(caption, str) and caption.strip() for caption in captions)


# --------------------------------------------------------------------------------------------------------- whole tables

COLUMN_NAMES = [*CAPTION_COLUMNS, "image", "picture", "features", "image_id", "filename", "split", "url"]
COLUMN_KINDS = {
    "picture": (Image(), st.sampled_from([PNG, b"", b"no picture", PNG[:99], None])),
    "string": (Value("string"), st.sampled_from(["a dog", "b", " ", "", None])),
    "strings": (List(Value("string")), st.none() | st.lists(st.sampled_from(["a dog", "b", "", None]), max_size=3)),
    "number": (Value("int64"), st.none() | st.integers(0, 3)),
    "numbers": (List(List(Value("float32"))), st.none() | st.lists(st.lists(st.floats(width=32), max_size=2), max_size=3)),
}


@st.composite
def tables(draw) -> Dataset:
    num_rows = draw(st.integers(0, 5))
    columns, kinds = {}, {}
    for name in draw(st.lists(st.sampled_from(COLUMN_NAMES), unique=True, min_size=1, max_size=5)):
        kind, values = COLUMN_KINDS[draw(st.sampled_from(sorted(COLUMN_KINDS)))]
        drawn = draw(st.lists(values, min_size=num_rows, max_size=num_rows))
        is_picture = isinstance(kind, Image)
        columns[name] = [None if v is None else {"bytes": v, "path": None} for v in drawn] if is_picture else drawn
        kinds[name] = kind
    return Dataset.from_dict(columns, features=Features(kinds))


@given(table=tables())
@settings(max_examples=60)
def test_a_table_is_read_without_loss_or_refused_by_name(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    DatasetDict({"train": table}).save_to_disk(folder)
    try:
        data = load_split(str(folder), "train")
    except ValueError as error:
        assert str(folder) in str(error) or "Row " in str(error), error
        return
    rows = Counter()
    for name in CAPTION_COLUMNS:
        if name in table.column_names:
            rows.update(c for value in table[name] for c in ([value] if isinstance(value, str) else value))
            break
    assert Counter(data.all_captions) == rows and len(set(data.image_ids)) == len(data)
    for number in range(len(data)):
        try:
            image = data.image(number)
        except ValueError as error:
            assert f"`{data.image_ids[number]}` (row {data.rows[number]})" in str(error)
        else:
            assert np.array_equal(image, NOISE) if data.has_pictures else image.ndim == 2


# ------------------------------------------------------------------------------------------------------- whole pictures


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_is_named_wherever_it_stands(kind, tmp_path):
    """Also where another column of the row holds it, and only then nothing is said."""
    content, reason = BROKEN[kind]
    values = [{"bytes": PNG, "path": None}, {"bytes": content, "path": "x.jpg"}]
    table = Dataset.from_dict(
        {"image": values, "other": values[::-1], "captions": [["a"], ["b", "c"]]},
        features=Features({"image": Image(), "other": Image(), "captions": List(Value("string"))}),
    )
    DatasetDict({"train": table}).save_to_disk(tmp_path)
    data = load_split(str(tmp_path), "train")
    assert isinstance(data, CaptionedImages) and data.all_captions == ["a", "b", "c"]
    assert np.array_equal(data.image(0), NOISE)
    with pytest.raises(ValueError, match=rf"Image `1` \(row 1\) \(file x\.jpg\) cannot be read: .*{reason}"):
        data.image(1)
