"""Whether a training waits for its pictures: what reading one costs, and how fast ViT-Tiny trains on them.

    python tests/benchmarks/data.py [--only SECTION ...] [--rounds 7] [--output tests/benchmarks/data.json]

The pictures are JPEG files of a photograph's size and detail, drawn here; the encoders have the sizes of ViT-Tiny and
MiniLM-L6 with random weights, which cost as much as trained ones. It wants an otherwise idle machine.
"""

from __future__ import annotations

import io
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import report
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset, Features, Image, List, Value
from measuring import alternate, milliseconds
from PIL import Image as PILImage
from transformers import BertConfig, ViTConfig, ViTImageProcessorPil

from granalign_hf import GranAlignConfig, GranAlignModel, GranAlignProcessor
from granalign_hf.modeling.processing_granalign import read_image
from granalign_hf.training.batches import Collator, TrainingImages, random_resized_crop
from granalign_hf.training.build import word_tokenizer
from granalign_hf.training.data import CaptionedImages
from granalign_hf.training.loaders import training_loader
from granalign_hf.training.throughput import Throughput

NUM_PICTURES = 256
BATCH_SIZE = 32
PICTURE_SIZE = (500, 375)  # of most photographs of Flickr30K
VISION = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
TEXT = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
RUNS = tuple(itertools.product(("bf16", "no"), (0, 1, 2)))  # precision, workers
CAPTIONS = ["a brown dog runs over the green grass with a red ball", "two men in blue shirts stand on a street at night"]


def photograph(seed: int) -> bytes:
    """A JPEG file with detail at every scale, as a photograph has it: about 100 kilobytes."""
    rng, width, height = np.random.default_rng(seed), *PICTURE_SIZE
    canvas = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((4, 0.5), (16, 0.25), (64, 0.12), (250, 0.13)):
        noise = PILImage.fromarray(rng.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8))
        canvas += weight * np.asarray(noise.resize(PICTURE_SIZE, PILImage.Resampling.BICUBIC), dtype=np.float32)
    file = io.BytesIO()
    PILImage.fromarray(canvas.astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


def pictures() -> CaptionedImages:
    table = Dataset.from_dict(
        {
            "image": [{"bytes": photograph(seed), "path": None} for seed in range(NUM_PICTURES)],
            "captions": [CAPTIONS] * NUM_PICTURES,
        },
        features=Features({"image": Image(), "captions": List(Value("string"))}),
    )
    names = [str(number) for number in range(NUM_PICTURES)]
    return CaptionedImages(table, "image", list(range(NUM_PICTURES)), names, [CAPTIONS] * NUM_PICTURES)


def processor() -> GranAlignProcessor:
    return GranAlignProcessor(ViTImageProcessorPil(), word_tokenizer(CAPTIONS))  # 224 x 224


def reading(rounds: int) -> list[dict]:
    """From a JPEG file of 500 x 375 pixels to the values that ViT-Tiny takes, in one process."""
    data, own = pictures(), processor()
    images, collate = TrainingImages(data, 1, 0.6, seed=0), Collator(own, 0.2)
    numbers = range(min(BATCH_SIZE, NUM_PICTURES))
    encoded = [photograph(seed) for seed in numbers]
    decoded = [read_image(content) for content in encoded]
    rng = np.random.default_rng(0)
    contenders: dict[str, Callable[[], object]] = {
        "decoding": lambda: [read_image(content) for content in encoded],
        "random crop and flip": lambda: [random_resized_crop(rng, image, 0.6) for image in decoded],
        "resizing to 224 x 224 and scaling": lambda: own.image_processor(decoded, return_tensors="pt"),
        "all of a training batch, captions too": lambda: collate([images[n] for n in numbers]),
    }
    seconds = alternate(contenders, rounds)
    return [
        {
            "what": name,
            "ms a picture": milliseconds(seconds, name) / len(numbers),
            "pictures a second": 1000 * len(numbers) / milliseconds(seconds, name),
        }
        for name in contenders
    ]


def training(rounds: int) -> list[dict]:
    """One epoch of ViT-Tiny and MiniLM's size with GRM on these pictures: precision, and processes that load them. The model
    alone trains on one batch again and again."""
    data = pictures()
    rows = []
    for precision, num_workers in RUNS:
        measured = [one_run(data, precision, num_workers) for _ in range(rounds)]
        medians = {name: statistics.median(one[name] for one in measured) for name in measured[0]}
        rows.append({"precision": precision, "workers": num_workers, **medians})
    forget_accelerator()
    return rows


def forget_accelerator() -> None:
    """So that the next one may have another precision."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def one_run(data: CaptionedImages, precision: str, num_workers: int) -> dict[str, float]:
    forget_accelerator()
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    own = processor()
    vision = ViTConfig(image_size=224, patch_size=16, **VISION)
    text = BertConfig(vocab_size=30_522, **TEXT)
    model = GranAlignModel(GranAlignConfig.from_vision_text_configs(vision, text)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = TrainingImages(data, 1, 0.6, seed=0)
    loader = training_loader(images, Collator(own, 0.2), BATCH_SIZE, num_workers, torch.Generator(), is_pinned=False)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def train(batches: Iterator[dict]) -> dict[str, float]:
        throughput = Throughput()
        for batch in throughput.watch(batches):
            accelerator.backward(model(**batch, return_loss=True).loss)
            optimizer.step()
            optimizer.zero_grad()
        return throughput.rates()

    batch = next(iter(loader))  # starts the workers too
    train(iter([batch]))
    alone = train(itertools.repeat(batch, len(loader)))
    together = train(iter(loader))
    return {
        "pairs a second": together["pairs_per_second"],
        "share of time waiting": together["data_wait_share"],
        "model alone": alone["pairs_per_second"],
    }


SECTIONS: report.Sections = {"reading": reading, "training": training}
HEAD = "# Data\n\nWritten by `python tests/benchmarks/data.py`: whether a training waits for its pictures.\n"


if __name__ == "__main__":
    report.main(__doc__, HEAD, SECTIONS, Path(__file__).with_suffix(".json"))
