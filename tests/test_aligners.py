"""Each aligner whole, with its own weights, against plain loops; and what all of them promise."""

from types import SimpleNamespace

import pytest
import reference
import torch
from test_regions import loops as region_loops
from test_saliency import loops as saliency_loops
from tiny import tiny_inputs, tiny_model
from torch import nn

from granalign_hf import GranAlignModel
from granalign_hf.modeling import pairwise
from granalign_hf.modeling.aligners import ALIGNERS
from granalign_hf.modeling.configuration_granalign import ALIGNER_FIELDS, POOLINGS, GranAlignConfig

DIM = 4
TOLERANCE = [(torch.float64, 1e-12), (torch.float32, 1e-5)]
VARIANTS = [(name, pooling) for name, poolings in POOLINGS.items() for pooling in poolings]


def build(name="grm", pooling="mean", dtype=torch.float64, **fields):
    config = GranAlignConfig(aligner=name, pooling=pooling, projection_dim=DIM, num_regions=3, **fields)
    torch.manual_seed(0)
    aligner = ALIGNERS[name](config).to(dtype).eval()
    for parameter in aligner.parameters():
        nn.init.normal_(parameter)
    return aligner


def describe(aligner, tokens):
    """What the model passes to `similarities`: the tokens of each side with the fields that the aligner adds."""
    patches, words = (tokens["patch_embeds"], tokens["patch_mask"]), (tokens["word_embeds"], tokens["word_mask"])
    image = SimpleNamespace(patch_embeds=patches[0], patch_mask=patches[1], **aligner.describe_image(*patches))
    text = SimpleNamespace(word_embeds=words[0], word_mask=words[1], **aligner.describe_text(*words))
    return image, text


def real_part(values, mask):
    return values.masked_fill(~mask, 0)


# --- GRM ---


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize("seed", range(3))
def test_grm_equals_the_loops_from_tokens_to_loss(draw_tokens, seed, dtype, tolerance):
    fields = {"saliency_temperature": 0.7, "region_logit_scale": 3.0, "level_weights": [0.5, 0.3, 0.2]}
    fields |= {"reconstruction_weight": 0.05, "kl_weight": 0.002, "entropy_weight": -0.03}
    fields |= {"patch_budget": 0.4, "budget_weight": 0.7}
    aligner, tokens = build(dtype=dtype, **fields), draw_tokens(seed, dtype=dtype)
    image, text = describe(aligner, tokens)
    mask = tokens["patch_mask"]

    patch_saliency = saliency_loops(aligner.patch_adapter, tokens["patch_embeds"])
    word_saliency = saliency_loops(aligner.word_adapter, tokens["word_embeds"])
    salient = torch.stack([reference.apply_saliency(*row) for row in zip(tokens["patch_embeds"], patch_saliency)])
    regions = [region_loops(aligner.regions, *row) for row in zip(salient, mask)]
    affinity, means, log_vars = (torch.stack([r[name] for r in regions]) for name in ("affinity", "means", "log_vars"))
    saliencies = {"patch_saliency": patch_saliency, "word_saliency": word_saliency}
    inputs = {name: tokens[name].double() for name in ("patch_embeds", "word_embeds")}
    masks = {name: tokens[name] for name in ("patch_mask", "word_mask")}
    levels = reference.level_similarities(**inputs, **masks, **saliencies, region_embeds=means)
    expected = {
        "reconstruction": (0.05, reference.reconstruction_loss(means, salient, mask)),
        "kl": (0.002, reference.gaussian_kl(means, log_vars)),
        "entropy": (-0.03, reference.region_entropy(affinity, mask)),
        "budget": (0.7, reference.saliency_budget(patch_saliency, mask, 0.4)),
    }

    for value, wanted in (
        (image.patch_saliency, real_part(patch_saliency, mask)),
        (text.word_saliency, real_part(word_saliency, tokens["word_mask"])),
        (image.region_means, means),
        (image.region_log_vars, log_vars),
        (aligner.similarities(image, text), levels),
    ):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=tolerance)
    assert aligner.level_weights == (0.5, 0.3, 0.2)
    assert aligner.level_names == ("contrastive_original", "contrastive_key", "contrastive_uncertain")
    terms = aligner.regularisers(image)
    assert {name: weight for name, (weight, _) in terms.items()} == {name: weight for name, (weight, _) in expected.items()}
    for name, (_, value) in terms.items():
        torch.testing.assert_close(value.double(), expected[name][1], rtol=0, atol=tolerance)


