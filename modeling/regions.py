"""Region mixture: prompts gather patches into K regions, each a Gaussian with its own uncertainty (GRM eq. 2-6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RegionMixture(nn.Module):
    """The M-step of a Gaussian mixture whose responsibilities are the affinities of patches to learned prompts.

    Args:
        dim: token width d. num_regions: K; `None`: no prompts, every patch is a region of its own, a masked one too (of
            mean 0).
        logit_scale: factor on the cosine of patch and prompt before the sigmoid (1 in the paper).
        has_variance: `False`: a region is its mean, always.
    """

    def __init__(self, dim: int, num_regions: int | None, logit_scale: float, has_variance: bool = True):
        super().__init__()
        self.logit_scale = logit_scale
        self.region_prompts = None if num_regions is None else nn.Parameter(torch.empty(num_regions, dim))
        self.hidden = nn.Linear(dim, dim) if has_variance else None
        self.log_var = nn.Linear(dim, dim) if has_variance else None

    def forward(self, patch_embeds: Tensor, patch_mask: Tensor) -> dict[str, Tensor]:
        """Groups patches into regions.

        Args:
            patch_embeds: (B, Lv, d) float32 or float64, unit-length patches times their saliency.
            patch_mask: (B, Lv) bool, True = real patch. An image without one has weights and means of 0.

        Returns:
            `region_affinity` (B, Lv, K) in [0, 1] (eq. 2), `region_assignment` (B, Lv, K), which sums to 1 over patches,
            `region_weights` (B, K), which sum to 1 (pi_k = N_k / sum_j N_j), `region_means` (B, K, d) (eq. 3),
            `region_log_vars` (B, K, d) (eq. 4; absent without variance) and `region_embeds` (B, K, d): a sample in training
            (eq. 5-6), the mean at inference, since sampling at test time would reward uncertain images.
        """
        patch_embeds = patch_embeds.masked_fill(~patch_mask[..., None], 0)
        with torch.autocast(patch_embeds.device.type, enabled=False):
            affinity = self._affinity(patch_embeds) * patch_mask[..., None]
            mass = affinity.sum(1)
            assignment = affinity / _without_zeros(mass)[:, None]
            means = torch.einsum("ivk,ivd->ikd", assignment, patch_embeds)
        regions = {
            "region_affinity": affinity,
            "region_assignment": assignment,
            "region_weights": mass / _without_zeros(mass.sum(1, keepdim=True)),
            "region_means": means,
            "region_embeds": means,
        }
        if self.hidden is not None and self.log_var is not None:
            scaled = (means * means.shape[-1] ** 0.5).to(self.hidden.weight.dtype)
            log_vars = self.log_var(nn.functional.gelu(self.hidden(scaled))).to(means.dtype)
            regions["region_log_vars"] = log_vars
            if self.training:
                regions["region_embeds"] = sample_regions(assignment, means, log_vars)
        return regions

    def _affinity(self, patch_embeds: Tensor) -> Tensor:
        """(B, Lv, d) -> (B, Lv, K) in [0, 1]."""
        if self.region_prompts is None:
            identity = torch.eye(patch_embeds.shape[1], dtype=patch_embeds.dtype, device=patch_embeds.device)
            return identity.expand(len(patch_embeds), -1, -1)
        prompts = nn.functional.normalize(self.region_prompts.to(patch_embeds.dtype), dim=-1)
        return torch.sigmoid(self.logit_scale * patch_embeds @ prompts.T)


def _without_zeros(denominator: Tensor) -> Tensor:
    """0 -> 1: a tiny floor would overflow in the gradient."""
    return denominator.masked_fill(denominator == 0, 1)


def sample_regions(region_assignment: Tensor, region_means: Tensor, region_log_vars: Tensor) -> Tensor:
    """One draw of u_k = sum_l a_lk (mu_k + sigma_k eps_lk), eps ~ N(0, I) (GRM eq. 5-6), from K x d noise values.

    Since a sums to 1 over patches, u_k ~ N(mu_k, sigma_k^2 sum_l a_lk^2): one draw a region has exactly the distribution
    of one draw for each patch and region.

    Args:
        region_assignment: (B, Lv, K). region_means, region_log_vars: (B, K, d).

    Returns:
        (B, K, d).
    """
    scale = torch.linalg.vector_norm(region_assignment, dim=1)[..., None]
    return region_means + scale * torch.exp(region_log_vars / 2) * torch.randn_like(region_means)
