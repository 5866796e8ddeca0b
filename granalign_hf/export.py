"""A model as graphs that run without this package: vision side, text side and scorer, as ONNX or by torch.export.

B images, C captions, Lt word tokens; all of them may differ from call to call. The outputs of the sides are the fields of
[`GranAlignImageOutput`] and [`GranAlignTextOutput`] that the aligner has; some of them are inputs of the scorer, under the
same names.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .modeling.outputs import GranAlignImageOutput, GranAlignTextOutput

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
PARTS = ("vision", "text", "scorer")
TOLERANCE = 1e-4  # between the scores of the graphs and those of the model
_OF_ENCODERS = {field.name for field in fields(BaseModelOutputWithPooling)}
_IMAGE_TOKENS, _TEXT_TOKENS = (
    [field.name for field in fields(kind) if field.name not in _OF_ENCODERS]
    for kind in (GranAlignImageOutput, GranAlignTextOutput)
)
_SCORED = ("patch_embeds", "patch_mask", "patch_saliency", "patch_logits", "region_embeds", *_TEXT_TOKENS)
_DYNAMIC = torch.export.Dim.DYNAMIC


class Exported(NamedTuple):
    """What [`export`] has written: three files, and by how much their scores differ from the model's at most."""

    files: list[Path]
    difference: float


