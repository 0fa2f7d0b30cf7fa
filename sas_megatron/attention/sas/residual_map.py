"""What the two simulations of SAS share: an expanding map, and a refining one on a residual branch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sas_megatron.attention.sas.fused.residual_weights import ResidualMapWeights

DrawGenerator = Callable[[str], torch.Generator]


class ResidualMap(nn.Module, ABC):
    """The parameters of one simulation, replicated over the tensor group.

    It has no forward pass: the layer first makes the gradients of all its simulation weights sum
    over the tensor group, and hands the result to the functions `simulate_*`.
    """

    def __init__(
        self,
        expand_shape: Sequence[int],
        refine_shape: Sequence[int],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | int,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.expand = nn.Parameter(torch.empty(expand_shape, **options))
        self.refine = nn.Parameter(torch.empty(refine_shape, **options))
        self.expand_bias = nn.Parameter(torch.empty(expand_shape[0], **options)) if bias else None
        self.refine_bias = nn.Parameter(torch.empty(refine_shape[0], **options)) if bias else None

    @torch.no_grad()
    def initialize(self, scheme: str, std: float, generator: DrawGenerator) -> None:
        """Draws the weights, in float64 on the CPU, then casts.

        Args:
            scheme: `authors`, PyTorch's default for convolutions and linear maps, uniform ±1/√fan_in
                with the biases too; `normal`, N(0, std) with biases 0; `identity`, the layer starts
                as the base layer, biases 0.
            std: σ of `normal`.
            generator: Gives the generator for the name of a parameter of this module.
        """
        for name, parameter in self.named_parameters():
            matrix = self.expand if name.startswith("expand") else self.refine
            bound = 1 / math.sqrt(matrix[0].numel())
            drawn = torch.zeros(parameter.shape, dtype=torch.float64)
            if scheme == "authors":
                drawn.uniform_(-bound, bound, generator=generator(name))
            elif scheme == "normal" and parameter is matrix:
                drawn.normal_(0.0, std, generator=generator(name))
            elif scheme == "identity" and parameter is matrix:
                self.start_as_identity(name, drawn, bound, generator(name))
            parameter.copy_(drawn)

    @abstractmethod
    def start_as_identity(
        self, name: str, drawn: torch.Tensor, bound: float, generator: torch.Generator
    ) -> None:
        """Fills `drawn`, zeros in the shape of `expand` or `refine`, so that the layer is the base layer."""

    def weights(self) -> ResidualMapWeights:
        """The parameters as the `simulate_*` functions take them."""
        return ResidualMapWeights(self.expand, self.refine, self.expand_bias, self.refine_bias)