def test_grm_is_deterministic_at_inference_and_noisy_in_training(draw_tokens):
    aligner, tokens = build(), draw_tokens(3)
    fields = ("patch_saliency", "region_embeds")
    (first, first_text), (second, second_text) = describe(aligner, tokens), describe(aligner, tokens)
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in fields)
    assert torch.equal(aligner.similarities(first, first_text), aligner.similarities(second, second_text))
    aligner.train()
    (first, first_text), (second, second_text) = describe(aligner, tokens), describe(aligner, tokens)
    assert not any(torch.equal(getattr(first, name), getattr(second, name)) for name in fields)
    assert not torch.equal(first_text.word_saliency, second_text.word_saliency)
    key, uncertain = (aligner.similarities(first, first_text) != aligner.similarities(second, second_text))[1:]
    assert key.any() and uncertain.any()
    salient = first.patch_embeds * first.patch_saliency[..., None]
    expected = reference.reconstruction_loss(first.region_embeds, salient, first.patch_mask)  # of the sample
    torch.testing.assert_close(aligner.regularisers(first)["reconstruction"][1], expected, rtol=0, atol=1e-12)


def test_grm_trains_every_parameter(draw_tokens):
    aligner = build().train()
    image, text = describe(aligner, draw_tokens(4))
    loss = aligner.similarities(image, text).sum() + sum(
        weight * value for weight, value in aligner.regularisers(image).values()
    )
    loss.backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in aligner.parameters())


# --- GRM without one of its parts ---


@pytest.mark.parametrize("side", ["patch", "word"])
def test_without_its_adapter_a_side_has_saliency_1(draw_tokens, side):
    aligner, tokens = build(**{f"use_{side}_adapter": False}).train(), draw_tokens(8)
    image, text = describe(aligner, tokens)
    features = image if side == "patch" else text
    assert torch.equal(getattr(features, f"{side}_saliency"), tokens[f"{side}_mask"].double())
    assert not [name for name, _ in aligner.named_parameters() if name.startswith(f"{side}_adapter")]
    key = reference.level_similarities(
        **{name: tokens[name] for name in ("patch_embeds", "word_embeds", "word_mask", "patch_mask")},
        patch_saliency=image.patch_saliency.detach(),
        word_saliency=text.word_saliency.detach(),
    )[1]
    torch.testing.assert_close(aligner.similarities(image, text)[1].detach(), key, rtol=0, atol=1e-12)


def test_without_prompts_every_patch_is_a_region(draw_tokens):
    aligner, tokens = build(use_region_prompts=False), draw_tokens(9)
    image, _ = describe(aligner, tokens)
    mask = tokens["patch_mask"].double()
    salient = image.patch_embeds * (image.patch_saliency * mask)[..., None]
    torch.testing.assert_close(image.region_means, salient, rtol=0, atol=1e-15)
    torch.testing.assert_close(image.region_weights, mask / mask.sum(1, keepdim=True), rtol=0, atol=1e-15)
    assert image.region_log_vars.shape == salient.shape and "regions.region_prompts" not in aligner.state_dict()


def test_without_uncertainty_a_region_is_its_mean_in_training_too():
    model = tiny_model(use_region_uncertainty=False).train()
    outputs = model(**tiny_inputs(), return_loss=True)
    assert outputs.region_log_vars is None and torch.equal(outputs.region_embeds, outputs.region_means)
    assert "kl" not in outputs.loss_terms and "reconstruction" in outputs.loss_terms
    assert not [name for name, _ in model.named_parameters() if "log_var" in name]


@pytest.mark.parametrize(
    "part", ["use_patch_adapter", "use_word_adapter", "use_region_prompts", "use_region_uncertainty"]
)  # fmt: skip
def test_a_model_without_a_part_trains_and_comes_back(tmp_path, part):
    model = tiny_model(**{part: False}).train()
    model(**tiny_inputs(), return_loss=True).loss.backward()
    untrained = [name for name, p in model.named_parameters() if p.grad is None and name.startswith("aligner")]
    assert untrained == []
    model.eval().save_pretrained(tmp_path)
    again = GranAlignModel.from_pretrained(tmp_path)
    assert torch.equal(again(**tiny_inputs()).logits_per_image, model(**tiny_inputs()).logits_per_image)


