"""The search index: two stages beside the exact score of everything, and what indexing costs beyond the encoder.

    python tests/benchmarks/retrieval.py [--only SECTION ...] [--rounds 7] [--output tests/benchmarks/retrieval.json]

Tokens of pictures are drawn at random, photographs as in data.py; the encoders have the sizes of ViT-Tiny and MiniLM-L6 with
random weights. Recall is measured on photographs by training/measure_search.py. It wants an otherwise idle machine.
"""

from __future__ import annotations

import functools
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import data
import report
import torch
from measuring import alternate, grown_megabytes, milliseconds, ratio
from PIL import Image
from similarity import draw
from torch import Tensor
from torch.nn.functional import normalize
from transformers import BertConfig, ViTConfig

from granalign_hf import GranAlignConfig, GranAlignModel
from granalign_hf.modeling.outputs import GranAlignImageOutput, GranAlignTextOutput
from granalign_hf.retrieval import GranAlignIndex

NUM_PICTURES = 10_000
BLOCK = 500  # pictures that are drawn, stored and scored at a time
NUM_QUERIES = 20
NUM_PHOTOGRAPHS = 256
PATCHES, DIM = 196, 512


def grm() -> GranAlignModel:
    torch.manual_seed(0)
    vision, text = ViTConfig(image_size=224, patch_size=16, **data.VISION), BertConfig(vocab_size=30_522, **data.TEXT)
    return GranAlignModel(GranAlignConfig.from_vision_text_configs(vision, text, projection_dim=DIM)).eval()


def drawn_images(model: GranAlignModel, number: int) -> GranAlignImageOutput:
    """A block of pictures: patches around a few directions, as those of a photograph are, and what GRM says of them."""
    generator = torch.Generator().manual_seed(number)
    topics = torch.randn(BLOCK, 8, DIM, generator=generator)
    chosen = torch.randint(8, (BLOCK, PATCHES), generator=generator)
    noise = torch.randn(BLOCK, PATCHES, DIM, generator=generator)
    patches = normalize(topics.gather(1, chosen[..., None].expand(-1, -1, DIM)) + noise, dim=-1)
    mask = torch.ones(BLOCK, PATCHES, dtype=torch.bool)
    fields = {"patch_embeds": patches, "patch_mask": mask, "pooler_output": patches.mean(1)}
    shapes = torch.tensor([[14, 14]] * BLOCK)
    return GranAlignImageOutput(**fields, spatial_shapes=shapes, **model.aligner.describe_image(patches, mask))


def drawn_queries() -> list[GranAlignTextOutput]:
    tokens = draw(1, NUM_QUERIES, 1, DIM)
    queries = []
    for number, mask in enumerate(tokens["word_mask"]):
        own = {name: tokens[name][number : number + 1, mask] for name in ("word_embeds", "word_saliency", "word_mask")}
        queries.append(GranAlignTextOutput(**own, pooler_output=own["word_embeds"].mean(1)))
    return queries


