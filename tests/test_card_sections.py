"""The parts of a card that tell where words point, whether wrong ones are noticed, and how sure the model is."""

import json
import re

import pytest
from tiny import tiny_model, tiny_processor

from granalign_hf.card_sections import measured_sections
from granalign_hf.model_card import write_model_card
from granalign_hf.training import calibrate, evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of which all of it was measured, though on few scenes."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    for task in ("grounding", "foils"):
        words = [str(folder), "--dataset", "scenes", "--max_images", "6", "--task", task]
        evaluate.main([*words, "--output", str(folder / f"{task}-test.json")])
    calibrate.main([str(folder), "--dataset", "scenes", "--max_images", "30"])
    for path in folder.glob("uncertainty-*-first-30.json"):
        path.rename(folder / "uncertainty-test.json")
    return folder


def test_every_figure_is_measured_and_every_measure_is_told(folder):
    told = measured_sections(folder)
    assert [line for line in told.splitlines() if line.startswith("## ")] == [
        "## Where words point",
        "## Which word is wrong",
        "## How sure it is",
    ]
    grounding, foils, uncertainty = (
        json.loads((folder / f"{kind}-test.json").read_text()) for kind in ("grounding", "foils", "uncertainty")
    )
    row = grounding["pointing"]["all"]
    baselines = " | ".join(f"{row[name]:.1f}" for name in ("densest", "random_patch", "image_center", "largest_box"))
    pointed = f"{row['accuracy']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"
    assert f"| all | {row['num_phrases']} | {pointed} | {baselines} |" in told
    assert f"AUROC of content words: {grounding['auroc']['content_words']['mean']:.3f}." in told
    row = foils["foils"]["all"]
    assert f"| all | {row['number']} | {row['preferred']:.1f} [" in told and f" | {row['chance']:.1f} |" in told
    before = [uncertainty[way]["softmax"]["ece_before"] for way in ("image_to_text", "text_to_image")]
    assert f"| expected calibration error of the softmax, before | {before[0]:.3f} | {before[1]:.3f} |" in told
    numbers = re.findall(r"-?\d+\.\d+", json.dumps([grounding, foils, uncertainty]))
    carried = {f"{float(number):.{digits}f}" for number in numbers for digits in (1, 3)} | {"0.5"}
    assert {*re.findall(r"-?\d+\.\d+", told)} <= carried


@pytest.mark.parametrize("perfect", ["image_to_text", "text_to_image"])
def test_a_way_without_a_wrong_answer_has_no_area(folder, tmp_path, perfect):
    result = json.loads((folder / "uncertainty-test.json").read_text())
    result[perfect]["is_the_first_wrong"] = {}
    (tmp_path / "uncertainty-test.json").write_text(json.dumps(result))
    (row,) = re.findall(r"\| AUROC of margin for .*", measured_sections(tmp_path))
    assert (row.endswith(" | - |"), " | - | 0." in row) == ((False, True) if perfect == "image_to_text" else (True, False))


def test_the_card_has_them_after_its_results(folder):
    card = write_model_card(folder).read_text()
    titles = re.findall(r"^## (.*)$", card, flags=re.M)
    first = titles.index("Results")
    assert titles[first : first + 5] == ["Results", "Where words point", "Which word is wrong", "How sure it is", "Training"]
    assert "\n\n\n" not in card.split("## Training")[0]


def test_parts_of_a_split_and_other_files_are_left_out(tmp_path):
    (tmp_path / "grounding-test-first-6.json").write_text("{}")
    (tmp_path / "metrics-test.json").write_text("{}")
    assert measured_sections(tmp_path) == ""


@pytest.mark.parametrize(
    "content, told", [("{", "is not JSON"), ('{"split": "test"}', "lacks 'dataset'"), (None, "`accuracy` must be a finite")]
)
def test_broken_files_are_named(folder, tmp_path, content, told):
    if content is None:
        result = json.loads((folder / "grounding-test.json").read_text())
        result["pointing"]["all"]["accuracy"] = float("nan")
        content = json.dumps(result)
    (tmp_path / "grounding-test.json").write_text(content)
    with pytest.raises(ValueError, match=told):
        measured_sections(tmp_path)
