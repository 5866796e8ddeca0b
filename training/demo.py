"""What a model trained on drawn scenes has learned: recalls and pointing on unseen scenes, and one picture.

python -m granalign_hf.training.demo CHECKPOINT
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

import numpy as np
import torch

from granalign_hf import GranAlignModel, GranAlignProcessor
from granalign_hf.evaluation import bootstrap_interval, fold_ranks
from granalign_hf.explanation import align, word_maps, words_of
from granalign_hf.figure import figure
from granalign_hf.grounding import pointing_game
from granalign_hf.model_card import write_model_card
from granalign_hf.training.data import CaptionedImages, load_split
from granalign_hf.training.protocols import mean_metrics
from granalign_hf.training.scoring import scored_split
from granalign_hf.whole_files import write_whole

GALLERY = 100


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        raise SystemExit("usage: python -m granalign_hf.training.demo CHECKPOINT")
    folder = Path(argv[0])
    model = GranAlignModel.from_pretrained(folder).eval()
    processor = GranAlignProcessor.from_pretrained(folder)
    scenes = load_split("scenes", "test")
    with scored_split(model, processor, scenes, 64, folder / "metrics-demo-unfinished") as (scores, _):
        folds = fold_ranks(scores, scenes.caption_image_index, len(scenes) // GALLERY)
    result: dict = {
        "dataset": "scenes",
        "split": "test",
        "protocol": f"{len(scenes)} unseen scenes in galleries of {GALLERY}, mean over galleries",
        "num_images": len(scenes),
        "num_captions": len(scenes.caption_image_index),
        "date": datetime.date.today().isoformat(),
        "command": f"python -m granalign_hf.training.demo {folder.name}",
        "metrics": mean_metrics(folds),
        "intervals": {name: list(interval) for name, interval in bootstrap_interval(folds).items()},
        "pointing": pointing(model, processor, scenes),
    }
    write_whole(folder / "metrics-demo.json", json.dumps(result, indent=2) + "\n")
    caption = min(scenes.captions[0], key=len)  # names objects and nothing else
    write_model_card(folder)
    figure(align(model, processor, scenes.image(0), caption), folder / "demo.png")
    print(f"{len(scenes)} unseen scenes, galleries of {GALLERY}: rSum {result['metrics']['rsum']:.1f} of 600")
    print(
        f"pointing accuracy {result['pointing']['accuracy']:.1f} % of {result['pointing']['words']} words "
        f"(a random patch: {result['pointing']['random_patch']:.1f} %)"
    )
    print(f"picture: {folder / 'demo.png'}")
    return result


@torch.no_grad()
def pointing(model: GranAlignModel, processor: GranAlignProcessor, scenes: CaptionedImages) -> dict:
    """Share of the located words whose highest patch lies in one of the word's boxes, in percent."""
    maps, boxes, sizes = [], [], []
    for number in range(len(scenes)):
        picture, captions = scenes.image(number), scenes.captions[number]
        phrases = scenes.table[scenes.rows[number]]["phrases"]
        outputs = model(**processor(images=picture, text=captions, return_tensors="pt"))
        for caption_number, (caption, located) in enumerate(zip(captions, phrases, strict=True)):
            token_maps = word_maps(outputs, 0, caption_number, level_weights=model.aligner.level_weights)
            words = {word.start: word for word in words_of(caption, processor.tokenizer)}
            for phrase in located:
                maps.append(token_maps[list(words[phrase["char_start"]].tokens)].mean(0).numpy())
                boxes.append(phrase["boxes"])
                sizes.append(picture.size[::-1])
    hits = pointing_game(maps, boxes, np.array(sizes))
    return {
        "words": len(maps),
        "accuracy": 100 * hits.hit.mean(),
        "random_patch": 100 * hits.random_patch.mean(),
        "image_center": 100 * hits.image_center.mean(),
    }


if __name__ == "__main__":
    main()
