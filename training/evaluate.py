"""Checkpoint and data set -> recalls with intervals.

accelerate launch training/evaluate.py CHECKPOINT --dataset NAME --split test
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.nn.functional import pad
from tqdm import tqdm
from transformers import HfArgumentParser

from granalign_hf import GranAlignModel, GranAlignProcessor
from granalign_hf.evaluation import bootstrap_interval, ranks_to_metrics, retrieval_ranks
from granalign_hf.model_card import write_model_card
from granalign_hf.training.arguments import setting
from granalign_hf.training.data import CaptionedImages, load_split
from granalign_hf.training.features import FeatureCollator, FeatureImages, TokenFeatures
from granalign_hf.training.runtime import portable, set_up_torch

IMAGE_FIELDS = ("patch_embeds", "patch_mask", "patch_saliency", "region_assignment", "region_means", "region_embeds")
TEXT_FIELDS = ("word_embeds", "word_mask", "word_saliency")
IMAGES_PER_BLOCK = 128
CAPTIONS_PER_BLOCK = 512


@dataclass
class EvaluateArguments:
    """What to evaluate, and where to write it."""

    dataset: str = setting("scenes", "Hub name or folder of a data set; `scenes` draws one.")
    split: str = setting("test", "Split to evaluate on.")
    dataset_config: str | None = setting(None, "Configuration of the data set, where it has several.")
    image_column: str | None = setting(None, "Column of the image. Default: the first image column.")
    caption_column: str | None = setting(None, "Column of the caption or captions. Default: found by name.")
    image_id_column: str | None = setting(None, "Column that names the image. Default: found by name.")
    max_images: int | None = setting(None, "Evaluate on the first images only.")
    batch_size: int = setting(64, "Images per step.")
    matmul_precision: str = setting("highest", "float32 products: `highest`, `high` or `medium` (see torch).")
    output: str | None = setting(
        None,
        "File of the metrics. Default: metrics-SPLIT.json in the checkpoint's folder, or, for a Hub id, in the working one.",
    )


def main(argv: list[str] | None = None) -> dict:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0].startswith("--"):
        raise SystemExit("usage: accelerate launch training/evaluate.py CHECKPOINT [--dataset NAME] [--split test] ...")
    parser = HfArgumentParser(EvaluateArguments, description="Evaluates a checkpoint.", allow_abbrev=False)
    (args,) = parser.parse_args_into_dataclasses(argv[1:], look_for_args_file=False)
    checkpoint = Path(argv[0])
    output = Path(args.output or (checkpoint if checkpoint.is_dir() else Path()) / f"metrics-{args.split}.json")
    if output.is_dir() or not os.access(output.parent, os.W_OK | os.X_OK) or not output.parent.is_dir():
        parser.error(f"the output {output} cannot be written: name a file in an existing folder")
    if not checkpoint.is_dir():
        print(f"{checkpoint} is no folder, so it is taken for a Hub id; the metrics will be written to {output}")
    set_up_torch(args.matmul_precision)
    data = load_split(
        args.dataset, args.split, args.dataset_config, args.image_column, args.caption_column, args.image_id_column
    ).first(args.max_images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GranAlignModel.from_pretrained(argv[0]).to(device).eval()
    processor = GranAlignProcessor.from_pretrained(argv[0])
    image, text = encode(model, processor, data, args.batch_size)
    ranks = retrieval_ranks(score_matrix(model, image, text), data.caption_image_index)
    result = {
        "dataset": Path(args.dataset).name,
        "split": args.split,
        "protocol": f"{len(data)} images, {len(data.caption_image_index)} captions, all pairs",
        "num_images": len(data),
        "num_captions": len(data.caption_image_index),
        "date": datetime.date.today().isoformat(),
        "command": portable(shlex.join(["accelerate", "launch", "training/evaluate.py", *argv])),
        "metrics": ranks_to_metrics(ranks),
        "intervals": {name: list(interval) for name, interval in bootstrap_interval(ranks).items()},
        "diagnostics": diagnostics(image, text, data.caption_image_index),
    }
    output.write_text(json.dumps(result, indent=2) + "\n")
    # So that another checkpoint can be compared with this one by `paired_bootstrap` without evaluating it again.
    np.savez(output.with_name(f"ranks-{args.split}.npz"), **dataclasses.asdict(ranks))
    if (checkpoint / "metrics.json").is_file():
        write_model_card(checkpoint)
    print(table(result))
    print(f"written to {output}, the rank of every query to ranks-{args.split}.npz beside it")
    return result


@torch.no_grad()
def encode(
    model: GranAlignModel,
    processor: GranAlignProcessor,
    data: CaptionedImages,
    batch_size: int,
    features: TokenFeatures | None = None,
    is_quiet: bool = False,
) -> tuple[SimpleNamespace, SimpleNamespace]:
    """All images and all captions of a split as the tokens that the aligner scores, on the model's device."""
    images, texts = [], []
    stored = None if features is None else (FeatureImages(features, captions_per_image=0, seed=0), FeatureCollator(features))
    for start in tqdm(range(0, len(data), batch_size), desc="encoding", leave=False, disable=is_quiet):
        numbers = range(start, min(start + batch_size, len(data)))
        if stored is None:
            captions = [caption for n in numbers for caption in data.captions[n]]
            batch = processor(images=[data.image(n) for n in numbers], text=captions, return_tensors="pt").to(model.device)
            image = model.get_image_features(batch.pop("pixel_values"))
            text = model.get_text_features(**batch)
        else:
            items, collate = stored
            batch = send_to_device(collate([items[n] for n in numbers]), model.device)
            image = model.get_image_features(
                vision_model_output=batch["vision_model_output"], image_size=batch["image_size"]
            )
            text = model.get_text_features(
                batch["input_ids"], batch["attention_mask"], text_model_output=batch["text_model_output"]
            )
        images.append({name: image.get(name) for name in IMAGE_FIELDS})
        texts.append({name: text.get(name) for name in TEXT_FIELDS})
    return _joined(images), _joined(texts)


