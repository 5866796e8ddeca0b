"""The pair scores: equal to plain loops for any shape, mask, dtype and budget, with the gradients of plain autograd."""

from itertools import combinations

import pytest
import reference
import torch

from granalign_hf.modeling import product
from granalign_hf.modeling.attention import cross_attention
from granalign_hf.modeling.losses import contrastive_hinge
from granalign_hf.modeling.pairwise import SPARSE_SHARE
from granalign_hf.modeling.similarity import hard_alignment, level_similarities, token_similarity

FLOAT_INPUTS = ("patch_embeds", "word_embeds", "patch_saliency", "word_saliency", "region_embeds")
TOKENS = ("patch_embeds", "word_embeds", "word_mask", "patch_mask")  # what CHAN takes
SHAPES = [  # images, captions, patches, words, regions, dim
    (3, 4, 6, 5, 3, 4),
    (1, 5, 7, 3, 2, 3),  # one image
    (4, 1, 2, 6, 1, 5),  # one caption, one region
    (2, 3, 1, 4, 2, 6),  # one patch
    (3, 2, 5, 1, 4, 2),  # one word
    (1, 1, 1, 1, 1, 1),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def naive_levels(patch_embeds, word_embeds, word_mask, patch_mask, patch_saliency, word_saliency, region_embeds):
    """The three levels through the 4-D tensor, for plain autograd."""
    words_hat, patches_hat = word_embeds * word_saliency[..., None], patch_embeds * patch_saliency[..., None]
    region_mask = torch.ones(region_embeds.shape[:2], dtype=torch.bool)

    def max_mean(words, visual, visual_mask):
        real_words, real_visual = word_mask[None, :, :, None], visual_mask[:, None, None, :]
        products = torch.einsum("twd,ivd->itwv", words, visual).masked_fill(~(real_words & real_visual), -torch.inf)
        best_visual = products.amax(3).masked_fill(~word_mask, 0).sum(2) / word_mask.sum(1)
        return best_visual + products.amax(2).masked_fill(~visual_mask[:, None], 0).sum(2) / visual_mask.sum(1)[:, None]

    original, key = max_mean(word_embeds, patch_embeds, patch_mask), max_mean(words_hat, patches_hat, patch_mask)
    return torch.stack([original, key, max_mean(words_hat, region_embeds, region_mask)])


def with_grad(tokens, names=FLOAT_INPUTS):
    return {name: t.clone().requires_grad_() if name in names else t for name, t in tokens.items()}


def grads(tokens):
    return {name: t.grad for name, t in tokens.items() if t.grad is not None}


# --- Agreement with the loops ---


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("has_holes", [True, False])
@pytest.mark.parametrize(("seed", "shape"), list(enumerate(SHAPES)))
def test_the_three_levels_equal_the_loops(draw_tokens, seed, shape, has_holes, dtype):
    names = ("images", "captions", "patches", "words", "regions", "dim")
    tokens = draw_tokens(seed, has_holes=has_holes, dtype=dtype, **dict(zip(names, shape, strict=True)))
    levels = level_similarities(**tokens)
    assert levels.dtype == dtype and levels.shape == (3, shape[0], shape[1])
    torch.testing.assert_close(levels.double(), reference.level_similarities(**tokens), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("extras", [c for n in range(5) for c in combinations(("patch_mask", *FLOAT_INPUTS[2:]), n)])
def test_any_subset_of_the_optional_inputs(draw_tokens, extras):
    tokens = {name: t for name, t in draw_tokens(2).items() if name in (*TOKENS[:3], *extras)}
    torch.testing.assert_close(level_similarities(**tokens), reference.level_similarities(**tokens), rtol=0, atol=1e-12)
    torch.testing.assert_close(token_similarity(**tokens), reference.token_similarity(**tokens), rtol=0, atol=1e-12)


def test_level_weights_are_used_as_given(draw_tokens):
    tokens = draw_tokens(3)
    expected = reference.token_similarity(**tokens, level_weights=(0.5, 3, -1))
    torch.testing.assert_close(token_similarity(**tokens, level_weights=(0.5, 3, -1)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("pooling", ["mean", "logsumexp"])
@pytest.mark.parametrize("seed", range(3))
def test_hard_alignment_equals_the_loops(draw_tokens, seed, pooling, dtype):
    tokens = {name: t for name, t in draw_tokens(seed, dtype=dtype).items() if name in TOKENS}

    def pair_score(words, patches, word_mask, patch_mask):
        return reference.chan_score(words, patches, word_mask, patch_mask, pooling, temperature=0.2)

    scores = hard_alignment(**tokens, pooling=pooling, temperature=0.2)
    assert scores.dtype == dtype
    expected = reference.score_all_pairs(pair_score, **tokens)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_ragged_captions_score_as_if_alone(draw_tokens):
    """Lengths 1 to 12 in mixed order: grouping by length may not mix up captions."""
    tokens = draw_tokens(4, captions=12, words=12, patches=3)
    lengths = torch.randperm(12, generator=torch.Generator().manual_seed(0)) + 1
    tokens["word_mask"] = torch.arange(12) < lengths[:, None]
    scores = level_similarities(**tokens)
    for t, length in enumerate(lengths.tolist()):
        alone = {name: x[t : t + 1, :length] if name.startswith("word") else x for name, x in tokens.items()}
        torch.testing.assert_close(level_similarities(**alone), scores[..., t : t + 1], rtol=0, atol=1e-12)


# --- Padding ---


def test_padding_does_not_win_when_all_products_are_negative():
    tokens = {
        "patch_embeds": torch.tensor([[[-1.0], [-3.0], [0.0]]]),
        "word_embeds": torch.tensor([[[2.0], [1.0], [0.0]]]),
        "word_mask": torch.tensor([[True, True, False]]),
        "patch_mask": torch.tensor([[True, True, False]]),
    }
    # Products -2 -6 / -1 -3: the best patches of the words are -2 and -1, the best words of the patches -1 and -3.
    assert token_similarity(**tokens).tolist() == [[-1.5 - 2.0]]
    assert hard_alignment(**tokens).tolist() == [[-1.5]]


@pytest.mark.parametrize("garbage", [float("nan"), 1e30, -1e30, float("inf")])
def test_what_stands_under_the_mask_has_no_effect(draw_tokens, garbage):
    clean, dirty = draw_tokens(5), draw_tokens(5)
    for side in ("patch", "word"):
        dirty[f"{side}_embeds"][~dirty[f"{side}_mask"]] = garbage
        dirty[f"{side}_saliency"][~dirty[f"{side}_mask"]] = garbage
    clean, dirty = with_grad(clean), with_grad(dirty)
    for tokens in (clean, dirty):
        (level_similarities(**tokens) ** 2).sum().backward()
        (hard_alignment(*(tokens[name] for name in TOKENS[:3]), patch_mask=tokens["patch_mask"]) ** 2).sum().backward()
    assert torch.equal(level_similarities(**clean), level_similarities(**dirty))
    for name in FLOAT_INPUTS:
        assert torch.equal(clean[name].grad, dirty[name].grad)
    for side in ("patch", "word"):
        assert (dirty[f"{side}_embeds"].grad[~dirty[f"{side}_mask"]] == 0).all()
        assert (dirty[f"{side}_saliency"].grad[~dirty[f"{side}_mask"]] == 0).all()


@pytest.mark.parametrize("garbage", [0.5, float("nan")])
def test_an_empty_caption_or_image_scores_0_and_gets_no_gradient(draw_tokens, garbage):
    tokens = draw_tokens(6)
    tokens["word_mask"][1] = False
    tokens["patch_mask"][2] = False
    tokens["word_embeds"][1] = tokens["patch_embeds"][2] = garbage
    tokens["word_saliency"][1] = tokens["patch_saliency"][2] = garbage
    tokens = with_grad(tokens)
    chan = [
        hard_alignment(*(tokens[n] for n in TOKENS[:3]), patch_mask=tokens["patch_mask"], pooling=p)
        for p in ("mean", "logsumexp")
    ]
    levels = torch.cat([level_similarities(**tokens), torch.stack(chan)])
    assert (levels[:, 2] == 0).all() and (levels[..., 1] == 0).all()
    assert (levels[:, :2, [0, 2, 3]] != 0).all()
    (levels + levels**2).sum().backward()
    for name, grad in grads(tokens).items():
        assert grad.isfinite().all() and grad.any()
        assert (grad[1 if name.startswith("word") else 2] == 0).all()


# --- Gradients ---


def test_gradcheck(draw_tokens):
    tokens = draw_tokens(7, images=2, captions=3, patches=3, words=3, regions=2, dim=2)
    masks = {name: tokens[name] for name in ("word_mask", "patch_mask")}
    floats = [tokens[name].requires_grad_() for name in FLOAT_INPUTS]
    assert torch.autograd.gradcheck(lambda *f: level_similarities(**dict(zip(FLOAT_INPUTS, f)), **masks), floats)
    for pooling in ("mean", "logsumexp"):
        assert torch.autograd.gradcheck(lambda p, w, k=pooling: hard_alignment(p, w, **masks, pooling=k), floats[:2])


@pytest.mark.parametrize("use_hard_negatives", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("memory_budget", [3000, 2**24])
def test_gradients_of_the_hinge_equal_plain_autograd(draw_tokens, use_hard_negatives, memory_budget):
    fast, slow = (with_grad(draw_tokens(8, images=64, captions=64, patches=5, words=6, dim=8)) for _ in range(2))
    positives = torch.eye(64, dtype=torch.bool)
    both = level_similarities(**fast, memory_budget=memory_budget), naive_levels(**slow)
    for levels in both:
        levels.retain_grad()
        sum(contrastive_hinge(level, positives, 0.2, use_hard_negatives) for level in levels).backward()
    assert ((both[0].grad != 0).any(0).double().mean() < SPARSE_SHARE) == use_hard_negatives
    for name in FLOAT_INPUTS:
        torch.testing.assert_close(fast[name].grad, slow[name].grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("names", [c for n in range(1, 6) for c in combinations(FLOAT_INPUTS, n)])
def test_requires_grad_on_any_subset(draw_tokens, names):
    fast, slow = with_grad(draw_tokens(9), names), with_grad(draw_tokens(9), names)
    (level_similarities(**fast) ** 2).sum().backward()
    (naive_levels(**slow) ** 2).sum().backward()
    assert set(grads(fast)) == set(names)
    for name in names:
        torch.testing.assert_close(fast[name].grad, slow[name].grad, rtol=0, atol=1e-12)


def test_without_requires_grad_there_is_no_graph(draw_tokens):
    assert not level_similarities(**draw_tokens(9)).requires_grad


@pytest.mark.parametrize("score", [token_similarity, hard_alignment])
def test_exact_ties_share_a_gradient_of_1(score):
    """Every product is 1: whatever the maxima choose, the gradient of each mean adds up to 1 a side."""
    patches = torch.ones(1, 3, 1, dtype=torch.float64, requires_grad=True)
    words = torch.ones(1, 4, 1, dtype=torch.float64, requires_grad=True)
    score(patches, words, torch.tensor([[True, False, True, True]])).sum().backward()
    num_means = 2 if score is token_similarity else 1
    torch.testing.assert_close(patches.grad.sum().item(), float(num_means))
    torch.testing.assert_close(words.grad.sum().item(), float(num_means))
    assert words.grad[0, 1] == 0


def test_ties_of_equal_patches_split_evenly(draw_tokens):
    tokens = draw_tokens(10, has_holes=False)
    tokens["patch_embeds"][:, 1] = tokens["patch_embeds"][:, 0]
    tokens["patch_saliency"][:, 1] = tokens["patch_saliency"][:, 0]
    fast, slow = with_grad(tokens), with_grad(tokens)
    level_similarities(**fast).sum().backward()
    naive_levels(**slow).sum().backward()
    for name in FLOAT_INPUTS:
        torch.testing.assert_close(fast[name].grad, slow[name].grad, rtol=0, atol=1e-12)


# --- Layout, budget, precision ---


def test_non_contiguous_inputs(draw_tokens):
    """Transposed and strided inputs give the scores and gradients of their copies."""
    plain = with_grad(draw_tokens(11))
    leaves = with_grad({name: t.detach().transpose(0, 1).contiguous() for name, t in plain.items()})
    views = {name: t.transpose(0, 1) for name, t in leaves.items()}
    assert not any(view.is_contiguous() for view in views.values())
    direct = {name: view.detach().requires_grad_(view.is_floating_point()) for name, view in views.items()}
    for tokens in (plain, views, direct):
        levels = level_similarities(**tokens)
        assert torch.equal(levels, level_similarities(**plain))
        (levels**2).sum().backward()
    for name in FLOAT_INPUTS:
        assert torch.equal(leaves[name].grad.transpose(0, 1), plain[name].grad)
        assert torch.equal(direct[name].grad, plain[name].grad)


@pytest.mark.parametrize("memory_budget", [0, 1, 100, 1000, 4000, 2**40])
def test_any_memory_budget_gives_the_same_result(draw_tokens, memory_budget):
    default, tight = (with_grad(draw_tokens(12, images=6, captions=9)) for _ in range(2))
    levels, tight_levels = level_similarities(**default), level_similarities(**tight, memory_budget=memory_budget)
    torch.testing.assert_close(tight_levels, levels, rtol=0, atol=1e-13)
    (levels**2).sum().backward()
    (tight_levels**2).sum().backward()
    for name in FLOAT_INPUTS:
        torch.testing.assert_close(tight[name].grad, default[name].grad, rtol=0, atol=1e-12)
    chan = [{name: t for name, t in draw_tokens(12).items() if name in TOKENS}, {"memory_budget": memory_budget}]
    torch.testing.assert_close(hard_alignment(**chan[0], **chan[1]), hard_alignment(**chan[0]), rtol=0, atol=1e-13)


def test_a_memory_budget_changes_float32_scores_by_rounding_only():
    """Tiles large enough for the kernel that large products get, and tiles too small for it."""
    generator = torch.Generator().manual_seed(0)
    patches, words = (torch.randn(16, n, 512, generator=generator) for n in (196, 24))
    mask = torch.arange(24) < torch.randint(1, 25, (16, 1), generator=generator)
    exact = token_similarity(patches.double(), words.double(), mask)
    for memory_budget in (2**14, 2**18, 2**22, None):
        scores = token_similarity(patches, words, mask, memory_budget=memory_budget)
        torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-6 * exact.abs().max().item())


@pytest.mark.parametrize("score", [token_similarity, level_similarities, hard_alignment, cross_attention])
def test_autocast_changes_nothing(draw_tokens, score):
    plain, cast = (
        with_grad(
            {
                k: t
                for k, t in draw_tokens(13, dim=64, dtype=torch.float32).items()
                if score not in (hard_alignment, cross_attention) or k in TOKENS
            }
        )
        for _ in range(2)
    )
    scores = score(**plain)
    scores.square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        cast_scores = score(**cast)
        loss = cast_scores.square().sum()
    loss.backward()
    assert cast_scores.dtype == torch.float32 and torch.equal(cast_scores, scores)
    assert all(torch.equal(cast[k].grad, plain[k].grad) for k in plain if k in FLOAT_INPUTS)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-6), (torch.bfloat16, 2e-2)])
def test_half_precision_inputs_give_float32_scores(draw_tokens, dtype, tolerance):
    """float16 is exact on a CPU (float32 products); bfloat16 rounds each product, not the means."""
    half = with_grad(draw_tokens(14, dtype=dtype))
    exact = {name: t.detach().double() if name in FLOAT_INPUTS else t for name, t in half.items()}
    levels = level_similarities(**half)
    assert levels.dtype == torch.float32
    torch.testing.assert_close(levels.double(), level_similarities(**exact), rtol=0, atol=tolerance)
    levels.sum().backward()
    assert all(t.dtype == dtype and t.isfinite().all() for t in grads(half).values())
    chan = hard_alignment(*(half[name] for name in TOKENS[:3]), pooling="logsumexp")
    assert chan.dtype == torch.float32


def test_saliency_may_keep_another_precision(draw_tokens):
    tokens = draw_tokens(15, dtype=torch.float32)
    mixed = {name: t.double() if name.endswith("saliency") or name == "region_embeds" else t for name, t in tokens.items()}
    assert torch.equal(level_similarities(**mixed), level_similarities(**tokens))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it after every graph break
def test_torch_compile(draw_tokens):
    """The scores stay outside the graph, so captions of other lengths compile nothing new."""
    eager, compiled = with_grad(draw_tokens(16)), with_grad(draw_tokens(16))
    token_similarity(**eager).sum().backward()
    score = torch.compile(lambda kwargs: token_similarity(**kwargs) * 2, backend="aot_eager")
    (score(compiled) / 2).sum().backward()
    for name in FLOAT_INPUTS:
        assert torch.equal(compiled[name].grad, eager[name].grad)
    compiled["word_mask"] = draw_tokens(17)["word_mask"]
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(score(compiled), 2 * token_similarity(**compiled))


# --- The exact facts of the method ---


def test_key_level_is_the_original_with_row_and_column_scales(draw_tokens):
    tokens = draw_tokens(17)
    hat = {name: tokens[name] for name in TOKENS}
    for side in ("patch", "word"):
        hat[f"{side}_embeds"] = tokens[f"{side}_embeds"] * tokens[f"{side}_saliency"][..., None]
    torch.testing.assert_close(level_similarities(**hat)[0], level_similarities(**tokens)[1], rtol=0, atol=1e-13)


def test_the_score_is_the_sum_of_its_matches(draw_tokens):
    """Each word's best patch or region and each patch's or region's best word, with their shares, add up to the score."""
    tokens = draw_tokens(18, images=1, captions=1, has_holes=False)
    words, patches = tokens["word_embeds"][0], tokens["patch_embeds"][0]
    words_hat, patches_hat = words * tokens["word_saliency"][0, :, None], patches * tokens["patch_saliency"][0, :, None]
    shares = []
    for weight, (w, v) in zip(
        (0.4, 0.4, 0.2), ((words, patches), (words_hat, patches_hat), (words_hat, tokens["region_embeds"][0])), strict=True
    ):
        products = w @ v.T
        shares += [weight / len(w) * row[row.argmax()] for row in products]
        shares += [weight / len(v) * column[column.argmax()] for column in products.T]
    assert len(shares) == 3 * 5 + 6 + 6 + 3
    torch.testing.assert_close(token_similarity(**tokens).item(), sum(shares).item(), rtol=0, atol=1e-13)


def test_variance_of_the_uncertain_level_without_sampling(draw_tokens):
    """The gradient towards the regions gives g_k; noise too small to switch a maximum has the predicted variance."""
    tokens = draw_tokens(19, images=1, captions=1, has_holes=False)
    generator = torch.Generator().manual_seed(1)
    log_vars = torch.randn(1, 3, 4, generator=generator).double() - 16
    assignment = torch.rand(1, 6, 3, generator=generator).double().softmax(1)
    means = tokens["region_embeds"].requires_grad_()
    level_similarities(**tokens)[2].sum().backward()
    spread = assignment.square().sum(1)[..., None] * log_vars.exp()
    variance = (spread * means.grad**2).sum()
    words_hat = tokens["word_embeds"][0] * tokens["word_saliency"][0, :, None]
    expected = reference.var_of_uncertain_score(words_hat, means[0], log_vars[0], assignment[0])
    torch.testing.assert_close(variance, expected.detach(), rtol=1e-12, atol=0)
    draws = means.detach() + spread.sqrt() * torch.randn(20_000, 3, 4, generator=generator).double()
    one_patch = tokens["patch_embeds"][:, :1].expand(20_000, 1, 4)
    words = {name: tokens[name] for name in ("word_embeds", "word_mask", "word_saliency")}
    sampled = level_similarities(one_patch, **words, region_embeds=draws)[2].var()
    torch.testing.assert_close(sampled, variance, rtol=0.05, atol=0)


def test_tokens_of_zero_saliency_can_be_pruned_exactly(draw_tokens):
    """Drop them, clamp the remaining maxima at 0, keep the denominators."""
    tokens = draw_tokens(20, images=5, captions=6, patches=8, words=7, has_holes=False)
    for name in ("patch_saliency", "word_saliency"):
        tokens[name] = (tokens[name] > 0.5).double() * tokens[name]
        tokens[name][:, 0] = 0  # at least one pruned token a row, so that 0 is among the products
    key = level_similarities(**tokens)[1]
    for i, t in ((i, t) for i in range(5) for t in range(6)):
        kept_patches, kept_words = tokens["patch_saliency"][i] > 0, tokens["word_saliency"][t] > 0
        patches = (tokens["patch_embeds"][i] * tokens["patch_saliency"][i, :, None])[kept_patches]
        words = (tokens["word_embeds"][t] * tokens["word_saliency"][t, :, None])[kept_words]
        products = torch.cat([words @ patches.T, torch.zeros(len(words), 1).double()], dim=1)
        products = torch.cat([products, torch.zeros(1, products.shape[1]).double()])
        pruned = products.amax(1).clamp(min=0).sum() / 7 + products.amax(0).clamp(min=0).sum() / 8
        torch.testing.assert_close(pruned, key[i, t], rtol=0, atol=1e-13)


# --- Errors ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_embeds": torch.ones(6, 4)}, r"`patch_embeds` must have shape \(images, patches, features\), got \(6, 4\)"),
        ({"word_embeds": torch.ones(4, 5)}, r"`word_embeds` must have shape \(captions, words, 4\)"),
        ({"word_embeds": torch.ones(4, 5, 3)}, r"`word_embeds` must have shape .* got \(4, 5, 3\)"),
        ({"patch_embeds": torch.ones(0, 6, 4)}, r"At least one image .* `patch_embeds` \(0, 6, 4\)"),
        ({"patch_embeds": torch.ones(3, 0, 4)}, r"At least one image with a patch .* `patch_embeds` \(3, 0, 4\)"),
        ({"word_embeds": torch.ones(4, 0, 4)}, r"one caption with a word .* `word_embeds` \(4, 0, 4\)"),
        ({"word_embeds": torch.ones(0, 5, 4)}, r"one caption with a word .* `word_embeds` \(0, 5, 4\)"),
        (
            {"word_mask": torch.ones(4, 6) > 0},
            r"`word_mask` must have shape \(4, 5\), got \(4, 6\). Pass the `attention_mask`",
        ),
        ({"word_mask": torch.ones(4, 5)}, r"`word_mask` must be boolean .* got torch.float32"),
        ({"word_mask": torch.ones(4, 5).long()}, r"`word_mask` must be boolean .* got torch.int64"),
        ({"patch_mask": torch.ones(3, 5) > 0}, r"`patch_mask` must have shape \(3, 6\), got \(3, 5\)"),
        ({"patch_mask": torch.ones(3, 6)}, r"`patch_mask` must be boolean"),
        ({"patch_saliency": torch.ones(4, 6)}, r"`patch_saliency` must have shape \(3, 6\), got \(4, 6\)"),
        ({"word_saliency": torch.ones(4, 5, 1)}, r"`word_saliency` must have shape \(4, 5\), got \(4, 5, 1\)"),
        ({"region_embeds": torch.ones(2, 3, 4)}, r"`region_embeds` must have shape \(3, regions, 4\), got \(2, 3, 4\)"),
        ({"region_embeds": torch.ones(3, 3, 5)}, r"`region_embeds` must have shape \(3, regions, 4\), got \(3, 3, 5\)"),
        ({"region_embeds": torch.ones(3, 0, 4)}, r"`region_embeds` must have shape \(3, regions, 4\), got \(3, 0, 4\)"),
        ({"region_embeds": torch.ones(3, 4)}, r"`region_embeds` must have shape \(3, regions, 4\), got \(3, 4\)"),
        ({"word_embeds": torch.ones(4, 5, 4).half()}, r"must share a dtype, got torch.float32, torch.float16"),
        ({"level_weights": (0.5, 0.5)}, r"`level_weights` must have one weight for each of the 3 levels .* got 2"),
    ],
)
def test_a_bad_input_is_named(draw_tokens, changes, message):
    with pytest.raises(ValueError, match=message):
        token_similarity(**(draw_tokens(21, dtype=torch.float32) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "max"}, r"`pooling` of the hard alignment must be one of \['logsumexp', 'mean'\], got 'max'"),
        ({"temperature": 0}, r"`temperature` of the hard alignment must be greater than 0, got 0"),
        ({"word_mask": torch.ones(4, 5)}, r"`word_mask` must be boolean"),
    ],
)
def test_hard_alignment_names_a_bad_input(draw_tokens, changes, message):
    tokens = {name: t for name, t in draw_tokens(22, dtype=torch.float32).items() if name in TOKENS}
    with pytest.raises(ValueError, match=message):
        hard_alignment(**(tokens | changes))


