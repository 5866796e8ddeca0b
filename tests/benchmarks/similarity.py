"""Speed and memory of the similarity beside the published forms and the limit of the matrix product.

    python tests/benchmarks/similarity.py [--only SECTION ...] [--rounds 7] [--output tests/benchmarks/similarity.json]

Everything is measured side by side in one run; ratios are medians over rounds, but those of runs of minutes are from one
round. It wants an otherwise idle machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import report
import torch
from measuring import alternate, milliseconds, peak_megabytes, ratio
from peers import (
    caption_loop_cross_attention,
    caption_loop_max_mean,
    einsum_hard_alignment,
    einsum_max_mean,
    einsum_three_levels,
    patchwise_region_noise,
)
from torch import Tensor

from granalign_hf.modeling.attention import cross_attention
from granalign_hf.modeling.losses import contrastive_hinge
from granalign_hf.modeling.regions import sample_regions
from granalign_hf.modeling.similarity import hard_alignment, level_similarities, token_similarity

CASES = ((64, 64, 196, 512), (128, 128, 49, 512), (64, 64, 576, 512), (256, 256, 196, 512))  # images, captions, patches, d
NUM_REGIONS = 5
MAX_WORDS = 40


def draw(images: int, captions: int, patches: int, dim: int, seed: int = 0) -> dict[str, Tensor]:
    """Unit-length random tokens; caption lengths like Flickr's (mean 16 word pieces, 5 to 40), padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (16 + 6 * torch.randn(captions, generator=generator)).round().clamp(5, MAX_WORDS)

    def tokens(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, dim, generator=generator), dim=-1)

    return {
        "patch_embeds": tokens(images, patches),
        "word_embeds": tokens(captions, int(lengths.max())),
        "word_mask": torch.arange(int(lengths.max())) < lengths[:, None],
        "patch_saliency": torch.rand(images, patches, generator=generator),
        "word_saliency": torch.rand(captions, int(lengths.max()), generator=generator),
        "region_embeds": tokens(images, NUM_REGIONS),
    }


def positional(tokens: dict[str, Tensor], count: int) -> list[Tensor]:
    order = ("patch_embeds", "word_embeds", "word_mask", "patch_saliency", "word_saliency", "region_embeds")
    return [tokens[name] for name in order[:count]]


def onednn_product(words: Tensor, patches: Tensor) -> Tensor:
    """The product by oneDNN's kernel itself, whatever torch.mm uses."""
    return torch.ops.mkldnn._linear_pointwise(words, patches, None, "none", [], "")


def product_alone(product: Callable[[Tensor, Tensor], Tensor], words: Tensor, patches: Tensor) -> None:
    """Packed words times all patches by tiles of 4 M elements, and nothing else."""
    step = max(4 * 2**20 // len(words), 1)
    for start in range(0, len(patches), step):
        product(words, patches[start : start + step])


# --- Sections: each returns rows of its table ---


def one_level(rounds: int) -> list[dict]:
    """One level, forward: images, captions, patches, d. The products are those of the packed words alone."""
    rows = []
    for case in CASES:
        tokens = draw(*case)
        plain = positional(tokens, 3)
        words, patches = tokens["word_embeds"][tokens["word_mask"]], tokens["patch_embeds"].flatten(0, 1)
        seconds = alternate(
            {
                "ours": partial(token_similarity, *plain),
                "onednn": partial(product_alone, onednn_product, words, patches),
                "mm": partial(product_alone, lambda w, p: w @ p.T, words, patches),
                "laps": partial(caption_loop_max_mean, *plain),
                "colpali": partial(einsum_max_mean, *plain),
            },
            rounds,
        )
        rows.append(
            {
                "case": case,
                "ms": milliseconds(seconds, "ours"),
                "share of oneDNN product": ratio(seconds, "onednn", "ours"),
                "share of torch.mm": ratio(seconds, "mm", "ours"),
                "x LAPS form": ratio(seconds, "laps", "ours"),
                "x ColPali form": ratio(seconds, "colpali", "ours"),
            }
        )
    return rows


def three_levels(rounds: int) -> list[dict]:
    """All three levels, K = 5, in units of one level and against three einsums over the 4-D tensor."""
    rows = []
    for case in CASES:
        tokens = draw(*case)
        seconds = alternate(
            {
                "one": partial(token_similarity, *positional(tokens, 3)),
                "three": partial(level_similarities, **tokens),
                "naive": partial(einsum_three_levels, *positional(tokens, 6)),
            },
            rounds,
        )
        rows.append(
            {
                "case": case,
                "ms": milliseconds(seconds, "three"),
                "in units of one level": ratio(seconds, "three", "one"),
                "x naive einsums": ratio(seconds, "naive", "three"),
            }
        )
    return rows


def other_aligners(rounds: int) -> list[dict]:
    """The other scores against their published forms, 64 images and captions, 196 patches, d = 512."""
    plain = positional(draw(*CASES[0]), 3)
    seconds = alternate(
        {
            "chan": partial(hard_alignment, *plain),
            "chan peer": partial(einsum_hard_alignment, *plain),
            "scan": partial(cross_attention, *plain, direction="t2i"),
            "scan peer": partial(caption_loop_cross_attention, *plain),
        },
        rounds,
    )
    return [
        {"score": "CHAN", "ms": milliseconds(seconds, "chan"), "x published form": ratio(seconds, "chan peer", "chan")},
        {"score": "SCAN t2i", "ms": milliseconds(seconds, "scan"), "x published form": ratio(seconds, "scan peer", "scan")},
    ]


def training_step(is_ours: bool, use_hard_negatives: bool, num_pairs: int) -> Callable[[], None]:
    """Forward and backward of the hinge at three levels, with gradients to every input."""
    tokens = draw(num_pairs, num_pairs, 196, 512)
    leaves = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in tokens.items()}
    positives = torch.eye(num_pairs, dtype=torch.bool)

    def run() -> None:
        levels = level_similarities(**leaves) if is_ours else einsum_three_levels(*positional(leaves, 6))
        loss = sum(contrastive_hinge(scores, positives, 0.2, use_hard_negatives) for scores in levels)
        torch.autograd.grad(loss, [t for t in leaves.values() if t.requires_grad])

    return run


