"""A saved folder, loaded by someone else: a fresh process, with this package and without it; scores bit-equal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import region_model_and_processor, tiny_model, tiny_processor
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline

from granalign_hf import GranAlignModel, GranAlignProcessor

CAPTIONS = ["a red dog", "a blue circle and the green square on a cat", "dogs"]
CODE = {path.name for path in (Path(__file__).parents[1] / "modeling").glob("*.py")} - {"__init__.py"}

WITHOUT_PACKAGE = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "granalign_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
code = {"trust_remote_code": True}
home = "transformers_modules."
"""
WITH_PACKAGE = """
import granalign_hf
code = {}
home = "granalign_hf.modeling."
"""
LOAD = """
import warnings
warnings.simplefilter("error")
import torch, sys
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline

folder, out, captions = sys.argv[1], sys.argv[2], sys.argv[3:]
config = AutoConfig.from_pretrained(folder, **code)
model = AutoModel.from_pretrained(folder, **code)
zero_shot = AutoModelForZeroShotImageClassification.from_pretrained(folder, **code)
processor = AutoProcessor.from_pretrained(folder, **code)
classes = {type(thing).__name__: type(thing).__module__ for thing in (config, model, zero_shot, processor)}
assert sorted(classes) == ["GranAlignConfig", "GranAlignModel", "GranAlignProcessor"], classes
assert all(module.startswith(home) for module in classes.values()), classes
image = Image.open(f"{folder}/image.png")
inputs = processor(images=image, text=captions, return_tensors="pt")
with torch.no_grad():
    scores = [m(**inputs).logits_per_image for m in (model, zero_shot)]
pipe = pipeline("zero-shot-image-classification", model=folder, **code)
answers = pipe(f"{folder}/image.png", candidate_labels=captions, hypothesis_template="{}")
pair = {"image": f"{folder}/image.png", "text": captions[0]}
words = pipeline("image-text-alignment", model=folder, **code)(pair)
ranked = pipeline("image-text-retrieval", model=folder, **code)(image=pair["image"], candidates=captions)
model.save_pretrained(f"{out}/again")
processor.save_pretrained(f"{out}/again")
again = AutoModel.from_pretrained(f"{out}/again", **code)
with torch.no_grad():
    scores.append(again(**inputs).logits_per_image)
torch.save((scores, answers, words, ranked), f"{out}/answers.pt")
"""


LOAD_REGIONS = """
import warnings
warnings.simplefilter("error")
import torch, sys
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

folder, out, captions = sys.argv[1], sys.argv[2], sys.argv[3:]
image_processor = AutoImageProcessor.from_pretrained(folder, **code)
processor = AutoProcessor.from_pretrained(folder, **code)
model = AutoModel.from_pretrained(folder, **code)
things = (image_processor, processor.image_processor, model.vision_model, model.text_model, model, processor)
assert all(type(thing).__module__.startswith(home) for thing in things), [type(thing) for thing in things]
inputs = processor(images=torch.load(f"{folder}/features.pt"), text=captions, return_tensors="pt")
model.save_pretrained(f"{out}/again")
processor.save_pretrained(f"{out}/again")
again = AutoModel.from_pretrained(f"{out}/again", **code)
with torch.no_grad():
    scores = [m(**inputs).logits_per_image for m in (model, again)]
torch.save(scores, f"{out}/scores.pt")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A complete checkpoint, and beside it the image and the scores that it gave before it was saved."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, processor = tiny_model(), tiny_processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    noise = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy())
    with torch.no_grad():
        scores = model(**processor(images=image, text=CAPTIONS, return_tensors="pt")).logits_per_image
    torch.save(scores, folder / "scores.pt")
    image.save(folder / "image.png")
    return folder


def test_the_saved_folder_is_complete(folder):
    files = {path.name for path in folder.iterdir()} - {"image.png", "scores.pt"}
    assert files == CODE | {
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GranAlignModel"]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_granalign.GranAlignConfig",
        "AutoModel": "modeling_granalign.GranAlignModel",
        "AutoModelForZeroShotImageClassification": "modeling_granalign.GranAlignModel",
    }
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "processing_granalign.GranAlignProcessor"}


def test_saved_code_is_the_code(folder):
    for name in CODE:
        assert (folder / name).read_bytes() == (Path(__file__).parents[1] / "modeling" / name).read_bytes()


@pytest.mark.parametrize("start", [WITH_PACKAGE, WITHOUT_PACKAGE], ids=["with the package", "without the package"])
def test_loaded_in_a_fresh_process(folder, tmp_path, start):
    run = run_in_a_fresh_process(start + LOAD, folder, tmp_path)
    assert "is not supported for" not in run.stderr  # what a pipeline says of a class that it does not know
    scores, answers, words, ranked = torch.load(tmp_path / "answers.pt")
    expected = torch.load(folder / "scores.pt")
    assert [torch.equal(one, expected) for one in scores] == [True, True, True]
    probabilities = expected.softmax(1)[0]
    order = probabilities.argsort(descending=True).tolist()
    assert [answer["label"] for answer in answers] == [CAPTIONS[number] for number in order]
    assert [answer["score"] for answer in answers] == pytest.approx(probabilities[order].tolist(), abs=1e-6)
    assert words["score"] == pytest.approx(expected[0, 0].item(), abs=1e-6)
    assert [word["word"] for word in words["words"]] == CAPTIONS[0].split()
    assert [one["index"] for one in ranked] == order
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == CODE
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["auto_map"] == json.loads((folder / "config.json").read_text())["auto_map"]


@pytest.mark.parametrize("start", [WITH_PACKAGE, WITHOUT_PACKAGE], ids=["with the package", "without the package"])
def test_a_checkpoint_on_region_features_in_a_fresh_process(tmp_path, start):
    """Its encoders are classes of this code too, which the checkpoint brings."""
    model, processor = region_model_and_processor()
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert {path.name for path in folder.glob("*.py")} == CODE
    features = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    torch.save(features, folder / "features.pt")
    with torch.no_grad():
        expected = model(**processor(images=features, text=CAPTIONS, return_tensors="pt")).logits_per_image
    run_in_a_fresh_process(start + LOAD_REGIONS, folder, tmp_path)
    for scores in torch.load(tmp_path / "scores.pt"):
        torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)  # a GRU rounds by where its weights lie in memory
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == CODE


def run_in_a_fresh_process(script: str, folder: Path, out: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(out / "home"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", script, str(folder), str(out), *CAPTIONS]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out)
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def test_auto_classes_and_pipeline_in_this_process(folder):
    assert type(AutoModel.from_pretrained(folder)) is GranAlignModel
    model = AutoModelForZeroShotImageClassification.from_pretrained(folder)
    assert type(model) is GranAlignModel
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is GranAlignProcessor
    pipe = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    images = [str(folder / "image.png")] * 2
    answers = pipe(images, candidate_labels=CAPTIONS[:1])
    assert [[answer["label"] for answer in one] for one in answers] == [CAPTIONS[:1]] * 2