class _Graph(NamedTuple):
    """A module to export, with inputs to trace it with."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]


class _Side(nn.Module):
    def __init__(self, model: Any, outputs: list[str]):
        super().__init__()
        self.model, self.outputs = model, outputs


class _VisionSide(_Side):
    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        features = self.model.get_image_features(pixel_values)
        return tuple(features[name] for name in self.outputs)


class _TextSide(_Side):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        features = self.model.get_text_features(input_ids, attention_mask)
        return tuple(features[name] for name in self.outputs)


class _Scorer(nn.Module):
    def __init__(self, model: Any, inputs: list[str]):
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tokens: Tensor) -> Tensor:
        by_name = dict(zip(self.inputs, tokens, strict=True))
        image = GranAlignImageOutput(**{name: by_name[name] for name in self.inputs if name in _IMAGE_TOKENS})
        text = GranAlignTextOutput(**{name: by_name[name] for name in self.inputs if name in _TEXT_TOKENS})
        return self.model.config.logit_scale * self.model.score(image, text)


def export(model: Any, processor: Any, folder: str | os.PathLike, format: str = "onnx", is_int8: bool = False) -> Exported:
    r"""
    Writes `vision`, `text` and `scorer` into a folder, with the config and the processor, and compares them with the model.

    Args:
        model: a [`GranAlignModel`] in evaluation mode, in float32 on the CPU. processor: its [`GranAlignProcessor`].
        format: `"onnx"` (needs the extra `export`) or `"torch-export"`.
        is_int8: of ONNX, whether the weights of both encoders are quantised to 8 bits, the activations as they come (dynamic
            quantisation). The scorer stays in float32, and no difference is too large.

    Returns:
        The three files, and the largest difference between their scores and the model's, for random pixels and words.

    Raises:
        ValueError: another `format`, int8 of another format than ONNX, a model in training mode, in another dtype or of
            features of regions, a folder with graphs of the other format.
        ImportError: a package for ONNX is missing.
        RuntimeError: the scores differ from those of the model by more than 1e-4.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {[*FORMATS]}, got {format!r}.")
    if is_int8 and format != "onnx":
        raise ValueError(f'`is_int8` needs `format="onnx"`, got {format!r}.')
    if model.training:
        raise ValueError("`model` is in training mode, where scores are drawn at random. Call `model.eval()` first.")
    if model.dtype != torch.float32:
        raise ValueError(f"`model` must be in float32, got {model.dtype}. Call `model.float()` first.")
    if (
        not getattr(processor.image_processor, "reads_pictures", True)
        or model.config.text_config.model_type == "gru_encoder"
    ):
        raise ValueError(
            "`model` takes features of regions or has a GRU, whose steps follow the captions: no graph fits all."
        )
    folder = Path(folder)
    others = [file.name for other, suffix in FORMATS.items() if other != format for file in folder.glob(f"*{suffix}")]
    if others:
        raise ValueError(f"{folder} has graphs of another format ({', '.join(sorted(others))}). Choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    graphs = _graphs(model, _examples(model, processor, num_images=2, num_captions=3, num_words=5))
    files = [folder / f"{part}{FORMATS[format]}" for part in PARTS]
    for graph, file in zip(graphs, files, strict=True):
        (_write_onnx if format == "onnx" else _write_torch)(graph, file)
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    if is_int8:
        for file in files[:2]:
            _quantize(file)
    difference = _difference(model, _examples(model, processor, num_images=3, num_captions=4, num_words=9), folder)
    if not is_int8 and not difference <= TOLERANCE:
        raise RuntimeError(f"The graphs in {folder} score differently from the model, by up to {difference:.2g}.")
    return Exported(files, difference)


@torch.no_grad()
def _graphs(model: Any, inputs: dict[str, Tensor]) -> list[_Graph]:
    image = model.get_image_features(inputs["pixel_values"])
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    tokens = {name: image[name] for name in _IMAGE_TOKENS if image.get(name) is not None}
    words = {name: text[name] for name in _TEXT_TOKENS if text.get(name) is not None}
    scored = {name: value for name, value in {**tokens, **words}.items() if name in _SCORED}
    captions = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return [
        _Graph(_VisionSide(model, [*tokens]), {"pixel_values": inputs["pixel_values"]}, [*tokens]),
        _Graph(_TextSide(model, [*words]), captions, [*words]),
        _Graph(_Scorer(model, [*scored]), scored, ["logits_per_image"]),
    ]


def _examples(model: Any, processor: Any, num_images: int, num_captions: int, num_words: int) -> dict[str, Tensor]:
    """Random pixels and words, the last caption shorter than the others."""
    generator = torch.Generator().manual_seed(0)
    blank = processor(images=np.zeros((32, 32, 3), np.uint8), return_tensors="pt")["pixel_values"]
    mask = torch.ones(num_captions, num_words, dtype=torch.long)
    mask[-1, num_words // 2 :] = 0
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return {
        "pixel_values": torch.randn(num_images, *blank.shape[1:], generator=generator),
        "input_ids": torch.randint(vocabulary, (num_captions, num_words), generator=generator),
        "attention_mask": mask,
    }


def _dynamic_shapes(graph: _Graph) -> tuple[dict[int, Any], ...]:
    """The numbers of images, captions and words are free; patches, regions and pixels are as the encoder has them."""
    words = (*_TEXT_TOKENS, "input_ids", "attention_mask")
    return tuple({0: _DYNAMIC, 1: _DYNAMIC} if name in words else {0: _DYNAMIC} for name in graph.inputs)


@torch.no_grad()
def _write_torch(graph: _Graph, file: Path) -> None:
    shapes = _dynamic_shapes(graph)
    program = torch.export.export(
        graph.module, tuple(graph.inputs.values()), dynamic_shapes=(shapes,) if isinstance(graph.module, _Scorer) else shapes
    )
    torch.export.save(program, file, extra_files={"names.json": json.dumps([[*graph.inputs], graph.outputs])})


@torch.no_grad()
def _write_onnx(graph: _Graph, file: Path) -> None:
    shapes = _dynamic_shapes(graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own insides
        program = torch.onnx.export(
            graph.module,
            tuple(graph.inputs.values()),
            dynamo=True,
            dynamic_shapes=(shapes,) if isinstance(graph.module, _Scorer) else shapes,
            input_names=[*graph.inputs],
            output_names=graph.outputs,
            verbose=False,
        )
    assert program is not None  # as always with dynamo
    program.save(file)


def _quantize(file: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = file.with_suffix(".float.onnx")
    file.rename(whole)
    # It says on the root logger that more could be done.
    quantize_dynamic(whole, file, weight_type=QuantType.QInt8, per_channel=True)
    whole.unlink()


def _difference(model: Any, inputs: dict[str, Tensor], folder: Path) -> float:
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
    return float((ExportedModel(folder)(**inputs) - expected).abs().max()) / model.config.logit_scale


class ExportedModel:
    r"""
    The three graphs of [`export`] as one model, in ONNX Runtime or PyTorch, whichever the folder has.

    ```python
    >>> from granalign_hf.export import ExportedModel

    >>> exported = ExportedModel("runs/demo-scenes-onnx")
    >>> logits_per_image = exported(**processor(images=images, text=captions, return_tensors="pt"))
    ```

    Raises:
        ValueError: the folder has neither kind of graphs. ImportError: it has ONNX, and ONNX Runtime is missing.
    """

    def __init__(self, folder: str | os.PathLike):
        suffix = next((s for s in FORMATS.values() if all((Path(folder) / f"{p}{s}").is_file() for p in PARTS)), None)
        if suffix is None:
            raise ValueError(f"`folder` must hold vision, text and scorer as .onnx or .pt2 of `export`, {folder} does not.")
        load = _load_onnx if suffix == ".onnx" else _load_torch
        self.vision, self.text, self.scorer = (load(Path(folder) / f"{part}{suffix}") for part in PARTS)

    def get_image_features(self, pixel_values: Tensor) -> GranAlignImageOutput:
        return GranAlignImageOutput(**self.vision(pixel_values=pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> GranAlignTextOutput:
        return GranAlignTextOutput(**self.text(input_ids=input_ids, attention_mask=attention_mask))

    def __call__(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        """(B, channels, height, width), (C, Lt) and (C, Lt) -> `logits_per_image` (B, C); other inputs are not read."""
        tokens = {**self.get_image_features(pixel_values), **self.get_text_features(input_ids, attention_mask)}
        return self.scorer(**tokens)["logits_per_image"]


def _load_onnx(file: Path) -> Callable[..., dict[str, Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    inputs, outputs = ([one.name for one in ends] for ends in (session.get_inputs(), session.get_outputs()))

    def run(**given: Tensor) -> dict[str, Tensor]:
        values = session.run(outputs, {name: given[name].numpy() for name in inputs})
        return {name: torch.from_numpy(value) for name, value in zip(outputs, values, strict=True)}

    return run


def _load_torch(file: Path) -> Callable[..., dict[str, Tensor]]:
    names: dict[str, str] = {"names.json": ""}
    module = torch.export.load(file, extra_files=names).module()
    inputs, outputs = json.loads(names["names.json"])

    @torch.no_grad()
    def run(**given: Tensor) -> dict[str, Tensor]:
        values = module(*(given[name] for name in inputs))
        return dict(zip(outputs, [values] if isinstance(values, Tensor) else values, strict=True))

    return run