def training(rounds: int) -> list[dict]:
    """Forward and backward of the hinge at three levels, 196 patches, d = 512; peak MB above the inputs."""
    rows = []
    for use_hard_negatives in (True, False):
        for num_pairs in (64, 128, 256):
            variants = {
                name: (is_ours, use_hard_negatives, num_pairs) for name, is_ours in (("ours", True), ("naive", False))
            }
            rounds_here = rounds if num_pairs < 256 else 1
            seconds = alternate({name: training_step(*args) for name, args in variants.items()}, rounds_here)
            rows.append(
                {
                    "negatives": "hardest" if use_hard_negatives else "all",
                    "pairs": num_pairs,
                    "rounds": rounds_here,
                    "ms": milliseconds(seconds, "ours"),
                    "x naive autograd": ratio(seconds, "naive", "ours"),
                    **{f"{name} MB": peak_megabytes(training_step, *args) for name, args in variants.items()},
                }
            )
    return rows


def gallery_step() -> Callable[[], Tensor]:
    return partial(level_similarities, **draw(1000, 5000, 196, 512))


def gallery(rounds: int) -> list[dict]:
    """1,000 images with 5,000 captions at three levels; peak MB above the inputs."""
    tokens = draw(1000, 5000, 196, 512)
    words, patches = tokens["word_embeds"][tokens["word_mask"]], tokens["patch_embeds"].flatten(0, 1)

    def product() -> None:
        for rows in words.split(1024):
            product_alone(onednn_product, rows, patches)

    seconds = alternate({"ours": partial(level_similarities, **tokens), "product": product}, 1)
    return [
        {
            "case": (1000, 5000, 196, 512),
            "rounds": 1,
            "s": milliseconds(seconds, "ours") / 1000,
            "in units of the oneDNN product": ratio(seconds, "ours", "product"),
            "MB": peak_megabytes(gallery_step),
        }
    ]


def region_noise(rounds: int) -> list[dict]:
    """One noise draw a region against one for every patch and region, 16 images, d = 512."""
    rows = []
    for num_patches, num_regions in ((196, 5), (196, 50), (576, 50)):
        generator = torch.Generator().manual_seed(0)
        assignment = torch.rand(16, num_patches, num_regions, generator=generator)
        assignment /= assignment.sum(1, keepdim=True)
        gaussians = torch.randn(2, 16, num_regions, 512, generator=generator)
        seconds = alternate(
            {
                "ours": partial(sample_regions, assignment, *gaussians),
                "naive": partial(patchwise_region_noise, assignment, *gaussians),
            },
            rounds,
        )
        rows.append(
            {"patches": num_patches, "regions": num_regions, "x a draw for every patch": ratio(seconds, "naive", "ours")}
        )
    return rows


def precision(rounds: int) -> list[dict]:
    """Three levels under torch.set_float32_matmul_precision; error against float64."""
    tokens = draw(*CASES[0])
    exact = level_similarities(**{n: t.double() if t.is_floating_point() else t for n, t in tokens.items()})

    def run(setting: str) -> Tensor:
        torch.set_float32_matmul_precision(setting)
        try:
            return level_similarities(**tokens)
        finally:
            torch.set_float32_matmul_precision("highest")

    settings = ("highest", "high", "medium")
    seconds = alternate({setting: partial(run, setting) for setting in settings}, rounds)
    return [
        {
            "matmul_precision": setting,
            "x highest": ratio(seconds, "highest", setting),
            "largest error": (run(setting) - exact).abs().max().item(),
        }
        for setting in settings
    ]


SECTIONS: dict[str, Callable[[int], list[dict]]] = {
    section.__name__: section
    for section in (one_level, three_levels, other_aligners, training, gallery, region_noise, precision)
}


HEAD = "# Similarity\n\nWritten by `python tests/benchmarks/similarity.py`; an x is how many times faster ours is.\n"


if __name__ == "__main__":
    report.main(__doc__, HEAD, SECTIONS, Path(__file__).with_suffix(".json"))
