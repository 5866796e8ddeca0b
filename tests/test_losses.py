"""The losses: on hand-written matrices, against plain loops, with finite gradients at their corners."""

import math

import pytest
import reference
import torch
from torch.distributions import Normal, kl_divergence

from granalign_hf.modeling.losses import contrastive_hinge, gaussian_kl, reconstruction_loss, region_entropy, saliency_budget

SCORES = torch.tensor([[0.9, 0.8, 0.1], [0.3, 0.5, 0.6], [0.0, 0.1, 0.7]])
EYE = torch.eye(3, dtype=torch.bool)
TOLERANCE = [(torch.float64, 1e-12), (torch.float32, 1e-5)]


# --- Hinge ---


def test_hardest_negatives_on_a_hand_written_matrix():
    # margin 0.2; image to caption: 0.1, 0.3, 0; caption to image: 0, 0.5, 0.1.
    assert contrastive_hinge(SCORES, EYE, 0.2).item() == pytest.approx((0.1 + 0.3 + 0.5 + 0.1) / 3)


def test_all_negatives_on_a_hand_written_matrix():
    # Each of the six is averaged with that of a second negative, which violates nothing.
    assert contrastive_hinge(SCORES, EYE, 0.2, use_hard_negatives=False).item() == pytest.approx(
        (0.1 + 0.3 + 0.5 + 0.1) / 2 / 3
    )


def test_captions_of_the_same_image_are_never_negatives():
    # Image 0 twice: captions 0 and 1 describe both of its copies; only pairs with image or caption 2 can violate.
    positives = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    scores = torch.tensor([[0.0, 9.0, 0.4], [9.0, 0.0, 0.4], [0.4, 0.4, 0.5]])
    # Four pairs of image 0: scores 0, 9, 9, 0, negatives 0.4 on both sides; the pair of image 2: 0.5 against 0.4.
    expected = (2 * 2 * (0.2 + 0.4) + 2 * (0.2 - 0.5 + 0.4)) / 5
    for use_hard_negatives in (True, False):
        assert contrastive_hinge(scores, positives, 0.2, use_hard_negatives).item() == pytest.approx(expected)


def test_duplicated_images_do_not_change_the_hinge():
    """A batch with a picture twice and its caption twice: the same hardest negatives, the same mean."""
    index = torch.tensor([0, 0, 1, 1, 2, 2])
    loss = contrastive_hinge(SCORES[index][:, index], index[:, None] == index, 0.2)
    assert loss.item() == pytest.approx(contrastive_hinge(SCORES, EYE, 0.2).item())


@pytest.mark.parametrize("use_hard_negatives", [True, False])
def test_a_model_that_scores_all_alike_has_twice_the_margin(use_hard_negatives):
    scores = torch.full((5, 5), 0.7)
    assert contrastive_hinge(scores, torch.eye(5) > 0, 0.15, use_hard_negatives).item() == pytest.approx(0.3)


@pytest.mark.parametrize("use_hard_negatives", [True, False])
def test_a_query_without_negatives_contributes_0(use_hard_negatives):
    scores = torch.tensor([[-3.0, -2.0]], requires_grad=True)
    loss = contrastive_hinge(scores, torch.tensor([[True, True]]), 0.2, use_hard_negatives)
    loss.backward()
    assert loss.item() == 0 and scores.grad.tolist() == [[0, 0]]
    # One image, two captions, one of them foreign: the caption has no other image, the image has one negative.
    loss = contrastive_hinge(torch.tensor([[0.5, 0.6]]), torch.tensor([[True, False]]), 0.2, use_hard_negatives)
    assert loss.item() == pytest.approx(0.3)


