"""From the width of an encoder to the shared token space, token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def make_projection(in_features: int, out_features: int, kind: str) -> nn.Module:
    """`"linear"`, or `"mlp"`: the linear map plus a correction by a [`ProjectionMLP`]."""
    return nn.Linear(in_features, out_features) if kind == "linear" else ProjectionMLP(in_features, out_features)


class ProjectionMLP(nn.Module):
    """W0 x + W2 GELU(W1 LayerNorm(x)), for encoders that are not trained along.

    Features of frozen encoders suit another task; VSE-infinity (Chen et al., CVPR 2021) adds a perceptron to the linear map
    of precomputed features in the same way.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.norm = nn.LayerNorm(in_features)
        self.hidden = nn.Linear(in_features, out_features)
        self.correction = nn.Linear(out_features, out_features)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self.linear(tokens) + self.correction(nn.functional.gelu(self.hidden(self.norm(tokens))))


def unit_length(tokens: Tensor) -> Tensor:
    """Tokens of length 1, at least float32: half precision is too coarse for maxima and rankings. Zero stays zero."""
    with torch.autocast(tokens.device.type, enabled=False):
        return nn.functional.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)
