"""`granalign doctor`: what is installed, and whether it computes what it should."""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .common import add_command, columns, show

PACKAGES = ("granalign-hf", "torch", "transformers", "huggingface-hub", "safetensors", "numpy", "pillow")
OPTIONAL = ("accelerate", "datasets", "evaluate", "matplotlib", "peft", "gradio", "onnxruntime", "qdrant-edge-py")


def add_parser(subparsers: Any) -> None:
    summary = "what is installed, and whether it computes what it should"
    add_command(subparsers, "doctor", run, summary, "granalign doctor --json")


def run(arguments: argparse.Namespace) -> None:
    """Raises ValueError: the self-test failed."""
    versions = {name: _version(name) for name in (*PACKAGES, *OPTIONAL)}
    started = time.monotonic()
    test = self_test()
    seconds = round(time.monotonic() - started, 1)
    devices = _devices()
    answer: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    answer |= {"versions": versions, "devices": devices, "self_test": test, "seconds": seconds}
    rows = [("python", answer["python"]), ("platform", answer["platform"]), ("devices", ", ".join(devices))]
    rows += [(name, found or "not installed") for name, found in versions.items()]
    rows += [(f"test: {name}", "passed" if passed else "FAILED") for name, passed in test.items()]
    show(arguments, answer, [*columns(rows), f"self-test of {seconds} s"])
    failed = [name for name, passed in test.items() if not passed]
    if failed:
        raise ValueError(f"The self-test failed: {', '.join(failed)}. Compare the versions above with constraints.txt.")


def self_test() -> dict[str, bool]:
    """A small random model: its scores against the formula, its explanation against its score, and after saving."""
    import torch

    from granalign_hf import GranAlignConfig, GranAlignModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = GranAlignModel(
        GranAlignConfig(
            vision_config={"model_type": "vit", "image_size": 32, "patch_size": 8, **sizes},
            text_config={"model_type": "bert", "vocab_size": 50, **sizes},
            projection_dim=16,
        )
    ).eval()
    with torch.no_grad():
        image = model.get_image_features(torch.randn(3, 3, 32, 32))
        text = model.get_text_features(torch.randint(1, 50, (4, 6)))
        scores = model.score(image, text)
        shares = [sum(c.share for c in model.explain(image, text, i, t).contributions) for i in range(3) for t in range(4)]
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = GranAlignModel.from_pretrained(folder).eval()
            kept = again.score(again.get_image_features(torch.zeros(1, 3, 32, 32)), text)
        expected = model.score(model.get_image_features(torch.zeros(1, 3, 32, 32)), text)
    return {
        "three levels of scores": torch.allclose(scores, _three_levels(model.config.level_weights, image, text), atol=1e-5),
        "shares add up to the score": torch.allclose(torch.tensor(shares), scores.flatten(), atol=1e-5),
        "saved and loaded": torch.equal(kept, expected),
    }


def _three_levels(weights: list[float], image: Any, text: Any) -> Any:
    """Eq. 7 of GRM as it is written, with the tensor of all pairs."""
    import torch

    patches, words = image.patch_embeds, text.word_embeds
    sides = (
        (patches, words),
        (patches * image.patch_saliency[..., None], words * text.word_saliency[..., None]),
        (image.region_embeds, words * text.word_saliency[..., None]),
    )
    levels = [torch.einsum("ivd,twd->itvw", *pair) for pair in sides]
    return sum(weight * (level.amax(2).mean(2) + level.amax(3).mean(2)) for weight, level in zip(weights, levels))


def _devices() -> list[str]:
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return [*gpus, f"cpu, {torch.get_num_threads()} threads"]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