def test_only_the_hardest_negatives_and_their_positives_get_a_gradient():
    scores = SCORES.clone().requires_grad_()
    contrastive_hinge(scores, EYE, 0.2).backward()
    # Violations: (0,0)<(0,1), (1,1)<(1,2), (1,1)<(0,1), (2,2)<(1,2).
    expected = torch.tensor([[-1.0, 2.0, 0.0], [0.0, -2.0, 2.0], [0.0, 0.0, -1.0]]) / 3
    torch.testing.assert_close(scores.grad, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize("use_hard_negatives", [True, False])
@pytest.mark.parametrize(("seed", "shape"), [(0, (4, 4)), (1, (3, 7)), (2, (6, 2)), (3, (1, 4))])
def test_hinge_equals_the_loops(seed, shape, use_hard_negatives, dtype, tolerance):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    positives = torch.rand(*shape, generator=generator) < 0.4
    positives[0, 0] = True
    loss = contrastive_hinge(scores, positives, 0.3, use_hard_negatives)
    expected = reference.contrastive_hinge(scores, positives, 0.3, use_hard_negatives)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("positives", "message"),
    [
        (torch.ones(3, 4) > 0, r"`positives` must have the shape of `scores`, \(3, 3\), got \(3, 4\)"),
        (torch.zeros(3, 3) > 0, r"`positives` has no positive pair. Check that `image_ids` and `caption_image_ids`"),
    ],
)
def test_bad_positives_are_named(positives, message):
    with pytest.raises(ValueError, match=message):
        contrastive_hinge(SCORES, positives, 0.2)


# --- Reconstruction, divergence, entropy ---


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize("seed", range(3))
def test_regularisers_equal_the_loops(draw_tokens, seed, dtype, tolerance):
    tokens = draw_tokens(seed, dtype=dtype)
    patches, mask, regions = tokens["patch_embeds"], tokens["patch_mask"], tokens["region_embeds"]
    affinity = tokens["patch_saliency"][..., None].expand(3, 6, 2)
    for loss, expected in (
        (reconstruction_loss(regions, patches, mask), reference.reconstruction_loss(regions, patches, mask)),
        (gaussian_kl(regions, regions.flip(0)), reference.gaussian_kl(regions, regions.flip(0))),
        (region_entropy(affinity, mask), reference.region_entropy(affinity, mask)),
        (saliency_budget(affinity[..., 0], mask, 0.3), reference.saliency_budget(affinity[..., 0], mask, 0.3)),
    ):
        assert loss.dtype == dtype
        torch.testing.assert_close(loss.double(), expected, rtol=0, atol=tolerance)


def test_reconstruction_by_hand():
    patches = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [7.0, 7.0]]])
    mask = torch.tensor([[True, True, False]])  # mean (2, 0)
    regions = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])  # squared distances 0 and 5
    assert reconstruction_loss(regions, patches, mask).item() == 2.5


def test_divergence_is_that_of_torch_and_0_for_a_normal_as_long_as_a_token():
    means, log_vars = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0)).double().unbind()
    expected = kl_divergence(Normal(means, (log_vars / 2).exp()), Normal(torch.zeros_like(means), 4**-0.5)).mean()
    torch.testing.assert_close(gaussian_kl(means, log_vars), expected)
    assert gaussian_kl(torch.zeros(1, 2, 4), torch.full((1, 2, 4), -math.log(4))).item() == 0


def test_entropy_by_hand():
    mask = torch.ones(1, 4) > 0
    assert region_entropy(torch.full((1, 4, 2), 1 / math.e), mask).item() == pytest.approx(1 / math.e)
    assert region_entropy(torch.tensor([[[0.0], [1.0], [0.5], [0.5]]]), mask).item() == pytest.approx(math.log(2) / 4)
    # Images count alike, however many patches they have.
    affinity = torch.tensor([[[0.5], [1.0]], [[1.0], [1.0]]])
    assert region_entropy(affinity, torch.tensor([[True, False], [True, True]])).item() == pytest.approx(math.log(2) / 4)


