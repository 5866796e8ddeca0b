"""How pairs are cut: each one once, within the size that is asked for."""

import pytest
import torch

from granalign_hf.modeling.layout import Layout, blocks, images_with_own_captions
from granalign_hf.modeling.tiles import Tokens

LENGTHS = torch.tensor([5, 1, 9, 2, 9, 3, 4, 12, 7, 7])
WORD_MASK = torch.arange(12) < LENGTHS[:, None]


@pytest.fixture(params=[0, 3], ids=["", "3 tokens of patches"])
def layout(request):
    logits = torch.zeros(20, 7, request.param) if request.param else None
    tokens = Tokens(torch.zeros(20, 7, 2), torch.zeros(len(LENGTHS), 12, 2), patch_logits=logits)
    return Layout.of(WORD_MASK, None, tokens)


@pytest.mark.parametrize("spread", [1, 4])
@pytest.mark.parametrize("max_words", [20, 50, 10**6])
def test_blocks_hold_every_caption_once_with_lengths_alike(layout, max_words, spread):
    captions = torch.tensor([0, 2, 3, 4, 6, 7, 9])
    found = []
    for block in blocks(layout, captions, max_words, spread):
        size = sum(len(group.captions) * (group.num_words + layout.extra_words) for group in block)
        assert size <= max_words
        for group in block:
            lengths = LENGTHS[group.captions]
            assert lengths.max() == group.num_words <= lengths.min() + spread
            found += group.captions.tolist()
    assert sorted(found) == captions.tolist()


@pytest.mark.parametrize("columns", [16, 40, 200, 10**6])
def test_every_pair_with_a_gradient_is_met_once(layout, columns):
    """Images of 0 to 8 captions; what fills up has no gradient there, and is a caption that another image needs."""
    generator = torch.Generator().manual_seed(0)
    has_grad = torch.rand(20, len(LENGTHS), generator=generator) < torch.linspace(0, 0.8, 20)[:, None]
    has_grad[:, 1] = False
    met = torch.zeros_like(has_grad, dtype=torch.long)
    for images, captions in images_with_own_captions(layout, has_grad, columns):
        assert captions.shape[0] == len(images) and captions.numel() * (LENGTHS.max() + layout.extra_words) <= columns
        for image, own in zip(images.tolist(), captions.tolist(), strict=True):
            assert len(set(own)) == len(own) and 1 not in own
            met[image, own] += 1
    assert (met[has_grad] == 1).all() and (met <= 1).all()
    assert not met[~has_grad.any(1)].any()
