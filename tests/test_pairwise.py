"""The walk over all pairs: what it computes, in tiles of what size, and what it leaves out."""

import pytest
import torch

from granalign_hf.modeling.pairwise import score_all_pairs
from granalign_hf.modeling.tiles import Tokens

LENGTHS = (5, 1, 9, 2, 9, 3, 4, 12)
WORD_MASK = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
NUM_IMAGES, NUM_PATCHES = 10, 7
SEVERAL_TILES = 8 * 2000  # bytes


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(NUM_IMAGES, NUM_PATCHES, 3, generator=generator, dtype=torch.float64)
    words = torch.randn(len(LENGTHS), 12, 3, generator=generator, dtype=torch.float64)
    return Tokens(patches.requires_grad_(), words.requires_grad_())


def counting_rule(sizes):
    """Scores by the mean of all products, and notes the number of products of every tile."""

    def rule(tile):
        sizes.append(tile.products.numel())
        return [tile.over_words(torch.sum, (tile.products * tile.word_weights[..., None] * tile.patch_weights).sum(2))]

    return rule


def mean_products(tokens):
    words = (tokens.word_embeds * WORD_MASK[..., None]).sum(1) / WORD_MASK.sum(1, keepdim=True)
    return tokens.patch_embeds.mean(1) @ words.T


@pytest.mark.parametrize("memory_budget", [8 * 12 * NUM_PATCHES, 8 * 500, 8 * 2000, 2**24])
def test_every_tile_stays_within_the_budget(tokens, memory_budget):
    """The least budget here is the longest caption with one image. Padding costs at most one word a caption."""
    sizes = []
    scores = score_all_pairs(counting_rule(sizes), tokens, WORD_MASK, None, memory_budget)
    torch.testing.assert_close(scores[0], mean_products(tokens), rtol=0, atol=1e-13)
    assert max(sizes) * 8 <= memory_budget
    assert sum(LENGTHS) <= sum(sizes) / (NUM_IMAGES * NUM_PATCHES) <= sum(LENGTHS) + len(LENGTHS)
    sizes.clear()
    scores.square().sum().backward()
    if memory_budget < 2**24:
        assert max(sizes) * 8 <= memory_budget
    else:
        assert not sizes  # all pairs fit in one tile, which autograd has kept


def test_backward_recomputes_only_pairs_with_a_gradient(tokens):
    sizes = []
    scores = score_all_pairs(counting_rule(sizes), tokens, WORD_MASK, None, SEVERAL_TILES)[0]
    pairs = [(0, 2), (7, 1), (7, 7)]
    sizes.clear()
    sum(scores[pair] for pair in pairs).backward()
    assert sizes == [NUM_PATCHES * 2 * max(LENGTHS[c] for _, c in pairs)]  # of each image: two captions, padded
    copy = Tokens(*(t.detach().requires_grad_() for t in tokens[:2]))
    sum(mean_products(copy)[pair] for pair in pairs).backward()
    torch.testing.assert_close(tokens.patch_embeds.grad, copy.patch_embeds.grad, rtol=0, atol=1e-13)
    torch.testing.assert_close(tokens.word_embeds.grad, copy.word_embeds.grad, rtol=0, atol=1e-13)


def test_backward_of_nothing_computes_nothing(tokens):
    sizes = []
    scores = score_all_pairs(counting_rule(sizes), tokens, WORD_MASK, None, SEVERAL_TILES)
    sizes.clear()
    (scores * 0).sum().backward()
    assert sizes == [] and not tokens.patch_embeds.grad.any() and not tokens.word_embeds.grad.any()


def test_a_second_derivative_is_refused(tokens):
    """The backward pass is written by hand: better an error than a wrong number."""
    scores = score_all_pairs(counting_rule([]), tokens, WORD_MASK, None, SEVERAL_TILES)
    (grad,) = torch.autograd.grad(scores.square().sum(), tokens.patch_embeds, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
