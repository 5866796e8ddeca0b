"""Region mixture: prompts gather patches into K regions, each a Gaussian with its own uncertainty (GRM eq. 2-6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RegionMixture(nn.Module):
    """The M-step of a Gaussian mixture whose responsibilities are the affinities of patches to learned prompts.

    Args:
        dim: token width d. num_regions: K. logit_scale: factor on the cosine of patch and prompt before the sigmoid
            (1 in the paper).
    """

    def __init__(self, dim: int, num_regions: int, logit_scale: float):
        super().__init__()
        self.logit_scale = logit_scale
        self.region_prompts = nn.Parameter(torch.empty(num_regions, dim))
        self.hidden = nn.Linear(dim, dim)
        self.log_var = nn.Linear(dim, dim)

    def forward(self, patch_embeds: Tensor, patch_mask: Tensor) -> dict[str, Tensor]:
        """Groups patches into regions.

        Args:
            patch_embeds: (B, Lv, d) float32, unit-length patches times their saliency.
            patch_mask: (B, Lv) bool, True = real patch.

        Returns:
            `region_affinity` (B, Lv, K) in [0, 1] (eq. 2), `region_assignment` (B, Lv, K), which sums to 1 over patches,
            `region_weights` (B, K), which sum to 1 (pi_k = N_k / sum_j N_j), `region_means` (B, K, d) (eq. 3),
            `region_log_vars` (B, K, d) (eq. 4) and `region_embeds` (B, K, d): a sample in training (eq. 5-6), the mean
            at inference, since sampling at test time would reward uncertain images.
        """
        prompts = nn.functional.normalize(self.region_prompts.float(), dim=-1)
        with torch.autocast(patch_embeds.device.type, enabled=False):
            affinity = torch.sigmoid(self.logit_scale * patch_embeds @ prompts.T) * patch_mask[..., None]
            mass = affinity.sum(1)
            assignment = affinity / mass.clamp(min=torch.finfo(mass.dtype).tiny)[:, None]
            means = torch.einsum("ivk,ivd->ikd", assignment, patch_embeds)
        scaled = (means * means.shape[-1] ** 0.5).to(self.hidden.weight.dtype)
        log_vars = self.log_var(nn.functional.gelu(self.hidden(scaled))).float()
        return {
            "region_affinity": affinity,
            "region_assignment": assignment,
            "region_weights": mass / mass.sum(1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny),
            "region_means": means,
            "region_log_vars": log_vars,
            "region_embeds": sample_regions(assignment, means, log_vars) if self.training else means,
        }


def sample_regions(region_assignment: Tensor, region_means: Tensor, region_log_vars: Tensor) -> Tensor:
    """One draw of u_k = sum_l a_lk (mu_k + sigma_k eps_lk), eps ~ N(0, I) (GRM eq. 5-6), from K x d noise values.

    Since a sums to 1 over patches, u_k ~ N(mu_k, sigma_k^2 sum_l a_lk^2): one draw a region has exactly the distribution
    of one draw for each patch and region.

    Args:
        region_assignment: (B, Lv, K). region_means, region_log_vars: (B, K, d).

    Returns:
        (B, K, d).
    """
    scale = region_assignment.square().sum(1).sqrt()[..., None]
    return region_means + scale * torch.exp(region_log_vars / 2) * torch.randn_like(region_means)