def _joined(parts: list[dict]) -> SimpleNamespace:
    """Concatenates batches, padded to the longest in the token dimension; a field that no batch has is `None`."""
    joined: dict[str, torch.Tensor | None] = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts if part[name] is not None]
        longest = max((t.shape[1] for t in tensors), default=0)
        padded = [pad(t, (0, 0) * (t.ndim - 2) + (0, longest - t.shape[1])) for t in tensors]
        joined[name] = torch.cat(padded) if padded else None
    return SimpleNamespace(**joined)


@torch.no_grad()
def score_matrix(model: GranAlignModel, image: SimpleNamespace, text: SimpleNamespace) -> np.ndarray:
    """(images, captions) float32 scores, by blocks of images."""
    blocks = []
    for start in range(0, len(image.patch_embeds), IMAGES_PER_BLOCK):
        block = {n: None if t is None else t[start : start + IMAGES_PER_BLOCK] for n, t in vars(image).items()}
        blocks.append(model.score(SimpleNamespace(**block), text).cpu())
    return torch.cat(blocks).numpy()


def diagnostics(image: SimpleNamespace, text: SimpleNamespace, caption_image_index: np.ndarray) -> dict[str, float]:
    """Whether saliency and regions do anything: mean and spread of the saliencies, and how alike the regions are.

    `region_mean_cosine` is the mean cosine between two regions of one image (1: all regions are the same).
    `distinct_regions` is the share of the regions of an image that are the best region of at least one word of its own
    captions, mean over images (1 / K: one region takes all words).
    `effective_patches` is 1 / sum_l assignment_lk^2, mean over images and regions (Lv: a region is the mean of all patches).

    Args:
        image, text: as returned by [`encode`]. caption_image_index: (C,) the image of each caption.
    """
    values: dict[str, float] = {}
    for name, saliency, mask in (
        ("patch_saliency", image.patch_saliency, image.patch_mask),
        ("word_saliency", text.word_saliency, text.word_mask),
    ):
        if saliency is not None:
            values[f"{name}_mean"] = saliency[mask].mean().item()
            values[f"{name}_std"] = saliency[mask].std().item()
    if image.region_embeds is not None:
        values["distinct_regions"] = _distinct_regions(image, text, torch.as_tensor(caption_image_index))
        values["effective_patches"] = (1 / image.region_assignment.square().sum(1)).mean().item()
    if image.region_means is not None and image.region_means.shape[1] > 1:
        means = torch.nn.functional.normalize(image.region_means, dim=-1)
        num_regions = means.shape[1]
        cosines = means @ means.transpose(1, 2)
        values["region_mean_cosine"] = (
            ((cosines.sum((1, 2)) - num_regions) / (num_regions * (num_regions - 1))).mean().item()
        )
    return values


def _distinct_regions(image: SimpleNamespace, text: SimpleNamespace, caption_image_index: torch.Tensor) -> float:
    """By blocks of captions: words (C, Lt, D) against the regions (C, K, D) of their own images."""
    is_best = torch.zeros(image.region_embeds.shape[:2], dtype=torch.bool, device=image.region_embeds.device)
    for start in range(0, len(text.word_embeds), CAPTIONS_PER_BLOCK):
        block = slice(start, start + CAPTIONS_PER_BLOCK)
        owners = caption_image_index[block].to(is_best.device)
        best = torch.einsum("twd,tkd->twk", text.word_embeds[block], image.region_embeds[owners]).argmax(-1)
        mask = text.word_mask[block]
        is_best[owners[:, None].expand_as(best)[mask], best[mask]] = True
    return is_best.float().mean().item()


def table(result: dict) -> str:
    """The metrics as lines of text, each with its 95 % interval over images."""
    lines = [f"{result['dataset']} {result['split']}: {result['protocol']}"]
    for name, (low, high) in result["intervals"].items():
        lines.append(f"{name:<20} {result['metrics'][name]:6.1f}   [{low:.1f}, {high:.1f}]")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
