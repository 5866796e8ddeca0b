"""The text encoder of SCAN, VSE++ and CHAN before BERT: word embeddings and a bidirectional GRU."""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs


@strict
class GRUEncoderConfig(PreTrainedConfig):
    r"""
    Configuration of a [`GRUEncoderModel`]. The defaults are the sizes of SCAN and CHAN.

    Args:
        vocab_size (`int`, defaults to 30522): number of words.
        embedding_size (`int`, defaults to 300): width of a word's embedding.
        hidden_size (`int`, defaults to 1024): width of the GRU in each direction, and of the tokens.
        pad_token_id (`int`, *optional*, defaults to 0): id of padding.
        max_position_embeddings (`int`, defaults to 512): longest caption in tokens. The GRU itself knows no bound.

    Raises:
        StrictDataclassError: a size below 1; the message names the field.
    """

    model_type = "gru_encoder"

    vocab_size: int = 30522
    embedding_size: int = 300
    hidden_size: int = 1024
    pad_token_id: int | None = 0
    max_position_embeddings: int = 512

    def validate_sizes(self):
        """Part of the `@strict` validation."""
        for name in ("vocab_size", "embedding_size", "hidden_size", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


class GRUEncoderModel(PreTrainedModel):
    """Word embeddings -> a GRU in each direction -> a token is the mean of the two states at its word.

    It cannot be exported (torch.export, ONNX): the GRU's steps follow the lengths of the captions.
    """

    config: GRUEncoderConfig
    input_modalities = ("text",)
    _input_embed_layer = "word_embeddings"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # it has no attention: any will do

    def __init__(self, config: GRUEncoderConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.gru = nn.GRU(config.embedding_size, config.hidden_size, batch_first=True, bidirectional=True)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """As in SCAN: small uniform embeddings, and for the GRU what torch itself draws."""
        if isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -0.1, 0.1)
        elif isinstance(module, nn.GRU):
            bound = 1 / math.sqrt(module.hidden_size)
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        else:
            super()._init_weights(module)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutput:
        r"""
        Args:
            input_ids: (C, Lt).
            attention_mask: (C, Lt), 1 = token, 0 = padding, wherever it stands. Default: all tokens.

        Returns:
            `BaseModelOutput` with `last_hidden_state` (C, Lt, hidden_size), zero at padding.
        """
        is_token = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        # The tokens of a caption, one after the other, whatever padding stood before or between them.
        places = is_token.logical_not().sort(dim=1, stable=True).indices
        words = self.word_embeddings(input_ids.gather(1, places))
        lengths = is_token.sum(1).clamp(min=1).cpu()  # a packed sequence is never empty
        packed, _ = self.gru(pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False))
        states, _ = pad_packed_sequence(packed, batch_first=True, total_length=input_ids.shape[1])
        tokens = states.unflatten(2, (2, self.config.hidden_size)).mean(2)
        in_place = torch.zeros_like(tokens).scatter(1, places[..., None].expand_as(tokens), tokens)
        return BaseModelOutput(last_hidden_state=in_place.masked_fill(~is_token[..., None], 0))


# Here and not in the package, so that a checkpoint that brings this file finds them where the package is not installed.
AutoConfig.register(GRUEncoderConfig.model_type, GRUEncoderConfig, exist_ok=True)
AutoModel.register(GRUEncoderConfig, GRUEncoderModel, exist_ok=True)

__all__ = ["GRUEncoderConfig", "GRUEncoderModel"]
