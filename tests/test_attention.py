"""Scores by attention: equal to plain loops for any mask, dtype and budget, with the gradients of the loops."""

import pytest
import reference
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from granalign_hf.modeling.attention import cross_attention, patch_slimming
from granalign_hf.modeling.losses import contrastive_hinge
from granalign_hf.modeling.pairwise import SPARSE_SHARE

TOKENS = ("patch_embeds", "word_embeds", "word_mask", "patch_mask")
FLOAT_INPUTS = ("patch_embeds", "word_embeds", "patch_logits")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def with_grad(tokens):
    return {name: t.clone().requires_grad_() if name in FLOAT_INPUTS else t for name, t in tokens.items()}


def grads(tokens):
    return {name: t.grad for name, t in tokens.items() if t.grad is not None}


# --- Cross-attention (SCAN) ---


def scan_by_loops(tokens, direction, inverse_temperature):
    """SCAN pair by pair: the roles of words and patches exchanged for i2t."""

    def pair_score(words, patches, word_mask, patch_mask):
        if direction == "t2i":
            return reference.scan_score(words, patches, word_mask, patch_mask, inverse_temperature)
        return reference.scan_score(patches, words, patch_mask, word_mask, inverse_temperature)

    return reference.score_all_pairs(pair_score, **tokens)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("has_holes", [True, False])
@pytest.mark.parametrize(("direction", "inverse_temperature"), [("t2i", 9.0), ("i2t", 4.0)])
@pytest.mark.parametrize("seed", range(3))
def test_cross_attention_equals_the_loops(draw_tokens, seed, direction, inverse_temperature, has_holes, dtype):
    tokens = {name: t for name, t in draw_tokens(seed, has_holes=has_holes, dtype=dtype).items() if name in TOKENS}
    scores = cross_attention(**tokens, direction=direction)
    assert scores.dtype == dtype
    expected = scan_by_loops(tokens, direction, inverse_temperature)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    sharper = cross_attention(**tokens, direction=direction, inverse_temperature=2 * inverse_temperature)
    torch.testing.assert_close(
        sharper.double(), scan_by_loops(tokens, direction, 2 * inverse_temperature), rtol=0, atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_cross_attention_has_the_gradients_of_the_loops(draw_tokens, direction):
    """By tiles of any size; tokens of length 0 have no direction and no gradient, and what is masked has none either."""
    tokens = {name: t for name, t in draw_tokens(3).items() if name in TOKENS}
    tokens["patch_embeds"][0, tokens["patch_mask"][0].nonzero()[0]] = 0
    weights = torch.rand(len(tokens["patch_embeds"]), len(tokens["word_embeds"]), dtype=torch.float64)
    ours, loops = with_grad(tokens), with_grad(tokens)
    (cross_attention(**ours, direction=direction, memory_budget=400) * weights).sum().backward()
    (scan_by_loops(loops, direction, {"t2i": 9.0, "i2t": 4.0}[direction]) * weights).sum().backward()
    for name, gradient in grads(ours).items():
        expected = loops[name].grad
        at_zero = (tokens[name] == 0).all(-1)  # the loops' gradient of a length is not defined there
        torch.testing.assert_close(gradient[~at_zero], expected[~at_zero], rtol=0, atol=1e-11)
        assert gradient.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation within it returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max(self.largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_cross_attention_of_one_caption_needs_no_gram_matrix_of_every_image(draw_tokens, direction):
    """One short caption leaves room for many images in a tile, whose Gram matrices would be larger than all else."""
    tokens = draw_tokens(1, images=40, captions=1, patches=64, words=2, dim=4, has_holes=False, dtype=torch.float32)
    plain = [tokens[name] for name in TOKENS[:3]]
    with LargestTensor() as mode:
        cross_attention(*plain, direction=direction)
    assert mode.largest <= tokens["patch_embeds"].numel()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "both"}, r"`direction` of the cross-attention must be one of \['i2t', 't2i'\], got 'both'"),
        ({"inverse_temperature": 0.0}, "`inverse_temperature` must be greater than 0, got 0.0"),
        ({"word_mask": torch.ones(2, 2, dtype=torch.bool)}, "`word_mask` must have shape"),
    ],
)
def test_cross_attention_names_a_bad_input(draw_tokens, changes, message):
    tokens = {name: t for name, t in draw_tokens(22).items() if name in TOKENS}
    with pytest.raises(ValueError, match=message):
        cross_attention(**(tokens | changes))


# --- Patch slimming (LAPS) ---

SHAPES = [  # images, captions, patches, words, tokens, dim
    (3, 4, 6, 5, 3, 4),
    (3, 4, 7, 5, 4, 9),  # sums of patches are longer than there are patches
    (4, 3, 2, 6, 1, 5),  # two patches, one token
    (2, 3, 1, 4, 2, 6),  # one patch
    (3, 2, 5, 1, 4, 2),  # one word
    (1, 1, 1, 1, 1, 1),
]