# --- Graphs and kernels ---


class Scorer(torch.nn.Module):
    def __init__(self, score):
        super().__init__()
        self.score = score

    def forward(self, patch_embeds, word_embeds, word_mask, patch_mask):
        return self.score(patch_embeds, word_embeds, word_mask, patch_mask=patch_mask)


@pytest.mark.parametrize("score", [token_similarity, hard_alignment, cross_attention])
def test_an_exported_graph_takes_any_batch_and_length(draw_tokens, score):
    sides = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    first, second = (
        [draw_tokens(seed, images=n, captions=n + 1, words=n + 2)[k] for k in TOKENS] for seed, n in ((0, 3), (1, 5))
    )
    exported = torch.export.export(Scorer(score), tuple(first), dynamic_shapes=(sides,) * 4).module()
    torch.testing.assert_close(exported(*second), Scorer(score)(*second), rtol=0, atol=1e-12)


@pytest.mark.parametrize("has_faster_onednn", [True, False])
def test_either_kernel_gives_the_product_and_its_gradients(monkeypatch, has_faster_onednn):
    monkeypatch.setattr(product, "_has_faster_onednn", lambda: has_faster_onednn)
    words, patches, upstream = torch.randn(256, 512), torch.randn(1024, 512), torch.randn(256, 1024)
    leaves = [words.clone().requires_grad_(), patches.clone().requires_grad_()]
    products = product.all_products(*leaves)
    assert products.is_contiguous()
    found = [products.detach(), *torch.autograd.grad(products, leaves, upstream)]
    words, patches, upstream = words.double(), patches.double(), upstream.double()
    for ours, exact in zip(found, (words @ patches.T, upstream @ patches, upstream.T @ words), strict=True):
        assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()


def test_a_compiled_graph_breaks_at_the_tiles_and_says_so_where_it_may_not(draw_tokens):
    tokens = [draw_tokens(0)[name] for name in TOKENS[:3]]
    compiled = torch.compile(token_similarity, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="tiles follow the lengths of the captions"):
        compiled(*tokens)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # both of PyTorch's own code
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_the_default_compiler_gives_the_same_scores_and_gradients(draw_tokens):
    tokens = {name: t for name, t in draw_tokens(0, dtype=torch.float32).items()}
    eager, compiled = with_grad(tokens), with_grad(tokens)
    expected = token_similarity(**eager) * 2
    scores = torch.compile(lambda kwargs: token_similarity(**kwargs) * 2)(compiled)
    torch.testing.assert_close(scores, expected)
    scores.sum().backward()
    expected.sum().backward()
    for name, gradient in grads(eager).items():
        torch.testing.assert_close(compiled[name].grad, gradient)
