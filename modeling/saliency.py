"""Saliency adapter: which tokens of one modality matter, judged without looking at the other (GRM eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SaliencyAdapter(nn.Module):
    """A = GumbelSoftmax(W2 GELU(W1 V), tau)[:, 1], one instance for patches and one for words.

    A softmax over two logits with Gumbel noise is a sigmoid of their difference with logistic noise; that is what is
    computed. Noise is drawn in training only: the same tokens always get the same saliency at inference.

    Args:
        dim: token width. temperature: tau > 0; smaller values push the saliency towards 0 and 1.
    """

    def __init__(self, dim: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.hidden = nn.Linear(dim, dim)
        self.decision = nn.Linear(dim, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, L, dim) unit-length tokens -> (n, L) saliency in [0, 1], in at least float32.

        Tokens are scaled to unit variance first, so that the first layer works at the scale it is initialised for.
        """
        tokens = (tokens * tokens.shape[-1] ** 0.5).to(self.hidden.weight.dtype)
        logits = self.decision(nn.functional.gelu(self.hidden(tokens)))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        difference = logits[..., 1] - logits[..., 0]
        if self.training:
            uniform = torch.rand_like(difference).clamp(1e-6, 1 - 1e-6)
            difference = difference + torch.logit(uniform)
        return torch.sigmoid(difference / self.temperature)
