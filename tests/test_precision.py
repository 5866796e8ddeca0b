"""Every precision trains with scores and losses in float32; what is not finite stops the run, with all there is to know."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_launch import RUN

from granalign_hf.training import launch, train

ONE = [*RUN, "--batch_size", "8", "--aligner", "grm"]


@pytest.fixture(autouse=True)
def other_accelerators_are_forgotten():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class HalfOnCPU(Accelerator):
    """Accelerate refuses fp16 on a CPU, where torch has all that it takes."""

    init_scale = 2.0**16

    def __init__(self, mixed_precision: str, **kwargs):
        super().__init__(**kwargs)
        self.native_amp = True
        self.state._mixed_precision = mixed_precision
        self.scaler = torch.amp.GradScaler("cpu", init_scale=self.init_scale)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_every_precision_trains_with_losses_in_float32(precision, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "cpu_has_bfloat16", lambda: True)
    if precision == "fp16":
        monkeypatch.setattr(launch, "Accelerator", HalfOnCPU)
    shared_loss, seen = train.shared_loss, set()

    def watched(model, tokens, *args):
        loss, values = shared_loss(model, tokens, *args)
        both = SimpleNamespace(**tokens)
        levels = model.similarities(both, both)
        seen.update(t.dtype for t in (*tokens.values(), levels, loss) if t.is_floating_point())
        return loss, values

    dtypes = set()

    def build(*args):
        model, processor = original(*args)
        model.word_projection.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
        return model, processor

    original = train.build
    monkeypatch.setattr(train, "build", build)
    monkeypatch.setattr(train, "shared_loss", watched)
    state = train.main([*ONE, "--mixed_precision", precision, "--output_dir", str(tmp_path)])
    assert seen == {torch.float32}
    assert {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision] in dtypes
    assert all(math.isfinite(record["loss"]) for record in state["history"])
    assert state["history"][1]["reconstruction"] != state["history"][0]["reconstruction"]


@pytest.mark.parametrize(
    ("has_gpu", "forced_to_cpu", "has_bfloat16", "expected"),
    [
        (False, False, False, "no"),
        (False, False, True, "bf16"),
        (True, False, False, "bf16"),
        (True, True, False, "no"),
        (True, True, True, "bf16"),
    ],
)
def test_bf16_is_float32_where_a_cpu_has_no_instructions_for_it(has_gpu, forced_to_cpu, has_bfloat16, expected, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(forced_to_cpu).lower())
    monkeypatch.setattr(launch, "cpu_has_bfloat16", lambda: has_bfloat16)
    assert launch.supported_precision("bf16") == expected
    assert (launch.supported_precision("fp16"), launch.supported_precision("no")) == ("fp16", "no")


def test_a_run_tells_that_it_computes_in_float32(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(launch, "supported_precision", lambda precision: "no")
    train.main([*ONE, "--mixed_precision", "bf16", "--epochs", "1", "--output_dir", str(tmp_path)])
    assert json.loads((tmp_path / "metrics.json").read_text())["mixed_precision"] == "no"
    assert "computes in float32" in caplog.text


def poison(monkeypatch, is_due, factor: float) -> list[torch.Tensor]:
    """Multiplies a gradient where `is_due(step)`; returns the list of the weights that each step began with."""
    original, weights = train.build, []

    def build(*args):
        model, processor = original(*args)
        parameter = model.word_projection.weight

        def change(gradient):
            weights.append(parameter.detach().clone())
            return gradient * factor if is_due(len(weights)) else gradient

        parameter.register_hook(change)
        return model, processor

    monkeypatch.setattr(train, "build", build)
    return weights


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_feel_it(tmp_path, monkeypatch):
    weights = poison(monkeypatch, lambda step: step == 5, math.nan)
    with pytest.raises(FloatingPointError) as raised:
        train.main([*ONE, "--output_dir", str(tmp_path)])
    message = str(raised.value)
    assert "The norm of the gradient is nan at epoch 2, step 2: loss " in message and "contrastive_key" in message
    names = message.partition("Images of the batch: ")[2].rstrip(".").split(", ")
    assert len(set(names)) == 8 and set(names) <= {f"1-{number}" for number in range(24)}
    saved = load_file(tmp_path / "state" / "step-4" / "model.safetensors")["model.word_projection.weight"]
    assert torch.equal(saved, weights[4]) and not torch.equal(saved, weights[3])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"The loss is nan at epoch 1, step 2: .*contrastive_original nan"):
        train.main([*ONE, "--learning_rate", "1e30", "--output_dir", str(tmp_path)])
    assert (tmp_path / "state" / "step-1" / "progress.json").is_file()


def test_a_scale_that_is_too_large_is_lowered(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "Accelerator", HalfOnCPU)
    monkeypatch.setattr(HalfOnCPU, "init_scale", 2.0**24)
    weights = poison(monkeypatch, lambda step: False, 1)
    argv = [*ONE, "--mixed_precision", "fp16", "--epochs", "4", "--eval_interval", "4", "--output_dir", str(tmp_path)]
    state = train.main(argv)
    skipped = [torch.equal(before, after) for before, after in itertools.pairwise(weights)]
    assert skipped[0] and not skipped[-1]
    assert all(math.isfinite(record["loss"]) for record in state["history"])


def test_a_gradient_that_is_not_finite_at_any_scale_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "Accelerator", HalfOnCPU)
    monkeypatch.setattr(HalfOnCPU, "init_scale", 4.0)
    weights = poison(monkeypatch, lambda step: step > 2, math.inf)
    with pytest.raises(FloatingPointError, match=r"The norm of the gradient is .* at epoch 2, step 2"):
        train.main([*ONE, "--mixed_precision", "fp16", "--output_dir", str(tmp_path)])
    assert torch.equal(weights[4], weights[2]) and not torch.equal(weights[2], weights[1])


def test_an_update_takes_the_mean_of_the_gradients_of_its_steps(tmp_path, monkeypatch):
    """At a rate of next to nothing, where a run that updates after every step shows the gradient of each."""
    gradients: dict[int, list[dict[str, torch.Tensor]]] = {1: [], 3: []}
    for steps, updates in gradients.items():
        record_gradients(monkeypatch, updates)
        argv = [*RUN, "--batch_size", "5", "--epochs", "1", "--learning_rate", "1e-12", "--max_grad_norm", "1e6"]
        train.main([*argv, "--gradient_accumulation_steps", str(steps), "--output_dir", str(tmp_path / str(steps))])
    assert len(gradients[1]) == 4 and len(gradients[3]) == 2  # of 20 images
    for update, whole in zip(gradients[3], (gradients[1][:3], gradients[1][3:]), strict=True):
        for name, gradient in update.items():
            mean = torch.stack([of_step[name] for of_step in whole]).mean(0)
            torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def record_gradients(monkeypatch, updates: list[dict[str, torch.Tensor]]) -> None:
    """Appends the gradients of every update to the list."""

    def step(optimizer, *args, **kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        updates.append({str(number): p.grad.clone() for number, p in enumerate(parameters) if p.grad is not None})

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
