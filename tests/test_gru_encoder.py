"""The bidirectional GRU: exact states, whatever padding stands around the words; saved and loaded."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from reference import bidirectional_gru
from tiny import TEXT, tiny_model
from transformers import AutoConfig, AutoModel

from granalign_hf import GranAlignModel
from granalign_hf.modeling.gru_encoder import GRUEncoderConfig, GRUEncoderModel

LENGTHS = [5, 1, 7, 3]


def gru(dtype=torch.float64) -> GRUEncoderModel:
    torch.manual_seed(0)
    return GRUEncoderModel(GRUEncoderConfig(vocab_size=20, embedding_size=6, hidden_size=8)).to(dtype)


def captions() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of captions of ragged lengths, padded on the right with words."""
    ids = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(1))
    return ids, (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()


@torch.no_grad()
def test_states_are_those_of_the_equations():
    model, (ids, mask) = gru(), captions()
    hidden = model(ids, mask).last_hidden_state
    weights = dict(model.gru.named_parameters())
    assert hidden.shape == (4, 7, 8)
    for row, length in enumerate(LENGTHS):
        expected = bidirectional_gru(model.get_input_embeddings().weight[ids[row, :length]], weights)
        torch.testing.assert_close(hidden[row, :length], expected, atol=1e-12, rtol=0)
        assert not hidden[row, length:].any()


@pytest.mark.parametrize(
    "places",
    [[2, 3, 4, 5, 6], [0, 1, 2, 3, 4], [0, 2, 3, 6, 8], [4, 5, 6, 7, 8]],
    ids=["both sides", "right", "holes", "left"],
)
def test_padding_changes_no_word_wherever_it_stands(places):
    model = gru()
    words = torch.tensor([[3, 7, 7, 1, 12]])
    expected = model(words).last_hidden_state
    ids, mask = torch.randint(0, 20, (2, 9)), torch.zeros(2, 9, dtype=torch.long)
    ids[1, places], mask[1, places] = words[0], 1
    mask[0] = 1  # a longer caption beside it
    hidden = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(hidden[1:, places], expected, atol=1e-12, rtol=0)
    assert not hidden[1][mask[1] == 0].any()


def test_a_caption_without_a_word_is_zero():
    hidden = gru()(torch.tensor([[4, 5], [6, 7]]), torch.tensor([[1, 1], [0, 0]])).last_hidden_state
    assert hidden[0].all() and not hidden[1].any()


def test_gradients_reach_every_weight_and_no_padding():
    model = gru()
    ids, mask = torch.tensor([[3, 4, 9], [5, 9, 9]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    model(ids, mask).last_hidden_state.square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    assert model.word_embeddings.weight.grad.any(1).nonzero().flatten().tolist() == [3, 4, 5]


def test_weights_start_as_in_scan():
    model = GRUEncoderModel(GRUEncoderConfig(vocab_size=200))
    assert (model.word_embeddings.weight.shape, model.gru.hidden_size) == ((200, 300), 1024)
    assert 0.099 < model.word_embeddings.weight.abs().max() <= 0.1
    for parameter in model.gru.parameters():
        assert 0.9 / 32 < parameter.abs().max() <= 1 / 32


def test_auto_classes_save_and_load(tmp_path):
    model = gru(torch.float32)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).embedding_size == 6
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is GRUEncoderModel
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())
    expected = model(captions()[0]).last_hidden_state
    torch.testing.assert_close(loaded(captions()[0]).last_hidden_state, expected, atol=1e-6, rtol=0)
    vision = tiny_model().vision_model
    vision.save_pretrained(tmp_path / "vision")
    aligned = GranAlignModel.from_vision_text_pretrained(str(tmp_path / "vision"), str(tmp_path), attn_implementation="sdpa")
    assert torch.equal(aligned.text_model.gru.weight_hh_l0, model.gru.weight_hh_l0)


@pytest.mark.parametrize("name", ["vocab_size", "embedding_size", "hidden_size", "max_position_embeddings"])
def test_sizes_below_1_are_refused(name):
    with pytest.raises(StrictDataclassError, match=f"`{name}` must be at least 1, got 0"):
        GRUEncoderConfig(**{name: 0})


def test_word_masks_know_its_padding():
    config = tiny_model(text=TEXT["gru"]()).config
    assert (config.text_config.model_type, config.special_token_ids) == ("gru_encoder", [0])
