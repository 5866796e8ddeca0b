"""What the index loses: nothing where every item is a candidate, and bytes go with rSum."""

import json

import pytest
from tiny import tiny_model, tiny_processor

from granalign_hf.training.data import load_split
from granalign_hf.training.evaluate import main as evaluate
from granalign_hf.training.measure_search import main


@pytest.fixture(params=["grm", "chan", "vse++"])
def folder(request, tmp_path):
    folder = tmp_path / request.param
    tiny_model(aligner=request.param).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def test_with_all_as_candidates_two_stages_are_all_pairs(folder, tmp_path):
    data = ["--dataset", "scenes", "--split", "test", "--max_images", "8"]
    num_captions = len(load_split("scenes", "test").first(8).all_captions)
    arguments = [
        str(folder),
        *data,
        "--batch_size",
        "5",
        "--candidates",
        str(num_captions),
        "--output",
        str(tmp_path / "out"),
    ]
    (result,) = main(arguments).values()
    expected = evaluate([str(folder), *data])["metrics"]
    assert result["exact"] == pytest.approx(expected)
    for name in ("image_to_text_r5", "text_to_image_r5", "rsum"):
        assert result["two_stages"][name] == pytest.approx(expected[name], abs=100 * 3 / 8)  # 8 bits may change a rank
    curve = {row["stored"]: row["bytes"] for row in result["curve"]}
    assert curve["float32"] > curve["float16"] > curve["int8"] > curve["first stage alone"]
    assert result["run"]["tokens"] == (None if folder.name == "vse++" else "int8")
    assert result["run"]["bytes_on_disk"] > 8 * curve["first stage alone"]
    assert ("25% of the patches, int8" in curve) == (folder.name == "grm")
    written = json.loads((tmp_path / "out" / "search.json").read_text())
    assert written == {folder.name: result}
    lines = (tmp_path / "out" / "search.md").read_text().splitlines()
    assert lines[2].startswith(f"| {folder.name} | {expected['rsum']:.1f} | ")
    assert (tmp_path / "out" / "search.png").stat().st_size > 0
