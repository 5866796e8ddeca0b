"""One loss for all processes: each scores its own images with the captions of all, and no negative is left out.

Captions travel, patches stay: a process gathers the words of all, scores its own images, and gathers the scores. The loss of
all scores is then the same everywhere, its hardest negatives included, and the sum over the processes of their gradients is
its gradient. With B images and C captions of up to Lt words and d features, in all processes together, one process receives

    forward    C Lt (4 d + 1) bytes of words and their mask (+ 4 C Lt of saliency in GRM), 4 levels B C of scores,
               8 (B + C) of image ids
    backward   4 C Lt d bytes of gradients of the words (+ 4 C Lt in GRM)

Gathering all tokens and masks would take C Lt (4 d + 1) + B Lv (4 d + 1), and every process would score all pairs. With the
196 patches of an image against the 10 to 40 words of a caption that is several times as much.

This is the loss of one process with all images, whatever the split, but for chance and batch norm: each process draws noise,
dropout and the patches to leave out for its own images, so that another split is another draw of the same distribution, and
layers of batch norm see the images of their own process.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from granalign_hf.modeling.checks import positive_pairs
from granalign_hf.modeling.modeling_granalign import GranAlignModel
from granalign_hf.modeling.outputs import GranAlignImageOutput, GranAlignTextOutput

IMAGE_FIELDS = tuple(GranAlignImageOutput.__annotations__)
TEXT_FIELDS = tuple(GranAlignTextOutput.__annotations__)


def shared_loss(
    model: GranAlignModel, tokens: dict[str, Tensor], batch: dict[str, Tensor], use_hard_negatives: bool
) -> tuple[Tensor, dict[str, float]]:
    """The loss of the images and captions of all processes.

    Args:
        tokens: those of this process, by the names of [`GranAlignImageOutput`] and [`GranAlignTextOutput`].
        batch: has the `image_ids` and `caption_image_ids` of this process, which mean the same in every other.

    Returns:
        What to call `backward` on: the gradients that it gives, added up over the processes, are those of the loss. And the
        figures of the loss, equal in all processes: `loss`, and each term before its weight.
    """
    image = GranAlignImageOutput(**{name: tokens[name] for name in IMAGE_FIELDS if name in tokens})
    num_images = len(batch["image_ids"])
    sizes = gather_sizes(num_images, *tokens["word_mask"].shape, device=batch["image_ids"].device)
    images, captions = [own[:1] for own in sizes], [own[1:] for own in sizes]
    text = GranAlignTextOutput(**{name: gather(tokens[name], captions) for name in TEXT_FIELDS if name in tokens})
    levels = gather_scores(model.similarities(image, text), images)
    image_ids = gather(batch["image_ids"], images)
    caption_image_ids = gather(batch["caption_image_ids"], [own[:1] for own in captions])
    weighted = model.contrastive_terms(levels, positive_pairs(levels[0], image_ids, caption_image_ids), use_hard_negatives)
    share = num_images / len(image_ids)
    regularisers = {name: (w, share * value) for name, (w, value) in model.aligner.regularisers(image).items()}
    loss = torch.stack([weight * value for weight, value in (weighted | regularisers).values()]).sum()
    return loss, _figures(weighted, regularisers)


def _figures(
    contrastive: dict[str, tuple[float, Tensor]], regularisers: dict[str, tuple[float, Tensor]]
) -> dict[str, float]:
    """`loss` and its terms; of the regularisers every process has its share."""
    values = {name: value for name, (_, value) in contrastive.items()}
    if regularisers:
        shares = torch.stack([value.detach() for _, value in regularisers.values()])
        if num_processes() > 1:
            dist.all_reduce(shares)
        values |= dict(zip(regularisers, shares, strict=True))
    terms = dict(zip(values, torch.stack([value.detach() for value in values.values()]).tolist(), strict=True))
    weights = {name: weight for name, (weight, _) in (contrastive | regularisers).items()}
    return {"loss": sum(weights[name] * term for name, term in terms.items()), **terms}


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_sizes(*sizes: int, device: torch.device | None = None) -> list[list[int]]:
    """The sizes that each process has."""
    if num_processes() == 1:
        return [list(sizes)]
    return _GatherRows.apply(torch.tensor(sizes, device=device)).tolist()


def gather(rows: Tensor, sizes: list[list[int]]) -> Tensor:
    """The rows of all processes, one process after the other; the gradient of a row is the sum of what all have of it.

    Args:
        rows: (n, ...), or (n, L, ...). sizes: n, or n and L, of each process. Shorter rows are padded with 0.
    """
    if num_processes() == 1:
        return rows
    largest = [max(of_all) for of_all in zip(*sizes, strict=True)]
    missing = [(0, size - own) for size, own in zip(largest, rows.shape, strict=False)]
    rest = [(0, 0)] * (rows.ndim - len(missing))
    padded = pad(rows, [side for sides in reversed(missing + rest) for side in sides])
    return torch.cat([part[: own[0]] for part, own in zip(_GatherRows.apply(padded), sizes, strict=True)])


def gather_scores(scores: Tensor, sizes: list[list[int]]) -> Tensor:
    """(levels, b, C) of the images of this process -> (levels, B, C) of all; the gradient is that of the own rows.

    No process adds to the gradient of another's rows: all compute the same loss of the same scores.

    Args:
        sizes: the number of images of each process.
    """
    if num_processes() == 1:
        return scores
    of_all = gather(scores.detach().transpose(0, 1), sizes).transpose(0, 1)
    start = sum(own[0] for own in sizes[: dist.get_rank()])
    return torch.cat([of_all[:, :start], scores, of_all[:, start + scores.shape[1] :]], dim=1)


class _GatherRows(torch.autograd.Function):
    """(n, ...), the same shape in all processes -> (processes, n, ...)."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(num_processes())]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        own = torch.empty_like(grad[0], memory_format=torch.contiguous_format)
        dist.reduce_scatter(own, list(grad.contiguous()))
        return own
