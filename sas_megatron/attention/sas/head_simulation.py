"""Head simulation: few heads become many, by a non-linear map with the heads as channels.

SAS (arXiv 2507.07694): u = conv1(x), w = u + conv2(ReLU(u)), both convolutions over the feature
axis of a token's heads. The paper's H and H' are C and m = r·C here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sas_megatron.attention.sas.fused.residual_weights import ResidualMapWeights
from sas_megatron.attention.sas.residual_map import ResidualMap


def simulate_heads(
    heads_TCD: torch.Tensor, weights: ResidualMapWeights, *, base_heads: slice | None = None
) -> torch.Tensor:
    """Simulated heads of every token.

    Args:
        heads_TCD: T tokens, all C base heads, D features.
        weights: expand [m, C, k], refine [m, m, k], biases [m] or None.
        base_heads: Compute only the simulated copies of these base heads, in every block.

    Returns:
        [T, r·C, D], or [T, r·len(base_heads), D]; head g·C + n is base head n of block g.
    """
    padding = weights.expand.shape[-1] // 2
    num_base = heads_TCD.shape[1]
    expanded = F.conv1d(heads_TCD, weights.expand, weights.expand_bias, padding=padding)
    kept, refine, bias = expanded, weights.refine, weights.refine_bias
    if base_heads is not None and base_heads != slice(0, num_base):
        kept = _of_base_heads(expanded, base_heads, num_base, dim=1)
        refine = _of_base_heads(refine, base_heads, num_base, dim=0)
        bias = None if bias is None else _of_base_heads(bias, base_heads, num_base, dim=0)
    # In place on the branch's output, which no backward pass needs: one large tensor less.
    return F.conv1d(F.relu(expanded), refine, bias, padding=padding).add_(kept)


def _of_base_heads(tensor: torch.Tensor, base_heads: slice, num_base: int, *, dim: int) -> torch.Tensor:
    """The part of a block-major head axis that belongs to `base_heads`, still block-major."""
    blocks: torch.Tensor = tensor.unflatten(dim, (-1, num_base))
    return blocks.narrow(dim + 1, base_heads.start, base_heads.stop - base_heads.start).flatten(dim, dim + 1)


class HeadSimulation(ResidualMap):
    """The weights of one head simulation: C base heads to r·C simulated ones, kernel width k."""

    def __init__(
        self,
        num_heads: int,
        *,
        expansion: int,
        kernel_size: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | int,
    ) -> None:
        simulated = num_heads * expansion
        self_shape = (simulated, simulated, kernel_size)
        super().__init__(
            (simulated, num_heads, kernel_size), self_shape, bias=bias, dtype=dtype, device=device
        )

    def start_as_identity(
        self, name: str, drawn: torch.Tensor, bound: float, generator: torch.Generator
    ) -> None:
        """Every block a copy of the base heads, with a refinement that cancels over the blocks.

        expand: centre tap 1 from base head n to head g·C + n. refine: the input columns of block g
        are c_g·R, with R random and Σ c_g = 0; while the blocks are equal copies this adds nothing,
        yet its gradients pull them apart. Zeros would keep the copies equal for ever.
        """
        simulated, num_heads, kernel_size = self.expand.shape
        expansion = simulated // num_heads
        if name == "expand":
            drawn[:, :, kernel_size // 2] = torch.eye(num_heads).repeat(expansion, 1)
            return
        shared = drawn.new_empty(simulated, num_heads, kernel_size).uniform_(
            -bound, bound, generator=generator
        )
        for block in range(expansion):
            columns = slice(block * num_heads, (block + 1) * num_heads)
            drawn[:, columns] = (block - (expansion - 1) / 2) * shared
