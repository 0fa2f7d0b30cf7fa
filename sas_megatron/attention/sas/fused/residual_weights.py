"""The weights of one residual map, as the functions that compute it take them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ResidualMapWeights(NamedTuple):
    """y = expand(x), z = y + refine(ReLU(y)); convolution weights [m, C, k] or linear ones [E, D]."""

    expand: torch.Tensor
    refine: torch.Tensor
    expand_bias: torch.Tensor | None
    refine_bias: torch.Tensor | None