def kernel(model: GranAlignModel, images: GranAlignImageOutput, query: GranAlignTextOutput) -> list[Tensor]:
    """As many scores as there are pictures, from float32 tokens in memory (those of one block, again and again)."""
    return [model.score(images, query) for _ in range(NUM_PICTURES // BLOCK)]


def filled(folder: str, model: GranAlignModel, num_pictures: int) -> GranAlignIndex:
    index = GranAlignIndex.create(f"{folder}/index", model, data.processor())
    for number in range(num_pictures // BLOCK):
        names = [f"{number}-{n}" for n in range(BLOCK)]
        index.add_features(drawn_images(model, number), names, [{}] * BLOCK)
    index.publish()
    return index


def search_each(index: GranAlignIndex, queries: list[GranAlignTextOutput]) -> None:
    for query in queries:
        index.stages.search(query, 10, None, 100, False, None)


@torch.no_grad()
def searching(rounds: int) -> list[dict]:
    """One caption among 10,000 pictures of 196 patches, K = 5, without the text encoder: two stages with 100 candidates, the
    engine alone, the exact score of all from the shards, and the kernel alone on tokens in memory. ms a caption."""
    model = grm()
    with tempfile.TemporaryDirectory() as folder, filled(folder, model, NUM_PICTURES) as index:
        images, queries = drawn_images(model, 0), drawn_queries()
        vectors = [(query.word_embeds * query.word_saliency[..., None])[0].numpy() for query in queries]
        seconds = alternate(
            {
                "two stages": lambda: search_each(index, queries),
                "engine alone": lambda: [index.engine.search("regions", matrix, 100) for matrix in vectors],
                "exact": lambda: index.stages.search(queries[0], 10, None, 100, True, None),
                "kernel alone": lambda: kernel(model, images, queries[0]),
            },
            rounds,
        )
    each = {"two stages": NUM_QUERIES, "engine alone": NUM_QUERIES, "exact": 1, "kernel alone": 1}
    return [
        {
            "search": name,
            "ms": milliseconds(seconds, name) / count,
            "two stages are faster by": ratio(seconds, name, "two stages") * NUM_QUERIES / count,
        }
        for name, count in each.items()
    ]


@torch.no_grad()
def memory(rounds: int) -> list[dict]:
    """What ten searches take in an index that is open and was searched before: the most that the process has of its own, and
    pages of token files that the system maps and takes back when it needs room. MB, once."""
    model, queries, rows = grm(), drawn_queries(), []
    for num_pictures in (NUM_PICTURES // 5, NUM_PICTURES):
        with tempfile.TemporaryDirectory() as folder, filled(folder, model, num_pictures) as index:
            search_each(index, queries[:10])
            own, mapped = grown_megabytes(functools.partial(search_each, index, queries[10:]))
        rows.append({"pictures": num_pictures, "own, MB": own, "mapped, MB": mapped})
    return rows


def indexing(rounds: int) -> list[dict]:
    """256 photographs into an index, ViT-Tiny on the CPU, batches of 32: where the time goes. Storage is shards, engine and
    the copy for readers; an encoder ten times as fast is worked out, not measured."""
    model, processor = grm(), data.processor()
    pictures = [Image.open(io.BytesIO(data.photograph(seed))) for seed in range(NUM_PHOTOGRAPHS)]
    measured = [indexing_once(model, processor, pictures, number) for number in range(rounds)]
    rows = []
    for tokens in ("int8", None):
        total, storage = (statistics.median(one[tokens][kind] for one in measured) for kind in ("total", "storage"))
        fast = (total - storage) / 10 + storage
        shares = {"share of storage": storage / total, "with an encoder 10 x as fast": storage / fast}
        rows.append({"tokens": str(tokens), "ms a picture": 1000 * total / NUM_PHOTOGRAPHS, **shares})
    return rows


def indexing_once(model: GranAlignModel, processor, pictures: list, number: int) -> dict[str | None, dict[str, float]]:
    found: dict[str | None, dict[str, float]] = {}
    for tokens in ("int8", None):
        with tempfile.TemporaryDirectory() as folder:
            index = GranAlignIndex.create(f"{folder}/index", model, processor, tokens=tokens)
            clock = SimpleNamespace(seconds=0.0)
            index.add_features = timed(index.add_features, clock)  # type: ignore[method-assign]
            index.close = timed(index.close, clock)  # type: ignore[method-assign]
            started = time.perf_counter()
            index.add(pictures, [str(n) for n in range(len(pictures))], is_quiet=True)
            index.close()
            found[tokens] = {"total": time.perf_counter() - started, "storage": clock.seconds}
    return found


def timed(run: Callable, clock: SimpleNamespace) -> Callable:
    def wrapped(*args: Any) -> None:
        started = time.perf_counter()
        run(*args)
        clock.seconds += time.perf_counter() - started

    return wrapped


SECTIONS: report.Sections = {"searching": searching, "memory": memory, "indexing": indexing}
HEAD = "# Search\n\nWritten by `python tests/benchmarks/retrieval.py`: two stages, exact scores, and the cost of indexing.\n"


if __name__ == "__main__":
    report.main(__doc__, HEAD, SECTIONS, Path(__file__).with_suffix(".json"))
