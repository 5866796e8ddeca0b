"""What the model returns: features of images, features of captions, and their scores."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils import ModelOutput


class _MaskedOutput(ModelOutput):
    def to_tuple(self) -> tuple[Any, ...]:
        """The values, with masks as integers: Transformers subtracts such tuples to compare them, which booleans refuse."""
        return tuple(_tuple_element(value) for value in self.values())


def _tuple_element(value: Any) -> Any:
    if isinstance(value, ModelOutput):
        return value.to_tuple()
    return value.long() if isinstance(value, Tensor) and value.dtype == torch.bool else value


@dataclass
class GranAlignImageOutput(_MaskedOutput, BaseModelOutputWithPooling):
    r"""
    The encoder's own output (`last_hidden_state`, `hidden_states`, `attentions`) and the tokens that an aligner scores.
    `pooler_output` is the mean patch, for those who need one vector an image.

    patch_embeds (`torch.FloatTensor` of shape `(B, Lv, D)`):
        Projected patches of unit length, row by row over the grid (after prefix tokens, where those are used) [V].
    patch_mask (`torch.BoolTensor` of shape `(B, Lv)`):
        True = real patch.
    spatial_shapes (`torch.LongTensor` of shape `(B, 2)`):
        Rows and columns of the patch grid.
    patch_saliency (`torch.FloatTensor` of shape `(B, Lv)`, GRM):
        In [0, 1] [A_V].
    patch_logits (`torch.FloatTensor` of shape `(B, Lv, K)`, LAPS):
        How much each patch counts for each aggregated token, before the softmax over the patches that a caption keeps.
    region_affinity, region_assignment (`torch.FloatTensor` of shape `(B, Lv, K)`, GRM):
        In [0, 1]; the assignment sums to 1 over patches [A_r].
    region_weights (`torch.FloatTensor` of shape `(B, K)`, GRM):
        Mixing coefficients, they sum to 1 [pi].
    region_means, region_log_vars, region_embeds (`torch.FloatTensor` of shape `(B, K, D)`, GRM):
        Means, log-variances and samples of the regions; the samples equal the means at inference [mu, log sigma^2, U].
    """

    patch_embeds: Tensor | None = None
    patch_mask: Tensor | None = None
    spatial_shapes: Tensor | None = None
    patch_saliency: Tensor | None = None
    patch_logits: Tensor | None = None
    region_affinity: Tensor | None = None
    region_assignment: Tensor | None = None
    region_weights: Tensor | None = None
    region_means: Tensor | None = None
    region_log_vars: Tensor | None = None
    region_embeds: Tensor | None = None


@dataclass
class GranAlignTextOutput(_MaskedOutput, BaseModelOutputWithPooling):
    r"""
    The encoder's own output (`last_hidden_state`, `hidden_states`, `attentions`) and the tokens that an aligner scores.
    `pooler_output` is the mean word.

    word_embeds (`torch.FloatTensor` of shape `(C, Lt, D)`):
        Projected words of unit length [T].
    word_mask (`torch.BoolTensor` of shape `(C, Lt)`):
        True = takes part in the score.
    word_saliency (`torch.FloatTensor` of shape `(C, Lt)`, GRM):
        In [0, 1] [A_T].
    """

    word_embeds: Tensor | None = None
    word_mask: Tensor | None = None
    word_saliency: Tensor | None = None


@dataclass
class GranAlignOutput(_MaskedOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, *optional*, with `return_loss=True`):
        Weighted sum of `loss_terms`.
    logits_per_image (`torch.FloatTensor` of shape `(B, C)`):
        Score of every image with every caption [S], float32: in [-2, 2] for GRM, LAPS and max-mean, above 1 too for CHAN
        with logsumexp, in [-1, 1] for the others;
        times the `logit_scale` of a calibrated model, with which their softmax over candidates is a probability.
    logits_per_text (`torch.FloatTensor` of shape `(C, B)`):
        Its transpose.
    loss_terms (`dict[str, torch.FloatTensor]`, *optional*, with `return_loss=True`):
        Each term before its weight.
    vision_model_output, text_model_output ([`BaseModelOutput`]):
        What the encoders returned.

    The other fields are those of [`GranAlignImageOutput`] and [`GranAlignTextOutput`].
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    loss_terms: dict[str, Tensor] | None = None
    patch_embeds: Tensor | None = None
    word_embeds: Tensor | None = None
    patch_mask: Tensor | None = None
    word_mask: Tensor | None = None
    spatial_shapes: Tensor | None = None
    patch_saliency: Tensor | None = None
    word_saliency: Tensor | None = None
    patch_logits: Tensor | None = None
    region_affinity: Tensor | None = None
    region_assignment: Tensor | None = None
    region_weights: Tensor | None = None
    region_means: Tensor | None = None
    region_log_vars: Tensor | None = None
    region_embeds: Tensor | None = None
    vision_model_output: BaseModelOutput | None = None
    text_model_output: BaseModelOutput | None = None


def encoder_output(features: GranAlignImageOutput | GranAlignTextOutput) -> BaseModelOutput:
    """What the encoder returned, without the tokens that an aligner scores."""
    return BaseModelOutput(features.last_hidden_state, features.hidden_states, features.attentions)