@pytest.fixture
def draw(draw_tokens):
    """Tokens with logits, as keyword arguments of `patch_slimming`."""

    def draw(seed=0, num_tokens=3, dtype=torch.float64, **shape):
        tokens = {name: t for name, t in draw_tokens(seed, dtype=dtype, **shape).items() if name in TOKENS}
        generator = torch.Generator().manual_seed(seed)
        shape = (*tokens["patch_mask"].shape, num_tokens)
        return tokens | {"patch_logits": 2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)}

    return draw


def slimming_by_loops(tokens, keep_share=0.5):
    rows = []
    for patches, patch_mask, logits in zip(tokens["patch_embeds"], tokens["patch_mask"], tokens["patch_logits"]):
        pairs = zip(tokens["word_embeds"], tokens["word_mask"])
        row = [reference.laps_score(words, patches, logits, mask, patch_mask, keep_share) for words, mask in pairs]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def released_form(patch_embeds, word_embeds, word_mask, patch_mask, patch_logits, keep_share=0.5):
    """The authors' form, for plain autograd: caption by caption, patches picked and tokens built. All patches are real."""
    assert patch_mask.all()
    normalize, columns = torch.nn.functional.normalize, []
    num_kept = -int(-keep_share * patch_embeds.shape[1] // 1)
    centre = normalize(patch_embeds.mean(1, keepdim=True), dim=2)

    def pick(values, positions):
        return values.gather(1, positions[..., None].expand(-1, -1, values.shape[2]))

    for words, mask in zip(word_embeds, word_mask):
        words = words[mask]
        score = (patch_embeds @ (centre + normalize(words.mean(0), dim=0)).mT)[..., 0].detach()
        kept, rest = score.argsort(1, descending=True).tensor_split([num_kept], 1)
        aggregated = pick(patch_logits, kept).softmax(1).mT @ pick(patch_embeds, kept)
        of_rest = score.gather(1, rest).softmax(1)[:, None] @ pick(patch_embeds, rest)
        products = words @ normalize(torch.cat([aggregated, of_rest], 1), dim=2).mT
        columns.append(products.amax(2).mean(1) + products.amax(1).mean(1))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("has_holes", [True, False])
@pytest.mark.parametrize("keep_share", [0.5, 0.3, 1])
@pytest.mark.parametrize(("seed", "shape"), list(enumerate(SHAPES)))
def test_patch_slimming_equals_the_loops(draw, seed, shape, keep_share, has_holes, dtype):
    names = ("images", "captions", "patches", "words", "num_tokens", "dim")
    tokens = draw(seed, has_holes=has_holes, dtype=dtype, **dict(zip(names, shape, strict=True)))
    scores = patch_slimming(**tokens, keep_share=keep_share)
    assert scores.dtype == dtype and scores.shape == shape[:2]
    expected = slimming_by_loops(tokens, keep_share)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_the_loops_are_the_released_form(draw):
    tokens = draw(5, has_holes=False, patches=7) | {"word_mask": draw(5)["word_mask"]}
    for keep_share in (0.5, 0.8, 1.0):
        torch.testing.assert_close(
            slimming_by_loops(tokens, keep_share), released_form(**tokens, keep_share=keep_share), rtol=0, atol=1e-12
        )


def test_patch_slimming_where_all_products_are_negative(draw):
    """Nothing that is masked or repeated may win with a 0, but the token of no patch does."""
    tokens = draw(2, dim=2)
    for name in ("patch_embeds", "word_embeds"):
        tokens[name] = torch.nn.functional.normalize(tokens[name].abs() + 0.1, dim=2)
    tokens["word_embeds"] = -tokens["word_embeds"]
    for keep_share in (0.5, 1.0):
        scores = patch_slimming(**tokens, keep_share=keep_share)
        torch.testing.assert_close(scores, slimming_by_loops(tokens, keep_share), rtol=0, atol=1e-12)
    tokens["patch_mask"][:] = torch.arange(6) > 3  # one kept and one left out
    assert (patch_slimming(**tokens) < 0).all()


@pytest.mark.parametrize("real", [(0, 1, 2, 3), (1, 3), (0, 2, 3), (3,)])
def test_of_equal_patches_the_first_are_kept(real):
    """Every product is 1/2 and every score 3/2 or more, exactly: which patches are kept is the order alone."""
    mask = torch.tensor([[n in real for n in range(4)]])
    tokens = {
        "patch_embeds": torch.eye(4, dtype=torch.float64)[None],
        "word_embeds": torch.full((1, 2, 4), 0.5, dtype=torch.float64),
        "word_mask": torch.tensor([[True, True]]),
        "patch_mask": mask,
        "patch_logits": torch.tensor([[[0.1], [-0.7], [1.3], [0.4]]], dtype=torch.float64),
    }
    kept, dropped, scores = reference.laps_kept(
        tokens["word_embeds"][0], tokens["patch_embeds"][0], patch_mask=mask[0], keep_share=0.5
    )
    assert (*kept, *dropped) == real and len(set(map(float, scores.values()))) == 1
    torch.testing.assert_close(patch_slimming(**tokens), slimming_by_loops(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("keep_share", "num_kept"), [(0.07, 7), (0.29, 29), (0.071, 8), (1e-9, 1), (1, 100)])
def test_the_share_is_that_of_its_decimals(draw, keep_share, num_kept):
    """0.07 * 100 is above 7 in float64 and 0.29 * 100 below 29: neither may decide how many patches are kept."""
    tokens = draw(3, images=1, captions=1, patches=100, has_holes=False)
    kept, *_ = reference.laps_kept(tokens["word_embeds"][0], tokens["patch_embeds"][0], keep_share=keep_share)
    assert len(kept) == num_kept
    for dtype, tolerance in TOLERANCE.items():
        cast = {name: t.to(dtype) if name in FLOAT_INPUTS else t for name, t in tokens.items()}
        scores = patch_slimming(**cast, keep_share=keep_share).double()
        torch.testing.assert_close(scores, slimming_by_loops(tokens, keep_share), rtol=0, atol=tolerance)


def test_far_apart_logits_underflow_nowhere(draw):
    """The patch of the highest logit, by hundreds, is not kept: a softmax over all patches would leave 0 / 0."""
    tokens = draw(4, images=1, captions=3, patches=8, has_holes=False, dtype=torch.float32)
    *_, last = reference.laps_kept(tokens["word_embeds"][0], tokens["patch_embeds"][0])[1]
    tokens["patch_logits"][:, last] = 500
    torch.testing.assert_close(patch_slimming(**tokens).double(), slimming_by_loops(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep_share", [0.5, 1])
@pytest.mark.parametrize("memory_budget", [400, 2**24])
def test_patch_slimming_has_the_gradients_of_the_loops(draw, memory_budget, keep_share):
    for shape in ({"dim": 4}, {"dim": 9}):
        tokens = draw(6, **shape)
        weights = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        ours, loops = with_grad(tokens), with_grad(tokens)
        (patch_slimming(**ours, keep_share=keep_share, memory_budget=memory_budget) * weights).sum().backward()
        (slimming_by_loops(loops, keep_share) * weights).sum().backward()
        assert set(grads(ours)) == set(FLOAT_INPUTS)
        for name, gradient in grads(ours).items():
            torch.testing.assert_close(gradient, loops[name].grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("use_hard_negatives", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("memory_budget", [2**13, 2**24])
def test_gradients_of_the_hinge_equal_those_of_the_released_form(draw, use_hard_negatives, memory_budget):
    tokens = draw(7, images=32, captions=32, patches=8, words=6, dim=8)
    tokens["patch_mask"][:] = True
    fast, slow = with_grad(tokens), with_grad(tokens)
    both = patch_slimming(**fast, memory_budget=memory_budget), released_form(**slow)
    torch.testing.assert_close(*both, rtol=0, atol=1e-12)
    for scores in both:
        scores.retain_grad()
        contrastive_hinge(scores, torch.eye(32, dtype=torch.bool), 0.2, use_hard_negatives).backward()
    assert ((both[0].grad != 0).double().mean() < SPARSE_SHARE) == use_hard_negatives
    for name in FLOAT_INPUTS:
        torch.testing.assert_close(fast[name].grad, slow[name].grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FLOAT_INPUTS)
def test_one_input_alone_may_require_a_gradient(draw, name):
    alone, all_of_them = draw(8), with_grad(draw(8))
    alone[name].requires_grad_()
    for tokens in (alone, all_of_them):
        patch_slimming(**tokens).square().sum().backward()
    assert set(grads(alone)) == {name}
    torch.testing.assert_close(alone[name].grad, all_of_them[name].grad, rtol=0, atol=1e-13)


@pytest.mark.parametrize("memory_budget", [0, 1, 100, 1000, 4000, 2**40])
def test_patch_slimming_is_the_same_for_any_memory_budget(draw, memory_budget):
    default, tight = (with_grad(draw(9, images=6, captions=9)) for _ in range(2))
    scores, tight_scores = patch_slimming(**default), patch_slimming(**tight, memory_budget=memory_budget)
    torch.testing.assert_close(tight_scores, scores, rtol=0, atol=1e-13)
    scores.square().sum().backward()
    tight_scores.square().sum().backward()
    for name in FLOAT_INPUTS:
        torch.testing.assert_close(tight[name].grad, default[name].grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory_budget", [2**14, 2**16, 2**18])
def test_the_weights_of_selected_patches_stay_within_the_budget(draw, memory_budget):
    """They, not the products of words, are the largest part of a tile: 12 words, 32 tokens."""
    tokens = draw(10, num_tokens=32, images=16, captions=20, patches=32, words=12, dim=2, has_holes=False)
    with LargestTensor() as mode:
        patch_slimming(**tokens, memory_budget=memory_budget)
    assert 0.2 < mode.largest * 8 / memory_budget <= 1


@pytest.mark.parametrize("garbage", [float("nan"), 1e30, float("inf")])
def test_nothing_under_the_mask_reaches_patch_slimming(draw, garbage):
    clean, dirty = draw(11), draw(11)
    for side in ("patch", "word"):
        dirty[f"{side}_embeds"][~dirty[f"{side}_mask"]] = garbage
    dirty["patch_logits"][~dirty["patch_mask"]] = garbage
    clean, dirty = with_grad(clean), with_grad(dirty)
    for tokens in (clean, dirty):
        patch_slimming(**tokens).square().sum().backward()
    assert torch.equal(patch_slimming(**clean), patch_slimming(**dirty))
    for name in FLOAT_INPUTS:
        assert torch.equal(clean[name].grad, dirty[name].grad)
    assert not dirty["patch_logits"].grad[~dirty["patch_mask"]].any()


@pytest.mark.parametrize("garbage", [0.5, float("nan")])
def test_patch_slimming_without_patches_or_words_scores_0_and_has_no_gradient(draw, garbage):
    tokens = draw(12)
    tokens["word_mask"][1] = tokens["patch_mask"][2] = False
    tokens["word_embeds"][1] = tokens["patch_embeds"][2] = tokens["patch_logits"][2] = garbage
    tokens = with_grad(tokens)
    scores = patch_slimming(**tokens)
    assert not scores[2].any() and not scores[:, 1].any() and scores[:2, [0, 2, 3]].all()
    (scores + scores**2).sum().backward()
    for name, grad in grads(tokens).items():
        assert grad.isfinite().all() and grad.any() and not grad[1 if name.startswith("word") else 2].any()


def test_patch_slimming_of_half_precision_and_under_autocast(draw):
    half = with_grad(draw(13, dtype=torch.float16))
    exact = {name: t.detach().double() if name in FLOAT_INPUTS else t for name, t in half.items()}
    scores = patch_slimming(**half)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), patch_slimming(**exact), rtol=0, atol=1e-5)
    scores.sum().backward()
    assert all(grad.dtype == torch.float16 and grad.isfinite().all() for grad in grads(half).values())
    single = {name: t.float() if name in FLOAT_INPUTS else t for name, t in exact.items()}
    plain, cast = with_grad(single), with_grad(single)
    expected = patch_slimming(**plain)
    with torch.autocast("cpu", torch.bfloat16):
        scores = patch_slimming(**cast)
        assert torch.equal(scores, expected)
    for tokens, result in ((plain, expected), (cast, scores)):
        result.square().sum().backward()
        assert all(torch.equal(grad, plain[name].grad) for name, grad in grads(tokens).items())


class Slimmer(torch.nn.Module):
    def forward(self, patch_embeds, word_embeds, word_mask, patch_mask, patch_logits):
        return patch_slimming(patch_embeds, word_embeds, word_mask, patch_logits, patch_mask=patch_mask)


def test_an_exported_graph_of_patch_slimming_takes_any_batch_and_length(draw):
    sides = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    first, second = (tuple(draw(n, images=n, captions=n + 1, patches=n + 4, words=n + 2).values()) for n in (3, 5))
    exported = torch.export.export(Slimmer(), first, dynamic_shapes=(sides,) * 5).module()
    torch.testing.assert_close(exported(*second), Slimmer()(*second), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_share": 0}, r"`keep_share` must lie in \(0, 1\], got 0"),
        ({"keep_share": 1.5}, r"`keep_share` must lie in \(0, 1\], got 1.5"),
        ({"keep_share": float("nan")}, r"`keep_share` must lie in \(0, 1\], got nan"),
        ({"patch_logits": torch.ones(3, 6)}, r"`patch_logits` must have shape \(3, 6, tokens\), got \(3, 6\)"),
        ({"patch_logits": torch.ones(3, 5, 2)}, r"`patch_logits` must have shape \(3, 6, tokens\), got \(3, 5, 2\)"),
        ({"patch_logits": torch.ones(3, 6, 0)}, r"`patch_logits` must have shape \(3, 6, tokens\), got \(3, 6, 0\)"),
        ({"word_mask": torch.ones(4, 5)}, "`word_mask` must be boolean"),
    ],
)
def test_patch_slimming_names_a_bad_input(draw, changes, message):
    with pytest.raises(ValueError, match=message):
        patch_slimming(**(draw(14, dtype=torch.float32) | changes))
