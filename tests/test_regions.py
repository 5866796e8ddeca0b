"""Eq. 2-6: the region mixture, equal to plain loops, and its noise, equal in distribution to the noise as printed."""

import pytest
import reference
import torch
from torch import nn

from granalign_hf.modeling.regions import RegionMixture, sample_regions

DIM = 4
FIELDS = ("affinity", "assignment", "weights", "means", "log_vars", "embeds")


def mixture(num_regions=3, logit_scale=1.0, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    module = RegionMixture(DIM, num_regions, logit_scale).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def salient_patches(tokens):
    return tokens["patch_embeds"] * tokens["patch_saliency"][..., None]


def loops(module, patches, mask):
    """One image through the loops with the module's weights."""

    def phi(mean):
        hidden = module.hidden.weight.double() @ (mean * len(mean) ** 0.5) + module.hidden.bias.double()
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        return module.log_var.weight.double() @ hidden + module.log_var.bias.double()

    affinity = reference.region_affinity(patches, module.region_prompts, mask, module.logit_scale)
    assignment = reference.region_assignment(affinity, mask)
    means = reference.region_means(assignment, patches, mask)
    weights = reference.region_weights(affinity, mask)
    return dict(zip(FIELDS, (affinity, assignment, weights, means, reference.region_log_vars(means, phi), means)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("num_regions", "patches", "logit_scale"), [(3, 6, 1.0), (1, 6, 5.0), (5, 1, 20.0)])
@pytest.mark.parametrize("has_holes", [True, False])
def test_inference_equals_the_loops(draw_tokens, num_regions, patches, logit_scale, has_holes, dtype, tolerance):
    tokens = draw_tokens(patches, patches=patches, has_holes=has_holes, dtype=dtype)
    module = mixture(num_regions, logit_scale, dtype=dtype).eval()
    regions = module(salient_patches(tokens), tokens["patch_mask"])
    for i in range(3):
        expected = loops(module, salient_patches(tokens)[i], tokens["patch_mask"][i])
        for name in FIELDS:
            value = regions[f"region_{name}"][i]
            assert value.dtype == dtype
            torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("logit_scale", [1.0, 50.0])
def test_weights_and_assignment_sum_to_1(draw_tokens, logit_scale):
    tokens = draw_tokens(1)
    regions = mixture(logit_scale=logit_scale)(salient_patches(tokens), tokens["patch_mask"])
    ones = torch.ones(3, 3, dtype=torch.float64)
    torch.testing.assert_close(regions["region_assignment"].sum(1), ones)
    torch.testing.assert_close(regions["region_weights"].sum(1), ones[0])
    assert (regions["region_assignment"][~tokens["patch_mask"]] == 0).all()
    affinity = regions["region_affinity"]
    assert affinity.min() >= 0 and affinity.max() <= 1 and (affinity[~tokens["patch_mask"]] == 0).all()


def test_no_noise_at_inference_noise_in_training(draw_tokens):
    tokens, module = draw_tokens(2), mixture()
    inputs = salient_patches(tokens), tokens["patch_mask"]
    at_rest = module.eval()(*inputs)
    assert torch.equal(at_rest["region_embeds"], at_rest["region_means"])
    first, second = module.train()(*inputs), module(*inputs)
    assert not torch.equal(first["region_embeds"], second["region_embeds"])
    for name in FIELDS[:-1]:
        assert torch.equal(first[f"region_{name}"], at_rest[f"region_{name}"])


def test_one_draw_a_region_equals_the_loops():
    torch.manual_seed(0)
    assignment, means, log_vars = (
        torch.rand(2, 6, 3).double().softmax(1),
        torch.randn(2, 3, 4).double(),
        torch.randn(2, 3, 4).double(),
    )
    torch.manual_seed(7)
    sample = sample_regions(assignment, means, log_vars)
    torch.manual_seed(7)
    noise = torch.randn_like(means)
    for i in range(2):
        expected = reference.sample_regions_reduced(assignment[i], means[i], log_vars[i], noise[i])
        torch.testing.assert_close(sample[i], expected, rtol=0, atol=1e-12)


def test_moments_of_the_noise_equal_those_of_a_draw_for_each_patch():
    """Eq. 5-6 as printed draws Lv x K x d values; ours K x d. Means, variances and independence agree."""
    num_draws = 40_000
    generator = torch.Generator().manual_seed(3)
    assignment = (2 * torch.randn(6, 3, generator=generator).double()).softmax(0)
    means, log_vars = torch.randn(2, 3, 4, generator=generator).double().unbind()
    eps = torch.randn(num_draws, 6, 3, 4, generator=generator).double()
    naive = means + torch.einsum("vk,nvkd,kd->nkd", assignment, eps, (log_vars / 2).exp())
    torch.testing.assert_close(naive[0], reference.sample_regions_naive(assignment, means, log_vars, eps[0]))
    torch.manual_seed(3)
    drawn = sample_regions(*(t.expand(num_draws, *t.shape) for t in (assignment, means, log_vars)))
    spread = assignment.square().sum(0)[:, None] * log_vars.exp()
    for sample in (naive, drawn):
        standardised = ((sample - means) / spread.sqrt()).flatten(1)
        torch.testing.assert_close(standardised.mean(0), torch.zeros(12).double(), rtol=0, atol=0.025)
        covariance = standardised.T @ standardised / num_draws
        torch.testing.assert_close(covariance, torch.eye(12).double(), rtol=0, atol=0.04)
        torch.testing.assert_close((standardised**4).mean(0), torch.full((12,), 3.0).double(), rtol=0, atol=0.3)


def test_gradients_reach_every_parameter_in_training(draw_tokens):
    tokens, module = draw_tokens(4), mixture()
    module(salient_patches(tokens), tokens["patch_mask"])["region_embeds"].square().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in module.parameters())


def test_gradcheck(draw_tokens):
    tokens, module = draw_tokens(5, images=2, patches=3), mixture(2).eval()

    def forward(patches, *parameters):
        named = dict(zip([name for name, _ in module.named_parameters()], parameters))
        return tuple(torch.func.functional_call(module, named, (patches, tokens["patch_mask"][:2])).values())

    assert torch.autograd.gradcheck(forward, (salient_patches(tokens).requires_grad_(), *module.parameters()))


@pytest.mark.parametrize("garbage", [float("nan"), 1e30])
def test_what_stands_under_the_mask_has_no_effect(draw_tokens, garbage):
    tokens, module = draw_tokens(6), mixture()
    clean, results = salient_patches(tokens), []
    for patches in (clean, clean.masked_fill(~tokens["patch_mask"][..., None], garbage)):
        patches = patches.clone().requires_grad_()
        torch.manual_seed(0)
        module.zero_grad()
        regions = module(patches, tokens["patch_mask"])
        sum(value.square().sum() for value in regions.values()).backward()
        results.append([*regions.values(), patches.grad, *(parameter.grad for parameter in module.parameters())])
        assert (patches.grad[~tokens["patch_mask"]] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("is_training", [True, False])
def test_an_image_without_patches_has_no_mass_and_no_gradient(draw_tokens, is_training, dtype):
    tokens, module = draw_tokens(7, dtype=dtype), mixture(dtype=dtype).train(is_training)
    tokens["patch_mask"][1] = False
    patches = salient_patches(tokens).requires_grad_()
    regions = module(patches, tokens["patch_mask"])
    for name in ("affinity", "assignment", "weights", "means", "embeds"):
        assert not regions[f"region_{name}"][1].any()
    sum((1e3 * value + value**2).sum() for value in regions.values()).backward()
    assert patches.grad.isfinite().all() and not patches.grad[1].any() and patches.grad[0].any()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_autocast_rounds_only_the_network_of_the_variances(draw_tokens):
    tokens, module = draw_tokens(8, dtype=torch.float32), mixture(dtype=torch.float32).eval()
    inputs = salient_patches(tokens), tokens["patch_mask"]
    plain = module(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = module(*inputs)
    for name, value in cast.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, plain[name]) or name == "region_log_vars"
    torch.testing.assert_close(cast["region_log_vars"], plain["region_log_vars"], rtol=0.05, atol=0.05)


def test_half_precision_weights_give_float32_regions(draw_tokens):
    tokens, module = draw_tokens(9, dtype=torch.float32), mixture(dtype=torch.bfloat16)
    regions = module(salient_patches(tokens), tokens["patch_mask"])
    assert {value.dtype for value in regions.values()} == {torch.float32}