def test_budget_by_hand():
    saliency = torch.tensor([[1.0, 0.0, 0.9], [0.5, 0.5, 0.5]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert saliency_budget(saliency, mask, 0.5).item() == 0  # padding does not count
    assert saliency_budget(saliency, mask, 0.25).item() == 0.0625
    # Each image has the budget for itself: more in one does not pay for less in another.
    assert saliency_budget(torch.tensor([[1.0], [0.0]]), torch.ones(2, 1) > 0, 0.5).item() == 0.25


def test_entropy_has_a_finite_gradient_where_the_affinity_is_0(draw_tokens):
    """Its slope is infinite there, and a padded patch has affinity 0."""
    affinity = torch.tensor([[[0.0], [0.5], [0.25]]], requires_grad=True)
    region_entropy(affinity, torch.tensor([[False, True, True]])).backward()
    expected = [0, -(math.log(0.5) + 1) / 2, -(math.log(0.25) + 1) / 2]
    assert affinity.grad.flatten().tolist() == pytest.approx(expected)
    affinity.grad = None
    region_entropy(affinity, torch.ones(1, 3) > 0).backward()
    assert affinity.grad.isfinite().all()


@pytest.mark.parametrize("garbage", [float("nan"), 1e30])
def test_what_stands_under_the_mask_has_no_effect(draw_tokens, garbage):
    tokens = draw_tokens(4)
    mask, affinity = tokens["patch_mask"].clone(), tokens["patch_saliency"][..., None]
    mask[2] = False  # no patch at all
    results = []
    for patches, shares in (
        (tokens["patch_embeds"], affinity),
        (tokens["patch_embeds"].masked_fill(~mask[..., None], garbage), affinity.masked_fill(~mask[..., None], garbage)),
    ):
        patches, shares = patches.clone().requires_grad_(), shares.clone().requires_grad_()
        loss = reconstruction_loss(tokens["region_embeds"], patches, mask) + region_entropy(shares, mask)
        loss = loss + saliency_budget(shares[..., 0], mask, 0.5)
        loss.backward()
        assert not patches.grad[~mask].any() and not shares.grad[~mask].any()
        results.append([loss, patches.grad, shares.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_changes_nothing(draw_tokens):
    tokens = draw_tokens(5, dim=64, dtype=torch.float32)
    scores = tokens["patch_embeds"][:, 0] @ tokens["word_embeds"][:3, 0].T

    def losses():
        yield reconstruction_loss(tokens["region_embeds"], tokens["patch_embeds"], tokens["patch_mask"])
        yield gaussian_kl(tokens["region_embeds"], tokens["region_embeds"])
        yield region_entropy(tokens["patch_saliency"][..., None], tokens["patch_mask"])
        yield saliency_budget(tokens["patch_saliency"], tokens["patch_mask"], 0.5)
        yield contrastive_hinge(scores, EYE, 0.2)
        yield contrastive_hinge(scores, EYE, 0.2, use_hard_negatives=False)

    plain = list(losses())
    with torch.autocast("cpu", torch.bfloat16):
        cast = list(losses())
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(cast, plain, strict=True))


def test_gradcheck(draw_tokens):
    tokens = draw_tokens(6)
    scores = tokens["patch_saliency"][:, :3].clone().requires_grad_()
    for use_hard_negatives in (True, False):
        assert torch.autograd.gradcheck(lambda s, h=use_hard_negatives: contrastive_hinge(s, EYE, 0.5, h), scores)
    mask, regions = tokens["patch_mask"], tokens["region_embeds"].requires_grad_()
    patches, affinity = tokens["patch_embeds"].requires_grad_(), tokens["patch_saliency"][..., None].requires_grad_()
    assert torch.autograd.gradcheck(lambda u, v: reconstruction_loss(u, v, mask), (regions, patches))
    assert torch.autograd.gradcheck(gaussian_kl, (regions, regions.detach().flip(0).requires_grad_()))
    assert torch.autograd.gradcheck(lambda a: region_entropy(a, mask), affinity)
    assert torch.autograd.gradcheck(lambda a: saliency_budget(a[..., 0], mask, 0.5), affinity)