def test_patch_dropout_leaves_patches_out_in_training_only():
    torch.manual_seed(0)
    model = tiny_model(aligner="chan", patch_dropout=0.25)
    pixels = tiny_inputs(num_images=64)["pixel_values"]
    assert model.get_image_features(pixels).patch_mask.all()
    masks = model.train().get_image_features(pixels).patch_mask
    assert 0.65 < masks.float().mean() < 0.85 and not torch.equal(masks[0], masks[1])


# --- The baselines ---


def pair_scores(name, pooling):
    if name == "chan":
        return lambda *pair: reference.chan_score(*pair, pooling=pooling)
    if name == "vse++":
        return lambda *pair: reference.vse_score(*pair, pooling=pooling)
    if name == "scan":
        return scan_pair_score
    return reference.bidirectional_similarity


def scan_pair_score(words, patches, word_mask, patch_mask, direction="t2i"):
    if direction == "t2i":
        return reference.scan_score(words, patches, word_mask, patch_mask, 9.0)
    return reference.scan_score(patches, words, patch_mask, word_mask, 4.0)


@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_scan_attends_in_the_direction_of_the_config(draw_tokens, direction):
    tokens = draw_tokens(7)
    inputs = {key: tokens[key] for key in ("patch_embeds", "word_embeds", "word_mask", "patch_mask")}
    directions = ("t2i", "i2t") if direction == "both" else (direction,)
    expected = [
        reference.score_all_pairs(lambda *pair, d=d: scan_pair_score(*pair, direction=d), **inputs) for d in directions
    ]
    aligner = build("scan", attention_direction=direction)
    scores = aligner.similarities(*describe(aligner, tokens))
    torch.testing.assert_close(scores, sum(expected)[None] / len(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize(("name", "pooling"), [variant for variant in VARIANTS if variant[0] not in ("grm", "laps")])
@pytest.mark.parametrize("seed", range(3))
def test_baselines_equal_the_loops(draw_tokens, seed, name, pooling, dtype, tolerance):
    aligner, tokens = build(name, pooling, dtype), draw_tokens(seed, dtype=dtype)
    image, text = describe(aligner, tokens)
    scores = aligner.similarities(image, text)
    inputs = {key: tokens[key] for key in ("patch_embeds", "word_embeds", "word_mask", "patch_mask")}
    expected = reference.score_all_pairs(pair_scores(name, pooling), **inputs)
    assert scores.dtype == dtype
    torch.testing.assert_close(scores.double(), expected[None], rtol=0, atol=tolerance)
    assert list(aligner.parameters()) == [] and aligner.regularisers(image) == {}


# --- LAPS, a baseline with weights ---


def laps_pair_score(aligner):
    """One pair through the loops with the aligner's weights."""
    norm, hidden, _, last = aligner.aggregation
    weights = (norm.weight, norm.bias, hidden.weight, hidden.bias, last.weight, last.bias, aligner.logit_scale)

    def pair_score(words, patches, word_mask, patch_mask):
        logits = reference.laps_logits(patches, *weights, eps=norm.eps)
        return reference.laps_score(words, patches, logits, word_mask, patch_mask, aligner.keep_share)

    return pair_score


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize("keep_share", [0.5, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_laps_equals_the_loops_from_tokens_to_scores(draw_tokens, seed, keep_share, dtype, tolerance):
    aligner, tokens = build("laps", dtype=dtype, patch_keep_share=keep_share), draw_tokens(seed, dtype=dtype)
    image, text = describe(aligner, tokens)
    scores = aligner.similarities(image, text)
    inputs = {key: tokens[key] for key in ("patch_embeds", "word_embeds", "word_mask", "patch_mask")}
    expected = reference.score_all_pairs(laps_pair_score(aligner), **inputs)
    assert scores.dtype == dtype and image.patch_logits.shape == (3, 6, 3) and aligner.regularisers(image) == {}
    torch.testing.assert_close(scores.double(), expected[None], rtol=0, atol=tolerance)


def test_laps_has_the_gradients_of_the_loops(draw_tokens):
    aligner, tokens = build("laps"), draw_tokens(4)
    tokens = {key: tokens[key] for key in ("patch_embeds", "word_embeds", "word_mask", "patch_mask")}
    found = []
    for score in (
        lambda leaves: aligner.similarities(*describe(aligner, leaves))[0],
        lambda leaves: reference.score_all_pairs(laps_pair_score(aligner), **leaves),
    ):
        leaves = {key: t.clone().requires_grad_(key.endswith("embeds")) for key, t in tokens.items()}
        wanted = [leaves["patch_embeds"], leaves["word_embeds"], *aligner.parameters()]
        found.append(torch.autograd.grad(score(leaves).square().sum(), wanted))
    for ours, loops in zip(*found, strict=True):
        torch.testing.assert_close(ours, loops, rtol=0, atol=1e-11)
        assert ours.any()


def test_laps_starts_as_published_and_comes_back(tmp_path):
    """The scale at 1; a hidden layer of a fifth of the width; every weight trained and saved."""
    model = tiny_model(aligner="laps", num_regions=2, patch_keep_share=0.75)
    assert model.aligner.logit_scale.tolist() == [1] and model.aligner.keep_share == 0.75
    assert model.aligner.aggregation[1].weight.shape == (16 // 5, 16)
    with torch.no_grad():
        model.aligner.logit_scale.fill_(3.5)
    model.train()(**tiny_inputs(), return_loss=True).loss.backward()
    assert all(parameter.grad.any() for parameter in [*model.aligner.parameters()][:-1])
    assert model.aligner.aggregation[-1].bias.grad.abs().max() < 1e-7  # a softmax does not see what all logits share
    outputs = model.eval()(**tiny_inputs())
    assert outputs.patch_logits.shape == (3, 16, 2) and outputs.patch_logits.dtype == torch.float32
    model.save_pretrained(tmp_path)
    again = GranAlignModel.from_pretrained(tmp_path)
    assert again.aligner.logit_scale.tolist() == [3.5]
    assert torch.equal(again(**tiny_inputs()).logits_per_image, outputs.logits_per_image)


def test_laps_starts_the_same_from_the_checkpoint_of_another_aligner(tmp_path):
    """What the checkpoint lacks is built without memory first, and must be filled."""
    tiny_model(aligner="max_mean").save_pretrained(tmp_path)
    aligner = GranAlignModel.from_pretrained(tmp_path, aligner="laps").aligner
    assert aligner.logit_scale.tolist() == [1] and (aligner.aggregation[0].weight == 1).all()
    assert not aligner.aggregation[-1].bias.any() and aligner.aggregation[-1].weight.std() > 0.1


def test_max_pooling_ignores_padding_when_all_features_are_negative():
    tokens = {
        "patch_embeds": torch.tensor([[[-1.0, -2, 0, 0], [0, 0, 0, 0]]]),
        "word_embeds": torch.tensor([[[-1.0, 0, -2, 0], [0, 0, 0, 0]]]),
        "patch_mask": torch.tensor([[True, False]]),
        "word_mask": torch.tensor([[True, False]]),
    }
    aligner = build("vse++", "max")
    assert aligner.similarities(*describe(aligner, tokens)).item() == pytest.approx(1 / 5)


# --- What all promise ---


def test_every_aligner_has_its_poolings():
    assert set(ALIGNERS) == set(POOLINGS) == set(ALIGNER_FIELDS) == {"grm", "max_mean", "chan", "scan", "laps", "vse++"}


@pytest.mark.parametrize(("name", "pooling"), VARIANTS)
def test_one_weight_and_one_name_a_level(draw_tokens, name, pooling):
    aligner = build(name, pooling)
    levels = aligner.similarities(*describe(aligner, draw_tokens(5)))
    assert levels.shape == (len(aligner.level_weights), 3, 4) and len(aligner.level_names) == len(levels)
    assert sum(aligner.level_weights) == pytest.approx(1)


def run(aligner, tokens):
    """Scores, gradients of the tokens and of the weights, for a loss of all levels and regularisers."""
    tokens = {key: t.clone().requires_grad_(key.endswith("embeds")) for key, t in tokens.items()}
    aligner.zero_grad()
    torch.manual_seed(0)
    image, text = describe(aligner, tokens)
    levels = aligner.similarities(image, text)
    loss = (levels + levels**2).sum() + sum(value for _, value in aligner.regularisers(image).values())
    loss.backward()
    weights = [parameter.grad for parameter in aligner.parameters()]
    return levels.detach(), tokens["patch_embeds"].grad, tokens["word_embeds"].grad, loss.detach(), *weights


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("garbage", [float("nan"), 1e30])
@pytest.mark.parametrize(("name", "pooling"), VARIANTS)
def test_what_stands_under_the_mask_has_no_effect(draw_tokens, name, pooling, garbage, is_training):
    aligner, tokens = build(name, pooling).train(is_training), draw_tokens(6)
    dirty = dict(tokens)
    for side in ("patch", "word"):
        dirty[f"{side}_embeds"] = tokens[f"{side}_embeds"].masked_fill(~tokens[f"{side}_mask"][..., None], garbage)
    clean, dirty = run(aligner, tokens), run(aligner, dirty)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("garbage", [0.5, float("nan")])
@pytest.mark.parametrize(("name", "pooling"), VARIANTS)
def test_an_empty_image_or_caption_scores_0_and_gets_no_gradient(draw_tokens, name, pooling, garbage, is_training):
    aligner, tokens = build(name, pooling, torch.float32).train(is_training), draw_tokens(7, dtype=torch.float32)
    tokens["patch_mask"][1] = tokens["word_mask"][2] = False
    tokens["patch_embeds"][1] = tokens["word_embeds"][2] = garbage
    levels, *grads = run(aligner, tokens)
    assert not levels[:, 1].any() and not levels[..., 2].any() and levels[:, 0, 0].all()
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][1].any() and not grads[1][2].any() and grads[0].any() and grads[1].any()


@pytest.mark.parametrize(("name", "pooling"), VARIANTS)
def test_scores_of_the_same_features_are_the_same_under_autocast(draw_tokens, name, pooling):
    aligner = build(name, pooling, torch.float32)
    image, text = describe(aligner, draw_tokens(8, dtype=torch.float32))
    levels, terms = aligner.similarities(image, text), aligner.regularisers(image)
    with torch.autocast("cpu", torch.bfloat16):
        cast_levels, cast_terms = aligner.similarities(image, text), aligner.regularisers(image)
    assert cast_levels.dtype == torch.float32 and torch.equal(cast_levels, levels)
    assert all(torch.equal(cast_terms[name][1], value) for name, (_, value) in terms.items())


@pytest.mark.parametrize(("name", "pooling"), VARIANTS)
def test_scores_do_not_depend_on_the_batch(draw_tokens, name, pooling):
    aligner, tokens = build(name, pooling), draw_tokens(9)
    levels = aligner.similarities(*describe(aligner, tokens))
    one = {key: t[1:2] for key, t in tokens.items()}
    torch.testing.assert_close(aligner.similarities(*describe(aligner, one)), levels[:, 1:2, 1:2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("garbage", [0.5, float("nan")])
@pytest.mark.parametrize(("name", "pooling"), VARIANTS)
def test_a_few_pairs_have_the_gradients_that_all_tiles_give(draw_tokens, monkeypatch, name, pooling, garbage):
    """Two images need one caption and two captions of ten, the first of which has no words."""
    aligner = build(name, pooling)
    drawn = [draw_tokens(seed) for seed in (10, 11, 12)]
    width = max(tokens["word_mask"].shape[1] for tokens in drawn)
    tokens = {key: torch.cat([_to_width(t[key], width if key.startswith("word") else 0) for t in drawn]) for key in drawn[0]}
    tokens["word_mask"][0], tokens["word_embeds"][0] = False, garbage

    def gradients(sparse_share):
        monkeypatch.setattr(pairwise, "SPARSE_SHARE", sparse_share)
        leaves = {key: t.clone().requires_grad_(key.endswith("embeds")) for key, t in tokens.items()}
        levels = aligner.similarities(*describe(aligner, leaves))
        (2 * levels[:, 0, 3] + levels[:, 4, 3] ** 2 - levels[:, 4, 6]).sum().backward()
        return leaves["patch_embeds"].grad, leaves["word_embeds"].grad

    for few, all_tiles in zip(gradients(1 / 8), gradients(0), strict=True):
        assert few.isfinite().all() and few.any()
        torch.testing.assert_close(few, all_tiles, rtol=0, atol=1e-12)


def _to_width(tokens, width):
    return nn.functional.pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, max(width - tokens.shape[1], 0)))
