"""Mixtures and standard errors against plain loops and against sampling; answers of a calibrated model."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from tiny import tiny_inputs, tiny_model
from torch import nn

from granalign_hf.modeling.regions import RegionMixture
from granalign_hf.uncertainty import (
    answer,
    entropy_bounds,
    image_mixture,
    region_spreads,
    sampled_standard_errors,
    standard_errors,
    word_log_likelihoods,
)

MODEL = SimpleNamespace(config=SimpleNamespace(level_weights=[0.4, 0.4, 0.2], standard_error_factor=1.0))


def sides(draw_tokens, log_var=-2.0, **sizes) -> tuple[SimpleNamespace, SimpleNamespace]:
    """An image side and a text side with every field that uncertainty needs, in float64."""
    tokens = draw_tokens(**sizes)
    generator = torch.Generator().manual_seed(1)
    means = tokens.pop("region_embeds")
    num_images, num_regions, dim = means.shape

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=means.dtype)

    affinity = rand(num_images, tokens["patch_embeds"].shape[1], num_regions) * tokens["patch_mask"][..., None]
    image = SimpleNamespace(
        region_means=means,
        region_log_vars=log_var + rand(num_images, num_regions, dim),
        region_assignment=affinity / affinity.sum(1, keepdim=True),
        region_weights=affinity.sum(1) / affinity.sum((1, 2))[:, None],
    )
    return image, SimpleNamespace(**{name: tokens[name] for name in ("word_embeds", "word_mask", "word_saliency")})


def by_loops(image, text) -> torch.Tensor:
    words = text.word_embeds * text.word_saliency[..., None]
    return torch.stack([
        torch.stack([
            reference.var_of_uncertain_score(
                words[c], image.region_means[i], image.region_log_vars[i], image.region_assignment[i], text.word_mask[c]
            )
            for c in range(len(words))
        ])
        for i in range(len(image.region_means))
    ]).sqrt()  # fmt: skip


# ------------------------------------------------------------------------------------------------------ standard errors


@pytest.mark.parametrize("memory_budget", [1, 800, 2400, None])
@pytest.mark.parametrize("regions", [1, 3, 7])
def test_standard_errors_are_those_of_the_loops(draw_tokens, memory_budget, regions):
    image, text = sides(draw_tokens, images=5, captions=6, regions=regions)
    expected = 0.2 * by_loops(image, text)
    text.word_embeds[~text.word_mask] = torch.nan
    text.word_saliency[~text.word_mask] = torch.nan
    found = standard_errors(MODEL, image, text, memory_budget)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_standard_errors_in_float32_are_near(draw_tokens):
    image, text = sides(draw_tokens, dim=64, dtype=torch.float32)
    torch.testing.assert_close(standard_errors(MODEL, image, text).double(), 0.2 * by_loops(image, text), rtol=1e-5, atol=0)


def test_a_caption_without_words_has_no_error(draw_tokens):
    image, text = sides(draw_tokens)
    expected = standard_errors(MODEL, image, text)
    text.word_mask[1] = False
    found = standard_errors(MODEL, image, text)
    assert (found[:, 1] == 0).all()
    assert torch.equal(found[:, [0, 2, 3]], expected[:, [0, 2, 3]])


def test_standard_errors_are_those_of_sampling_where_no_maximum_switches(draw_tokens):
    """Noise much smaller than the differences between scores: 1,000 draws have a relative error of 2.2 % a pair."""
    image, text = sides(draw_tokens, log_var=-14.0, images=4, captions=5)
    ratio = sampled_standard_errors(MODEL, image, text, num_samples=1000) / standard_errors(MODEL, image, text)
    assert (ratio - 1).abs().max() < 0.1
    assert abs(ratio.mean() - 1) < 0.02


def test_sampling_follows_the_paper_patch_by_patch(draw_tokens):
    """One draw for each patch and region (eq. 5-6), scored by the loops of eq. 7; 300 draws are 4 % off."""
    image, text = sides(draw_tokens, images=1, captions=2, words=3, log_var=-3.0)
    generator = torch.Generator().manual_seed(0)
    words, scores = text.word_embeds * text.word_saliency[..., None], []
    for _ in range(300):
        noise = torch.randn(6, 3, 4, generator=generator, dtype=torch.float64)
        z = image.region_means[0] + noise * torch.exp(image.region_log_vars[0] / 2)
        regions = torch.einsum("vk,vkd->kd", image.region_assignment[0], z)
        scores.append([reference.bidirectional_similarity(w, regions, m) for w, m in zip(words, text.word_mask)])
    expected = 0.2 * torch.tensor(scores).std(0)
    torch.testing.assert_close(sampled_standard_errors(MODEL, image, text, 1000)[0], expected, rtol=0.15, atol=0)


def test_maxima_that_switch_make_the_true_error_smaller(draw_tokens):
    image, text = sides(draw_tokens, log_var=0.0, dim=16, regions=6)
    ratio = sampled_standard_errors(MODEL, image, text, 400) / standard_errors(MODEL, image, text)
    assert 0.4 < ratio.mean() < 0.95


def test_sampling_is_repeatable_and_leaves_the_seed_alone(draw_tokens):
    image, text = sides(draw_tokens)
    state = torch.get_rng_state()
    first, again = (sampled_standard_errors(MODEL, image, text, 5) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, sampled_standard_errors(MODEL, image, text, 5, seed=1))
    with pytest.raises(ValueError, match="`num_samples` must be at least 2, got 1"):
        sampled_standard_errors(MODEL, image, text, 1)


def features(model, **sizes):
    inputs = tiny_inputs(**sizes)
    with torch.no_grad():
        return model.get_image_features(inputs.pop("pixel_values")), model.get_text_features(**inputs)


def test_standard_errors_of_a_model():
    model = tiny_model()
    image, text = features(model, num_captions=4)
    expected = 0.2 * by_loops(image, text)
    torch.testing.assert_close(standard_errors(model, image, text).double(), expected, rtol=1e-4, atol=0)
    model.config.standard_error_factor = 0.5
    torch.testing.assert_close(standard_errors(model, image, text).double(), expected / 2, rtol=1e-4, atol=0)
    model.config.level_weights = [0.5, 0.5, 0.0]
    assert (standard_errors(model, image, text) == 0).all()


@pytest.mark.parametrize("fields", [{"aligner": "chan"}, {"use_region_uncertainty": False}])
def test_without_variances_there_is_one_error(fields):
    model = tiny_model(**fields)
    image, text = features(model)
    for call in (
        lambda: standard_errors(model, image, text),
        lambda: sampled_standard_errors(model, image, text),
        lambda: image_mixture(image),
        lambda: region_spreads(image),
        lambda: word_log_likelihoods(image, text),
        lambda: entropy_bounds(image),
    ):
        with pytest.raises(ValueError, match=r'`image` has no `region_log_vars`: only the aligner "grm" with'):
            call()


def test_patches_as_regions_have_errors_too():
    model = tiny_model(use_region_prompts=False)
    image, text = features(model)
    found = standard_errors(model, image, text, memory_budget=8000)
    torch.testing.assert_close(found.double(), 0.2 * by_loops(image, text), rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------------------------- mixtures


def test_mixture_has_the_density_of_the_loops(draw_tokens):
    image, text = sides(draw_tokens)
    words = text.word_embeds * text.word_saliency[..., None]
    mixture = image_mixture(image)
    assert mixture.batch_shape == (3,) and mixture.event_shape == (4,)
    expected = torch.zeros(3, 4, 5, dtype=torch.float64)
    for i, c, w in np.ndindex(3, 4, 5):
        if text.word_mask[c, w]:
            expected[i, c, w] = reference.mixture_log_density(
                words[c, w], image.region_weights[i], image.region_means[i], image.region_log_vars[i]
            )
    text.word_embeds[~text.word_mask] = torch.nan
    torch.testing.assert_close(word_log_likelihoods(image, text), expected)
    real = text.word_mask[0].nonzero()[0, 0]
    torch.testing.assert_close(mixture.log_prob(words[0, real]), expected[:, 0, real])


def test_mixture_of_a_model_has_the_moments_of_its_regions():
    model = tiny_model()
    image, text = features(model)
    mixture = image_mixture(image)
    torch.testing.assert_close(mixture.mean, torch.einsum("ik,ikd->id", image.region_weights, image.region_means))
    torch.testing.assert_close(mixture.component_distribution.stddev, image.region_log_vars.exp().sqrt())
    torch.testing.assert_close(
        region_spreads(image), mixture.component_distribution.variance.sum(-1).sqrt(), rtol=1e-5, atol=0
    )
    assert torch.isfinite(word_log_likelihoods(image, text)).all()


def test_a_new_region_spreads_as_far_as_a_token_is_long():
    """Its variances start at 1 / d, to which the KL term pulls them."""
    torch.manual_seed(0)
    regions = tiny_model(projection_dim=64).aligner.regions
    assert isinstance(regions, RegionMixture)
    patches = nn.functional.normalize(torch.randn(2, 9, 64), dim=-1)
    with torch.no_grad():
        image = SimpleNamespace(**regions.eval()(patches, torch.ones(2, 9, dtype=torch.bool)))
    torch.testing.assert_close(region_spreads(image), torch.ones(2, 3), rtol=1e-4, atol=0)


def test_entropy_lies_between_its_bounds(draw_tokens):
    """The Monte-Carlo value has a standard error of its own, below 0.01 here."""
    image, _ = sides(draw_tokens, log_var=-1.5)
    mixture = image_mixture(image)
    torch.manual_seed(0)
    draws = -mixture.log_prob(mixture.sample((40000,)))
    error = draws.std(0) / math.sqrt(len(draws))
    lower, upper = entropy_bounds(image)
    assert error.max() < 0.01 and (upper - lower).min() > 5 * error.max()
    assert (lower < draws.mean(0)).all() and (draws.mean(0) < upper).all()


def test_bounds_meet_where_regions_are_one_and_where_none_overlap(draw_tokens):
    image, _ = sides(draw_tokens)
    image.region_means, image.region_log_vars = (t[:, :1].expand_as(t) for t in (image.region_means, image.region_log_vars))
    alone = torch.distributions.Normal(image.region_means, torch.exp(image.region_log_vars / 2)).entropy()[:, 0].sum(-1)
    for bound in entropy_bounds(image):
        torch.testing.assert_close(bound, alone)
    apart = torch.eye(4, dtype=torch.float64)[:3] * 100
    image.region_means = apart.expand_as(image.region_means)
    choice = torch.special.entr(image.region_weights).sum(1)
    for bound in entropy_bounds(image):
        torch.testing.assert_close(bound, alone + choice)


# -------------------------------------------------------------------------------------------------------------- answers


def calibrated(measure="margin"):
    model = tiny_model(
        logit_scale=20.0,
        confidence_measure=measure,
        confidence_coefficients=[0.5, -3.0, 0.25, -2.0],
        conformal_thresholds=[0.05, 0.02],
    )
    return model, *features(model, num_images=4, num_captions=6)


@pytest.mark.parametrize("query", ["image", "text"])
def test_answers_are_those_of_the_scores(query):
    model, image, text = calibrated()
    answers = answer(model, image, text, query)
    scores = model.score(image, text).detach()
    scores, way = (scores, 0) if query == "image" else (scores.T, 1)
    top = scores.topk(2, dim=1)
    assert answers.first.tolist() == top.indices[:, 0].tolist()
    intercept, slope = model.config.confidence_coefficients[2 * way : 2 * way + 2]
    expected = torch.sigmoid(intercept - slope * (top.values[:, 0] - top.values[:, 1]))
    np.testing.assert_allclose(answers.confidence, expected.numpy(), rtol=1e-5)
    inside = scores >= top.values[:, :1] - model.config.conformal_thresholds[way]
    assert answers.sets.tolist() == inside.tolist()
    assert len(set(answers.sets.sum(1).tolist())) > 1


@pytest.mark.parametrize("query", ["image", "text"])
def test_answers_from_standard_errors(query):
    model, image, text = calibrated("standard_error")
    answers, errors = answer(model, image, text, query), standard_errors(model, image, text)
    errors = (errors if query == "image" else errors.T).numpy()
    intercept, slope = model.config.confidence_coefficients[:2] if query == "image" else [0.25, -2.0]
    expected = 1 / (1 + np.exp(-intercept - slope * errors[np.arange(len(errors)), answers.first]))
    np.testing.assert_allclose(answers.confidence, expected, rtol=1e-5)


def test_answers_need_a_calibrated_model_at_inference():
    model = tiny_model()
    image, text = features(model)
    with pytest.raises(ValueError, match=r"`model` is not calibrated: run training/calibrate.py"):
        answer(model, image, text)
    model, image, text = calibrated()
    with pytest.raises(ValueError, match='`query` must be "image" or "text", got \'caption\''):
        answer(model, image, text, "caption")
    with pytest.raises(ValueError, match="`model` is in training mode"):
        answer(model.train(), image, text)
