"""One loss for all processes: 1 x 32, 2 x 16 and 4 x 8 images have the loss and the gradients of one plain forward pass."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from processes import run_processes
from tiny import tiny_inputs, tiny_model
from torch import Tensor
from torch.nn.functional import pad

from granalign_hf.modeling.checks import positive_pairs
from granalign_hf.modeling.outputs import GranAlignImageOutput, GranAlignTextOutput
from granalign_hf.training import distributed
from granalign_hf.training.distributed import IMAGE_FIELDS, TEXT_FIELDS, gather, gather_sizes, shared_loss
from granalign_hf.training.gradient_cache import CachedTokens, TokenEncoder, split_batch

ALIGNERS = {
    "grm": {},
    "max_mean": {},
    "chan": {"pooling": "logsumexp"},
    "scan": {"attention_direction": "both"},
    "laps": {},
    "vse++": {"pooling": "max"},
}
SPLITS = {1: [[32], [27]], 2: [[16, 16], [16, 11]], 4: [[8, 8, 8, 8], [8, 8, 8, 3]]}  # a full batch, and the last one
SETTINGS = [(True, None), (False, None), (True, 3)]  # use_hard_negatives, micro_batch_size


def whole_batch(num_images: int) -> dict[str, Tensor]:
    """Images with one or two captions of 3 to 9 words; the first and the last picture are of one image."""
    generator = torch.Generator().manual_seed(1)
    image_ids = torch.arange(num_images) + 5
    image_ids[-1] = image_ids[0]
    owners = torch.arange(num_images).repeat_interleave(1 + (torch.arange(num_images) % 3 == 0))
    batch = tiny_inputs(num_images, len(owners), 9)
    lengths = torch.randint(3, 10, (len(owners), 1), generator=generator)
    lengths[: len(owners) // 2].clamp_(max=6)  # so that the longest caption differs between processes
    batch["attention_mask"] = (torch.arange(9) < lengths).long()
    return {**batch, "image_ids": image_ids, "caption_image_ids": image_ids[owners], "owners": owners}


def part_of(batch: dict[str, Tensor], split: list[int], rank: int) -> dict[str, Tensor]:
    """What the collator of a process makes of its images."""
    start, stop = sum(split[:rank]), sum(split[: rank + 1])
    is_own = (batch["owners"] >= start) & (batch["owners"] < stop)
    longest = int(batch["attention_mask"][is_own].sum(1).max())
    captions = {name: batch[name][is_own][:, :longest] for name in ("input_ids", "attention_mask")}
    images = {name: batch[name][start:stop] for name in ("pixel_values", "image_ids")}
    return {**captions, **images, "caption_image_ids": batch["caption_image_ids"][is_own]}


def model_of(aligner: str, **fields):
    weights = {"entropy_weight": 0.5, "kl_weight": 0.5, "reconstruction_weight": 0.5, "budget_weight": 0.5}
    return tiny_model(aligner=aligner, **weights, **ALIGNERS[aligner], **fields)


def noisy_model():
    return model_of("grm", patch_dropout=0.2).train()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def one_step(accelerator, model, batch, use_hard_negatives=True, micro_batch_size=None):
    encoder = accelerator.prepare(TokenEncoder(model)).train(model.training)
    cached = CachedTokens(accelerator, encoder, batch, micro_batch_size)
    loss, values = shared_loss(model, cached.tokens, batch, use_hard_negatives)
    loss.backward()
    cached.backward()
    return values, gradients(model)


class Received:
    """Counts the bytes that a process receives from the collectives of `distributed.py`."""

    def __init__(self, monkeypatch):
        self.bytes = 0
        for name in ("all_gather", "reduce_scatter", "all_reduce"):
            monkeypatch.setattr(distributed.dist, name, self.counted(getattr(distributed.dist, name)))

    def counted(self, collective):
        def counted(first, *rest):
            tensors = [t for value in (first, *rest) for t in (value if isinstance(value, list) else [])] or [first]
            self.bytes += sum(tensor.nbytes for tensor in tensors)
            return collective(first, *rest)

        return counted


def one_process(rank: int, splits: list[list[int]], folder: Path) -> None:
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    results = {}
    for aligner in ALIGNERS:
        for split in splits:
            batch = part_of(whole_batch(sum(split)), split, rank)
            for setting in SETTINGS:
                results[(aligner, sum(split), *setting)] = one_step(accelerator, model_of(aligner), batch, *setting)
    if len(splits[0]) == 2:
        for micro_batch_size in (None, 5):
            model, batch = noisy_model(), part_of(whole_batch(27), splits[1], rank)
            torch.manual_seed(100 + rank)
            results["noise", micro_batch_size] = one_step(accelerator, model, batch, True, micro_batch_size)
        with pytest.MonkeyPatch.context() as patch:
            received = Received(patch)
            one_step(accelerator, model_of("grm"), part_of(whole_batch(32), splits[0], rank))
            results["received"] = received.bytes
        own = torch.arange(float(2 * (rank + 1))).view(1 + rank, 2).requires_grad_()  # 1 x 2, 2 x 2
        everything = gather(own, gather_sizes(1 + rank))
        (everything * (torch.arange(3.0)[:, None] + 10 * rank)).sum().backward()
        results["gather"] = (everything.detach(), own.grad)
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[dict]]:
    """Number of processes -> what each of them computed."""
    by_count = {}
    for count, splits in SPLITS.items():
        folder = tmp_path_factory.mktemp("processes")
        run_processes(one_process, count, splits, folder)
        by_count[count] = [torch.load(folder / f"{rank}.pt") for rank in range(count)]
    return by_count


def assert_same_step(got, expected, context) -> None:
    (values, grads), (expected_values, expected_grads) = got, expected
    assert values == pytest.approx(expected_values, abs=1e-5), context
    assert grads.keys() == expected_grads.keys()
    assert max(grad.abs().max() for grad in expected_grads.values()) > 0.01
    for name, grad in grads.items():
        difference = (grad - expected_grads[name]).abs().max().item()
        assert difference <= 1e-5, f"{context}, {name}: {difference}"


@pytest.mark.parametrize("aligner", ALIGNERS)
@pytest.mark.parametrize("num_images", [32, 27])
@pytest.mark.parametrize("use_hard_negatives", [True, False])
def test_processes_have_the_loss_and_gradients_of_one(results, aligner, num_images, use_hard_negatives):
    batch, model = whole_batch(num_images), model_of(aligner)
    del batch["owners"]
    out = model(**batch, return_loss=True, use_hard_negatives=use_hard_negatives)  # no code of `training`
    out.loss.backward()
    expected = {"loss": out.loss.item()} | {name: term.item() for name, term in out.loss_terms.items()}, gradients(model)
    for count, of_processes in results.items():
        for rank, of_process in enumerate(of_processes):
            for negatives, micro_batch_size in SETTINGS:
                if negatives == use_hard_negatives:
                    got = of_process[aligner, num_images, negatives, micro_batch_size]
                    assert_same_step(got, expected, f"{count} processes, rank {rank}, micro_batch_size {micro_batch_size}")


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_the_gradient_is_that_of_the_noise_that_was_drawn(results, micro_batch_size):
    (split,) = [split for split in SPLITS[2] if sum(split) == 27]
    model, parts = noisy_model(), []
    batches = [part_of(whole_batch(27), split, rank) for rank in range(2)]
    for rank, batch in enumerate(batches):
        torch.manual_seed(100 + rank)
        parts += [TokenEncoder(model)(part) for part in split_batch(batch, 1 if micro_batch_size is None else 4)]
    longest = max(part["word_mask"].shape[1] for part in parts)
    for part in parts:
        for name in TEXT_FIELDS:
            missing = longest - part[name].shape[1] if name in part else 0
            if missing:
                part[name] = pad(part[name], [0, 0] * (part[name].ndim - 2) + [0, missing])
    tokens = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    image = GranAlignImageOutput(**{name: tokens[name] for name in IMAGE_FIELDS if name in tokens})
    text = GranAlignTextOutput(**{name: tokens[name] for name in TEXT_FIELDS if name in tokens})
    levels = model.similarities(image, text)
    ids = [torch.cat([batch[name] for batch in batches]) for name in ("image_ids", "caption_image_ids")]
    loss, terms = model.compute_loss(image, levels, positive_pairs(levels[0], *ids))
    loss.backward()
    expected = {"loss": loss.item()} | {name: term.item() for name, term in terms.items()}, gradients(model)
    assert not tokens["patch_mask"].all()
    for of_process in results[2]:
        assert_same_step(of_process["noise", micro_batch_size], expected, "noise")


def test_a_step_receives_the_bytes_that_are_stated(results):
    batch, split, model = whole_batch(32), SPLITS[2][0], model_of("grm")
    parts = [part_of(batch, split, rank) for rank in range(2)]
    num_captions = 2 * max(len(part["caption_image_ids"]) for part in parts)  # padded to the larger number
    num_words, dim, levels = 9, model.config.projection_dim, 3
    words = num_captions * num_words * (4 * dim + 1 + 4)
    scores = 4 * levels * 32 * len(batch["owners"])
    ids = 8 * (32 + num_captions)
    backward = num_captions * num_words * (4 * dim + 4)
    sizes, regularisers = 2 * 3 * 8, 4 * 4
    assert results[2][0]["received"] == words + scores + ids + backward + sizes + regularisers


def test_gather_pads_nothing_in_and_sums_gradients(results):
    for rank, (everything, grad) in enumerate(of_process["gather"] for of_process in results[2]):
        assert everything.tolist() == [[0, 1], [0, 1], [2, 3]]
        weights = torch.arange(3.0) + (torch.arange(3.0) + 10)  # rows count n in process 0 and n + 10 in process 1
        own = weights[:1] if rank == 0 else weights[1:]
        torch.testing.assert_close(grad, own[:, None].expand(-1, 2))
