"""Eq. 1: the saliency of tokens, without noise at inference and with Gumbel noise in training."""

import pytest
import reference
import torch
from torch import nn

from granalign_hf.modeling.saliency import SaliencyAdapter

DIM = 6


def adapter(temperature=1.0, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    module = SaliencyAdapter(DIM, temperature).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def unit_tokens(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return nn.functional.normalize(torch.randn(*shape, DIM, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def loops(module, tokens):
    """Inference by plain loops. The adapter sees tokens of variance 1, the loops unit vectors: sqrt(d) joins the weight."""
    first, last = module.hidden, module.decision
    weights = (first.weight * tokens.shape[-1] ** 0.5, first.bias, last.weight, last.bias)
    return torch.stack([reference.saliency(row, *weights, temperature=module.temperature) for row in tokens])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_inference_equals_the_loops(temperature, dtype, tolerance):
    module, tokens = adapter(temperature, dtype=dtype).eval(), unit_tokens(3, 5, dtype=dtype)
    saliency = module(tokens)
    assert saliency.dtype == dtype and saliency.shape == (3, 5)
    torch.testing.assert_close(saliency.double(), loops(module, tokens), rtol=0, atol=tolerance)


def test_no_noise_at_inference_noise_in_training():
    module, tokens = adapter(), unit_tokens(2, 4)
    assert torch.equal(module.eval()(tokens), module(tokens))
    assert not torch.equal(module.train()(tokens), module(tokens))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_noise_has_the_distribution_of_the_gumbel_softmax(temperature):
    module, tokens = adapter(temperature), unit_tokens(1, 1).expand(1, 50_000, DIM)
    with torch.no_grad():
        drawn = module(tokens)[0]
        logits = module.decision(nn.functional.gelu(module.hidden(tokens[0] * DIM**0.5)))
        expected = nn.functional.gumbel_softmax(logits, temperature)[:, 1]
    levels = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    torch.testing.assert_close(drawn.quantile(levels), expected.quantile(levels), rtol=0, atol=0.02)


def test_noise_prefers_a_token_as_often_as_its_saliency_says():
    """P(A > 1/2) is the saliency without noise at temperature 1."""
    module, tokens = adapter(), unit_tokens(1, 3).expand(40_000, 3, DIM)
    with torch.no_grad():
        share = (module(tokens) > 0.5).double().mean(0)
        torch.testing.assert_close(share, module.eval()(tokens)[0], rtol=0, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saliency_lies_in_0_to_1_even_for_extreme_logits(dtype):
    module = adapter(temperature=0.01, dtype=dtype)
    with torch.no_grad():
        module.decision.weight.mul_(1e4)
    saliency = module(unit_tokens(50, 20, dtype=torch.float32))
    assert saliency.dtype == torch.float32
    assert saliency.min() == 0 and saliency.max() == 1 and saliency.isfinite().all()
    saliency.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_every_parameter_gets_a_gradient():
    module = adapter()
    module(unit_tokens(2, 4)).sum().backward()
    assert all(parameter.grad.any() for parameter in module.parameters())


def test_under_autocast_the_saliency_is_float32():
    module, tokens = adapter(dtype=torch.float32).eval(), unit_tokens(2, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        saliency = module(tokens)
    assert saliency.dtype == torch.float32
    torch.testing.assert_close(saliency, module(tokens), rtol=0, atol=0.05)


def test_a_lower_temperature_is_a_steeper_sigmoid():
    tokens = unit_tokens(1, 8)
    soft, sharp = adapter(1.0).eval()(tokens), adapter(0.25).eval()(tokens)
    torch.testing.assert_close(torch.logit(sharp), 4 * torch.logit(soft), rtol=1e-9, atol=0)
