# Copyright 2026 The granalign authors. Licensed under the Apache License, Version 2.0.
"""Pipelines of Transformers: a picture and a sentence word by word, and the best candidates for a picture or a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.image_utils import load_image
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.pipelines import Pipeline

from .alignment import AlignedWord, ReadCaption, SeenImage, align_words, prepare_caption, prepare_image
from .outputs import GranAlignImageOutput, GranAlignTextOutput
from .standard_errors import has_standard_errors, standard_errors
from .words import merge_pieces

BATCH_SIZE = 32  # candidates that are encoded together


class _GranAlignPipeline(Pipeline):
    _load_processor = True
    _load_image_processor = False
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_video_processor = False


class ImageTextAlignmentPipeline(_GranAlignPipeline):
    r"""
    The task `"image-text-alignment"`: which part of a picture each word of a sentence stands for.

    ```python
    >>> from transformers import pipeline

    >>> aligner = pipeline("image-text-alignment", model="org/granalign", trust_remote_code=True)
    >>> aligner("dog.jpg", text="a dog catches a red ball")["words"][1]["box"]
    {'xmin': 64, 'ymin': 96, 'xmax': 96, 'ymax': 128}
    ```
    """

    def __call__(self, image: Any, text: str | None = None, **kwargs: Any) -> dict | list[dict]:
        r"""
        Args:
            image: a path, URL, PIL image or array, with `text`; or `{"image": ..., "text": ...}`, or a list, generator or
                dataset of those, which `batch_size` encodes together and which come back one by one.
            text: a sentence.
            timeout: seconds to wait for a picture of a URL.

        Returns:
            For each pair a dict with

            - **score** (`float`), the score that ranks, and its **standard_error** (`float`, or `None` for models whose
              regions have no variance);
            - **words**, for each word `word`, `start` and `end` (characters, end exclusive), `score` of its best patch,
              `saliency` in [0, 1] (or `None`), `box` of the best patch in pixels of the picture, and `map`, a tensor
              (rows, columns) with the score of each patch.

        Raises:
            ValueError: a picture cannot be read, a caption is empty, or either is missing.
        """
        return super().__call__(image if text is None else {"image": image, "text": text}, **kwargs)

    def _sanitize_parameters(self, timeout: float | None = None):
        return ({} if timeout is None else {"timeout": timeout}), {}, {}

    def preprocess(self, pair: dict, timeout: float | None = None) -> dict:
        if not isinstance(pair, dict) or not {"image", "text"} <= {*pair}:
            raise ValueError(f"A pair must be a dict with `image` and `text`, got {_kind(pair)}. Pass `text` as well.")
        picture, pixels, area = prepare_image(self.model, self.processor, _load(pair["image"], timeout))
        words, offsets = prepare_caption(self.processor, pair["text"])
        return {**pixels, **words, "picture": picture, "area": area, "caption": pair["text"], "offsets": offsets}

    def _forward(self, inputs: dict) -> dict:
        shown = {name: inputs.pop(name) for name in ("picture", "area", "caption", "offsets")}
        image = self.model.get_image_features(inputs.pop("pixel_values").to(self.dtype))
        text = self.model.get_text_features(**inputs)
        pairs = [(_row(image, n), _row(text, n)) for n in range(len(text.word_mask))]
        outputs = {**_tokens(image), **_tokens(text), "score": torch.cat([self.model.score(*pair)[0] for pair in pairs])}
        if has_standard_errors(self.model.config):
            outputs["standard_error"] = torch.cat([standard_errors(self.model, *pair)[0] for pair in pairs])
        return {**shown, **outputs}

    def postprocess(self, outputs: dict) -> dict:
        seen = SeenImage(outputs["picture"], _features(GranAlignImageOutput, outputs), outputs["area"])
        caption, offsets = outputs["caption"], outputs["offsets"]
        words = merge_pieces(caption, offsets)
        read = ReadCaption(caption, _features(GranAlignTextOutput, outputs), words, offsets, [])
        error = outputs.get("standard_error")
        return {
            "score": outputs["score"].item(),
            "standard_error": None if error is None else error.item(),
            "words": [_describe(word) for word in align_words(self.model, seen, read, words)],
        }


class ImageTextRetrievalPipeline(_GranAlignPipeline):
    r"""
    The task `"image-text-retrieval"`: the captions that belong to a picture, or the pictures that belong to a sentence.

    ```python
    >>> from transformers import pipeline

    >>> retriever = pipeline("image-text-retrieval", model="org/granalign", trust_remote_code=True)
    >>> retriever(text="two dogs on a beach", candidates=["a.jpg", "b.jpg", "c.jpg"], top_k=1)
    [{'index': 2, 'score': 0.81, 'probability': 0.93, 'standard_error': 0.01, 'is_in_answer_set': True}]
    ```
    """

    def __call__(
        self,
        inputs: Any = None,
        *,
        image: Any = None,
        text: str | None = None,
        candidates: Sequence | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> list[dict] | list[list[dict]]:
        r"""
        Args:
            inputs: a dict of the next three, or a list, generator or dataset of such dicts.
            image: a path, URL, PIL image or array that looks for its captions. text: a sentence that looks for pictures.
            candidates: the captions, or the pictures.
            batch_size: candidates that are encoded together, 32 by default.
            top_k: how many of the candidates are given, all by default.
            timeout: seconds to wait for a picture of a URL.

        Returns:
            For each query its candidates from the highest score down, each a dict with `index` (among the candidates),
            `score`, `probability` (softmax over the candidates; a probability if the model is calibrated and one of them,
            in a gallery of about the size of that of the calibration, is right), `standard_error` (`None` for models whose
            regions have no variance) and `is_in_answer_set` (`None` if the model is not calibrated): whether it is among
            the answers that hold the right one for 90 % of the queries. A single candidate has no rival: both are `None`.

        Raises:
            ValueError: not exactly one of `image` and `text`, no candidates or one that cannot be read, or `top_k` below 1.
        """
        if inputs is None:
            query = {"image": image} if text is None else {"text": text} if image is None else {"image": image, "text": text}
            inputs = query | {"candidates": candidates}
        size = batch_size or self._batch_size or BATCH_SIZE
        return super().__call__(inputs, batch_size=1, candidates_at_a_time=size, **kwargs)

    def _sanitize_parameters(self, candidates_at_a_time=None, timeout=None, top_k=None):
        if top_k is not None and top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
        forward = {"size": candidates_at_a_time, "timeout": timeout}
        return (
            {},
            {name: value for name, value in forward.items() if value is not None},
            {} if top_k is None else {"top_k": top_k},
        )

    def preprocess(self, inputs: dict) -> dict:
        if not isinstance(inputs, dict):
            raise ValueError(f"A query must be a dict with `image` or `text` and `candidates`, got {inputs!r:.80}.")
        given = [side for side in ("image", "text") if inputs.get(side) is not None]
        if len(given) != 1:
            raise ValueError(f"Pass either `image` or `text` as the query, got {given or 'neither'}.")
        candidates = inputs.get("candidates")
        if candidates is None or isinstance(candidates, str) or len(candidates) == 0:
            raise ValueError(f"`candidates` must be a list that is not empty, got {candidates!r:.80}.")
        return {"side": given[0], "query": inputs[given[0]], "candidates": candidates}

    def _forward(self, inputs: dict, size: int = BATCH_SIZE, timeout: float | None = None) -> dict:
        side, candidates = inputs["side"], inputs["candidates"]
        other = {"image": "text", "text": "image"}[side]
        query = self._encode(side, [inputs["query"]], timeout)
        scores, errors = [], []
        for start in range(0, len(candidates), size):
            part = self._encode(other, candidates[start : start + size], timeout)
            pair = (query, part) if side == "image" else (part, query)
            scores.append(self.model.score(*pair).flatten())
            if has_standard_errors(self.model.config):
                errors.append(standard_errors(self.model, *pair).flatten())
        return {"side": side, "scores": torch.cat(scores), "errors": torch.cat(errors) if errors else None}

    def _encode(self, side: str, things: Sequence, timeout: float | None) -> Any:
        if side == "text":
            return self.model.get_text_features(**self.processor(text=list(things), return_tensors="pt").to(self.device))
        inputs = self.processor(images=[_load(thing, timeout) for thing in things], return_tensors="pt")
        return self.model.get_image_features(inputs["pixel_values"].to(self.device, self.dtype))

    def postprocess(self, outputs: dict, top_k: int | None = None) -> list[dict]:
        scores, errors, config = outputs["scores"].double(), outputs["errors"], self.model.config
        has_rivals, lowest = len(scores) > 1, None
        probabilities = (config.logit_scale * scores).softmax(0)
        if has_rivals and config.conformal_thresholds is not None:
            lowest = scores.max() - config.conformal_thresholds[("image", "text").index(outputs["side"])]
        return [
            {
                "index": index,
                "score": scores[index].item(),
                "probability": probabilities[index].item() if has_rivals else None,
                "standard_error": None if errors is None else errors[index].item(),
                "is_in_answer_set": None if lowest is None else bool(scores[index] >= lowest),
            }
            for index in scores.argsort(descending=True, stable=True)[:top_k].tolist()
        ]


PIPELINES = {"image-text-alignment": ImageTextAlignmentPipeline, "image-text-retrieval": ImageTextRetrievalPipeline}


def custom_pipelines() -> dict[str, dict]:
    """What the config of a checkpoint says of the pipelines whose code travels with it."""
    module = __name__.rpartition(".")[2]
    return {
        task: {"impl": f"{module}.{pipeline.__name__}", "pt": ["AutoModel"], "type": "multimodal"}
        for task, pipeline in PIPELINES.items()
    }


def _load(image: Any, timeout: float | None) -> Any:
    """The picture of a URL; anything else is left to the processor."""
    is_url = isinstance(image, str) and image.startswith(("http://", "https://"))
    return load_image(image, timeout=timeout) if is_url else image


def _tokens(features: Any) -> dict[str, Tensor]:
    """The fields that an aligner scores, without those of the encoder."""
    of_encoder = {field.name for field in fields(BaseModelOutputWithPooling)}
    return {name: value for name, value in features.items() if name not in of_encoder}


def _row(features: Any, number: int) -> Any:
    return type(features)(**{name: value[number : number + 1] for name, value in _tokens(features).items()})


def _features(kind: type, outputs: dict) -> Any:
    return kind(**{field.name: outputs[field.name] for field in fields(kind) if field.name in outputs})


def _describe(word: AlignedWord) -> dict[str, Any]:
    box = dict(zip(("xmin", "ymin", "xmax", "ymax"), map(round, word.box)))
    described = {"word": word.text, "start": word.start, "end": word.end, "score": word.map.max().item()}
    return described | {"saliency": word.saliency, "box": box, "map": word.map}


def _kind(value: Any) -> str:
    return f"keys {sorted(value)}" if isinstance(value, dict) else type(value).__name__
