"""The handler of a Hugging Face Inference Endpoint; it lies in the folder of a checkpoint, beside the model and its code.

Labels for a picture, by their probabilities, or the words of a sentence with their places in it:

    {"inputs": "<base64>", "parameters": {"candidate_labels": ["a dog", "a cat"]}}
    {"inputs": {"image": "<base64>", "text": "a dog catches a red ball"}}

A picture may also be the body of the request (`Content-Type: image/png`), with the rest as query parameters.
"""

from __future__ import annotations

import base64
import binascii
import io
import sys
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

MAX_BYTES = 20 * 2**20  # of a picture's file
MAX_PIXELS = 50_000_000
MAX_LABELS = 1000


class EndpointHandler:
    """What the Inference Toolkit makes once and calls for each request. A ValueError is its answer 400, with the message.

    Args:
        path: folder of the checkpoint.
    """

    def __init__(self, path: str = ""):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        self.alignment = sys.modules[get_class_from_dynamic_module("alignment.align", path).__module__]

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]] | dict[str, Any]:
        """
        Args:
            data: `inputs`, a picture or a dict with `image`, and `parameters`: `text` or `candidate_labels` (a list, or a
                string with commas), which may stand in `inputs` as well. A picture is a PIL image or the content of an
                image file in base64.

        Returns:
            For labels a list of `label` and `score` (a probability), the highest first. For a text a dict with its `score`
            and its `words`: for each `word`, `start` and `end` (characters), `share` of the score, `saliency` in [0, 1] or
            `None`, and the `box` of its best patch in pixels.

        Raises:
            ValueError: something is missing, too large, or no picture.
        """
        inputs, parameters = data.get("inputs"), data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"`parameters` must be a dict, got {type(parameters).__name__}.")
        request = {**(inputs if isinstance(inputs, dict) else {"image": inputs}), **parameters}
        text, labels = request.get("text"), request.get("candidate_labels")
        if unknown := {*request} - {"image", "text", "candidate_labels"}:
            raise ValueError(f"Unknown: {', '.join(sorted(unknown))}. Known are `image`, `text` and `candidate_labels`.")
        if (text is None) == (labels is None):
            raise ValueError("Pass either `text`, a sentence, or `candidate_labels`, a list of strings.")
        picture = _picture(request.get("image"))
        if text is not None:
            return self.words(picture, text)
        return self.classify(picture, _labels(labels))

    @torch.no_grad()
    def classify(self, picture: Image.Image, labels: list[str]) -> list[dict[str, Any]]:
        inputs = self.processor(images=picture, text=labels, padding=True, return_tensors="pt").to(self.model.device)
        scores = self.model(**inputs).logits_per_image[0].float().softmax(0).tolist()
        return sorted(({"label": label, "score": s} for label, s in zip(labels, scores)), key=lambda one: -one["score"])

    @torch.no_grad()
    def words(self, picture: Image.Image, text: str) -> dict[str, Any]:
        seen = self.alignment.see_image(self.model, self.processor, picture)
        read = self.alignment.read_caption(self.model, self.processor, text)
        explained = self.model.explain(seen.features, read.features)
        shares = explained.patch_shares.sum(1)  # of the tokens; those of special tokens belong to no word
        words = [
            {
                "word": word.text,
                "start": word.start,
                "end": word.end,
                "share": shares[list(word.tokens)].sum().item(),
                "saliency": word.saliency,
                "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), map(round, word.box))),
            }
            for word in self.alignment.align_words(self.model, seen, read, read.words)
        ]
        return {"score": explained.score, "words": words}


def _labels(labels: Any) -> list[str]:
    labels = [label.strip() for label in labels.split(",")] if isinstance(labels, str) else labels
    are_texts = isinstance(labels, list) and all(isinstance(label, str) and label.strip() for label in labels)
    if not are_texts or not 1 <= len(labels) <= MAX_LABELS:
        raise ValueError(f"`candidate_labels` must be 1 to {MAX_LABELS} strings with at least one word each.")
    return labels


def _picture(image: Any) -> Image.Image:
    if isinstance(image, str):
        image = _open(_decode(image))
    if not isinstance(image, Image.Image):
        raise ValueError(f"`image` must be the content of an image file in base64, got {type(image).__name__}.")
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"The picture has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are allowed.")
    return image


def _decode(text: str) -> bytes:
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise ValueError(f"The picture has more than {MAX_BYTES} bytes.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("`image` is not base64. Send the content of an image file; URLs and paths are not read.") from error


def _open(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"`image` is no picture that can be read: {error}") from error
