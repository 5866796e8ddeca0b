"""Gradient caching: the gradients of the whole batch, noise and dropout included, in the memory of a part."""

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from benchmarks.measuring import peak_megabytes
from tiny import tiny_inputs, tiny_model
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_outputs import BaseModelOutput

from granalign_hf.training.distributed import shared_loss
from granalign_hf.training.gradient_cache import CachedTokens, TokenEncoder, get_random_state, num_parts, split_batch


def batch_of(num_images: int) -> dict:
    ids = torch.arange(num_images)
    return {**tiny_inputs(num_images, num_images), "image_ids": ids, "caption_image_ids": ids}


def noisy_model():
    return tiny_model(patch_dropout=0.3, entropy_weight=0.5, kl_weight=0.5, budget_weight=0.5).train()


def test_noise_and_dropout_are_replayed():
    accelerator, batch = Accelerator(), batch_of(11)
    model = noisy_model()
    encoder = accelerator.prepare(TokenEncoder(model))
    torch.manual_seed(7)
    cached = CachedTokens(accelerator, encoder, batch, 4)
    after = get_random_state(accelerator.device)
    loss, _ = shared_loss(model, cached.tokens, batch, use_hard_negatives=True)
    loss.backward()
    cached.backward()
    assert torch.equal(after[0], get_random_state(accelerator.device)[0])  # the next batch has noise of its own

    plain = noisy_model()
    torch.manual_seed(7)
    parts = [TokenEncoder(plain)(part) for part in split_batch(batch, 3)]
    tokens = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    expected, _ = shared_loss(plain, tokens, batch, use_hard_negatives=True)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for (name, got), (_, wanted) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, atol=1e-5, rtol=0, msg=name)


def test_gradients_add_up_over_batches():
    accelerator = Accelerator()
    model = tiny_model(aligner="max_mean")
    encoder = accelerator.prepare(TokenEncoder(model)).eval()
    gradients = []
    for micro_batch_size in (None, 3):
        cached = CachedTokens(accelerator, encoder, batch_of(6), micro_batch_size)
        shared_loss(model, cached.tokens, batch_of(6), True)[0].backward()
        cached.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(twice, 2 * once, atol=1e-5, rtol=0)


def test_parts_have_all_rows_once():
    hidden = torch.arange(14.0).view(7, 2, 1)
    batch = {
        "input_ids": torch.arange(9)[:, None],
        "vision_model_output": BaseModelOutput(last_hidden_state=hidden),
        "image_size": (16, 16),
        "image_ids": torch.arange(7),
    }
    parts = split_batch(batch, 3)
    assert [len(part["image_ids"]) for part in parts] == [3, 2, 2]
    assert [part["image_size"] for part in parts] == [(16, 16)] * 3
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch["input_ids"])
    assert torch.equal(torch.cat([part["vision_model_output"].last_hidden_state for part in parts]), hidden)


@pytest.mark.parametrize(("num_images", "size", "expected"), [(8, None, 1), (8, 8, 1), (9, 8, 2), (8, 3, 3), (2, 1, 2)])
def test_number_of_parts(num_images, size, expected):
    assert num_parts(num_images, size) == expected


class Saved:
    """Bytes that the graphs of an encoder hold at a time, and the most of them; a tensor counts as often as it is saved."""

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor):
        return _Held(self, tensor)


class _Held:
    def __init__(self, saved: Saved, tensor: torch.Tensor):
        self.saved, self.tensor, self.nbytes = saved, tensor, tensor.nbytes
        saved.now += self.nbytes
        saved.peak = max(saved.peak, saved.now)

    def __del__(self):
        self.saved.now -= self.nbytes


class WatchedEncoder(TokenEncoder):
    def forward(self, batch):
        with saved_tensors_hooks(self.saved.pack, lambda held: held.tensor):
            return super().forward(batch)


def peak_of_graphs(num_images: int, micro_batch_size: int | None) -> int:
    accelerator, model = Accelerator(), tiny_model(aligner="max_mean").train()
    encoder = accelerator.prepare(WatchedEncoder(model))
    encoder.saved = Saved()
    cached = CachedTokens(accelerator, encoder, batch_of(num_images), micro_batch_size)
    shared_loss(model, cached.tokens, batch_of(num_images), True)[0].backward()
    cached.backward()
    return encoder.saved.peak


def test_graphs_of_a_large_batch_hold_no_more_than_those_of_a_part():
    part, whole, cached = peak_of_graphs(4, None), peak_of_graphs(64, None), peak_of_graphs(64, 4)
    assert whole > 10 * part
    assert cached < 1.1 * part


def one_image_then_many(num_images: int, micro_batch_size: int):
    """Runs a step with one image; returns the step to measure."""
    vision = tf.ViTConfig(
        hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=256, patch_size=4, image_size=28
    )
    accelerator = Accelerator()
    model = tiny_model(vision, aligner="max_mean").train()
    encoder = accelerator.prepare(TokenEncoder(model))

    def step(count: int) -> None:
        ids = torch.arange(count)
        batch = {**tiny_inputs(count, count, image_size=(28, 28)), "image_ids": ids, "caption_image_ids": ids}
        cached = CachedTokens(accelerator, encoder, batch, micro_batch_size)
        shared_loss(model, cached.tokens, batch, True)[0].backward()
        cached.backward()

    step(1)
    return lambda: step(num_images)


@pytest.mark.slow
def test_1024_images_train_in_the_memory_of_64():
    small, plain, large = (peak_megabytes(one_image_then_many, *n) for n in ((64, 64), (256, 256), (1024, 64)))
    if small is None:
        pytest.skip("the peak is read from /proc")
    assert plain > 3 * small
    assert large < 1.6 * small, (small, plain, large)  # pixels, tokens and their gradients are those of 1,024 images
