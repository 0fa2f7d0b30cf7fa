"""Feature simulation: each query/key head of D features becomes one of E, by a small residual MLP.

SAS (arXiv 2507.07694): y = x·A1ᵀ + a1, z = y + ReLU(y)·A2ᵀ + a2. The paper's D and D' are D and E
here. It works on every head and token alone, so it needs no communication.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sas_megatron.attention.sas.fused.residual_weights import ResidualMapWeights
from sas_megatron.attention.sas.residual_map import ResidualMap


def simulate_features(heads_MD: torch.Tensor, weights: ResidualMapWeights) -> torch.Tensor:
    """[..., D] -> [..., E]; weights: expand [E, D], refine [E, E], biases [E] or None."""
    # On rows and not on the tensor as it is: linear would return a view of its rows, and the gradient of an
    # addition in place to a view is copied whole three times.
    expanded = F.linear(heads_MD.flatten(0, -2), weights.expand, weights.expand_bias)
    # In place on the branch's output, which no backward pass needs: one large tensor less.
    simulated = F.linear(F.relu(expanded), weights.refine, weights.refine_bias).add_(expanded)
    return simulated.view(*heads_MD.shape[:-1], -1)


class FeatureSimulation(ResidualMap):
    """The weights of one feature simulation, shared by all heads of the query, or of the key."""

    def __init__(
        self,
        head_dim: int,
        *,
        simulated_head_dim: int,
        bias: bool,
        random_extra_features: bool,
        dtype: torch.dtype,
        device: torch.device | int,
    ) -> None:
        wide = simulated_head_dim
        super().__init__((wide, head_dim), (wide, wide), bias=bias, dtype=dtype, device=device)
        self.random_extra_features = random_extra_features

    def start_as_identity(
        self, name: str, drawn: torch.Tensor, bound: float, generator: torch.Generator
    ) -> None:
        """The D features pass, the others add nothing to the scores.

        refine is 0, expand [I; extra rows]·(E/D)^¼. The factor, on both sides, makes up for dividing
        scores by √E in place of √D. The extra rows are random for one side and zero for the other:
        were both zero, they would stay so for ever.
        """
        if name != "expand":
            return
        simulated_head_dim, head_dim = drawn.shape
        if self.random_extra_features:
            drawn.uniform_(-bound, bound, generator=generator)
        drawn[:head_dim] = torch.eye(head_dim)
        drawn *= (simulated_head_dim / head_dim) ** 0.25
