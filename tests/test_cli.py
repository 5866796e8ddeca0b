"""The command line as a shell runs it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageShow
from tiny import tiny_model, tiny_processor

from granalign_hf import GranAlignModel, GranAlignProcessor
from granalign_hf.cli import COMMANDS, build_parser, main
from granalign_hf.explanation import compare, explain
from granalign_hf.modeling.alignment import align

SENTENCES = ["a red dog", "the green square on a cat", "dogs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with two pictures."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    for number, size in enumerate([(30, 40, 3), (20, 20, 3)]):
        noise = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def parts(folder):
    return GranAlignModel.from_pretrained(folder).eval(), GranAlignProcessor.from_pretrained(folder)


@pytest.fixture
def run(folder, capsys):
    """What a command writes."""

    def run(*words: str) -> str:
        main([*words, "--model", str(folder)])
        return capsys.readouterr().out

    return run


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_align(run, folder, parts, tmp_path):
    words, out = ["align", f"{folder}/0.png", SENTENCES[0]], tmp_path / "words.png"
    answer, expected = json.loads(run(*words, "--json", "--out", str(out))), align(*parts, folder / "0.png", SENTENCES[0])
    assert answer["score"] == expected.score
    assert answer["words"] == [
        {"word": w.text, "start": w.start, "end": w.end, "box": [*w.box], "saliency": w.saliency} for w in expected.words
    ]
    assert size_of(out) > (100, 100)
    shown = run(*words).splitlines()
    assert shown[0] == f"score {expected.score:.3f}"
    assert [line.split()[:2] for line in shown[2:]] == [["a", "0-1"], ["red", "2-5"], ["dog", "6-9"]]


def test_rank(run, folder, parts):
    model, processor = parts
    images = [f"{folder}/0.png", f"{folder}/1.png"]
    with torch.no_grad():
        scores = model(**processor(images=images, text=SENTENCES, return_tensors="pt")).logits_per_image
    answer = json.loads(run("rank", "--image", images[0], "--text", *SENTENCES, "--json"))
    order = scores[0].argsort(descending=True).tolist()
    assert [one["candidate"] for one in answer] == [SENTENCES[number] for number in order]
    assert [one["score"] for one in answer] == pytest.approx(scores[0, order].tolist(), abs=1e-6)
    shown = run("rank", "--image", *images, "--text", SENTENCES[0], "--top", "1").splitlines()
    assert len(shown) == 2 and shown[1].endswith(images[scores[:, 0].argmax()])


def test_explain(run, folder, parts, tmp_path):
    image, out = folder / "0.png", tmp_path / "why.png"
    answer, expected = json.loads(run("explain", str(image), SENTENCES[1], "--json")), explain(*parts, image, SENTENCES[1])
    assert sum(word["share"] for word in answer["words"]) == pytest.approx(expected.score, abs=1e-5)
    assert [word["word"] for word in answer["words"]] == ["[CLS]", *SENTENCES[1].split(), "[SEP]"]
    assert [word["is_special"] for word in answer["words"]] == [True, *[False] * 6, True]
    for word in answer["words"]:
        assert all((place["box"] is None) == (place["kind"] != "patch") for place in word["places"])
        assert len(word["places"]) == 3 and {place["kind"] for place in word["places"]} <= {"patch", "region"}
    words = ["explain", str(image), SENTENCES[1], "--against", SENTENCES[0], "--out", str(out)]
    answer = json.loads(run(*words, "--json"))
    difference = compare(expected, explain(*parts, image, SENTENCES[0])).score
    assert answer["difference"] == pytest.approx(difference, abs=1e-6)
    assert sum(word["difference"] for word in answer["words"]) == pytest.approx(difference, abs=1e-5)
    assert size_of(out) > (100, 100)
    assert run(*words).startswith(f"difference {difference:.3f}\n")


def test_index_and_search(run, folder, parts, tmp_path, monkeypatch, capsys):
    pictures, index = tmp_path / "pictures", str(tmp_path / "my.index")
    (pictures / "more").mkdir(parents=True)
    for name, number in (("a.png", 0), ("more/b.png", 1)):
        (pictures / name).write_bytes((folder / f"{number}.png").read_bytes())
    (pictures / "broken.jpg").write_bytes(b"no picture")
    (pictures / os.fsdecode(b"\xff.png")).write_bytes((folder / "0.png").read_bytes())  # a name that is no UTF-8
    (pictures / "holiday.png").mkdir()
    (pictures / "notes.txt").write_text("no picture either")
    answer = json.loads(run("index", str(pictures), "--out", index, "--json"))
    assert (answer["num_added"], answer["num_skipped"], list(answer["refused"])) == (2, 0, ["broken.jpg", "\udcff.png"])
    shown = run("index", str(pictures), "--out", index).splitlines()
    assert shown[0] == f"0 added, 2 were in already, 2 in {index}" and shown[1].startswith("refused: broken.jpg: ")
    model, processor = parts
    images = [pictures / "a.png", pictures / "more/b.png"]
    with torch.no_grad():
        scores = model(**processor(images=images, text=SENTENCES[:1], return_tensors="pt")).logits_per_image[:, 0]
    found = []
    monkeypatch.setattr(ImageShow, "_viewers", [Viewer(found)])
    main(["search", index, SENTENCES[0], "--json", "--show"])  # the index knows its checkpoint
    answer = json.loads(capsys.readouterr().out)
    order = scores.argsort(descending=True).tolist()
    assert [one["id"] for one in answer] == [["a.png", "more/b.png"][number] for number in order]
    assert [one["score"] for one in answer] == pytest.approx(scores[order].tolist(), abs=1e-2)  # 8 bits
    assert found == [[(40, 30), (20, 20)][number] for number in order]
    with pytest.raises(SystemExit, match="has tokens as int8: leave out --tokens"):
        main(["index", str(pictures), "--out", index, "--tokens", "none", "--model", str(folder)])
    with pytest.raises(SystemExit, match=r"b.png is in .* already, as that of .*more/b.png. Give each folder"):
        (pictures / "other").mkdir()
        (pictures / "other" / "more").mkdir()
        (pictures / "other" / "more" / "b.png").write_bytes((folder / "0.png").read_bytes())
        main(["index", str(pictures / "other"), "--out", index, "--model", str(folder)])
    shown = run("search", index, SENTENCES[0], "--top", "1").splitlines()
    assert len(shown) == 2 and shown[1].endswith(answer[0]["id"])
    monkeypatch.setattr(ImageShow, "_viewers", [])
    with pytest.raises(SystemExit, match="`--show` found no program that shows pictures"):
        main(["search", index, SENTENCES[0], "--show"])


class Viewer(ImageShow.Viewer):
    """A program that shows pictures: notes their sizes."""

    def __init__(self, sizes):
        self.sizes = sizes

    def show(self, image, **options):
        self.sizes.append(image.size)
        return True


def test_what_is_wrong_is_one_line(run, folder):
    for words, told in {
        ("align", "nowhere.png", "a dog"): "Image `nowhere.png` cannot be read",
        ("align", f"{folder}/0.png", " "): "must be a sentence of at least one word",
        ("rank", "--image", "a", "b", "--text", "c", "d"): "got 2 pictures and 2 sentences",
        ("index", f"{folder}/no", "--out", f"{folder}/i"): "no is no folder",
        ("index", str(Path(__file__).parent / "benchmarks"), "--out", f"{folder}/i"): "There are no pictures in",
        ("index", f"{folder}/0.png", "--out", f"{folder}/i"): "0.png is no folder",
        ("search", f"{folder}/i", "a dog"): "There is no index in",
    }.items():
        with pytest.raises(SystemExit) as error:
            run(*words)
        assert told in error.value.code and error.value.code.startswith("granalign: ") and "\n" not in error.value.code


def test_a_checkpoint_or_device_that_is_not_there_is_named(folder, tmp_path):
    main(["index", str(folder), "--out", str(tmp_path / "moved"), "--model", str(shutil.copytree(folder, tmp_path / "c"))])
    shutil.rmtree(tmp_path / "c")
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "index.json").write_text("{")
    align = ["align", f"{folder}/0.png", "a dog", "--model"]
    for words, told in (
        ([*align, f"{tmp_path}/no/where"], "must be a folder or a name on the Hub"),
        ([*align, f"{tmp_path}/broken"], f"The weights of {tmp_path}/broken are broken"),
        ([*align, str(folder), "--device", "banana"], "`--device` must be one that torch can use here, got 'banana'"),
        (["search", f"{tmp_path}/moved", "a dog"], "was built with .*/c, which is no more"),
        (["search", f"{tmp_path}/j", "a dog"], "index.json is broken"),
        (["search", "http://localhost:9/c", "a dog", "--model", str(folder)], "No Qdrant server answers at localhost:9"),
    ):
        with pytest.raises(SystemExit, match=f"^granalign: .*{told}"):
            main(words)


def test_a_name_that_is_no_folder_and_not_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "granalign_hf.cli", "align", "a.png", "a dog", "--model", "runs/nothing"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert run.returncode == 1 and "granalign: runs/nothing is no folder here, and does not come from the Hub" in run.stderr


def test_another_kind_of_checkpoint(tmp_path):
    tiny_model().text_model.config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"must be a GranAlign checkpoint, .* is of type 'bert'"):
        main(["align", "a.png", "a dog", "--model", str(tmp_path)])


def test_doctor_in_a_process_of_its_own():
    command = [str(Path(sys.executable).with_name("granalign")), "doctor", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert answer["self_test"] == {
        "three levels of scores": True,
        "shares add up to the score": True,
        "saved and loaded": True,
    }
    assert answer["versions"]["torch"] == torch.__version__
    assert answer["seconds"] < 10


def test_doctor_tells_what_failed(monkeypatch, capsys):
    monkeypatch.setattr("granalign_hf.commands.doctor.self_test", lambda: {"one": True, "other": False})
    with pytest.raises(SystemExit, match="The self-test failed: other"):
        main(["doctor"])
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__.rpartition(".")[2])
def test_help_has_an_example(command, capsys):
    name = command.__name__.rpartition(".")[2]
    with pytest.raises(SystemExit, match="0"):
        build_parser().parse_args([name, "--help"])
    shown = capsys.readouterr().out
    assert f"granalign {name}" in shown.split("example:")[1] and ("--json" in shown or name == "app")
