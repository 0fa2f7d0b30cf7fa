"""The operator of simulated attention scores (SAS, arXiv 2507.07694) on one device. It imports torch only.

Query, key and value of every token have few heads, which a residual map expands to many. A second residual
map expands the features of query and key heads:

    base heads x [T, N, D]
      -> head simulation (query, key, value)     u = conv1(x), w = u + conv2(φ(u))             [T, M, D]
      -> feature simulation (query, key)         y = w·A1ᵀ + a1, z = y + φ(y)·A2ᵀ + a2         [T, M, E]
      -> rotary embeddings, then attention with M heads of E query/key and D value features (elsewhere)
      -> parameter-efficient attention aggregation (PEAA): the average over r blocks of heads  [.., N, D]

φ is ReLU in the paper.

The heads are the channels of the convolutions, which run along the features with k taps. M = r·N simulated
heads form r blocks: head g·N + n is the copy of base head n in block g. For keys and values, N is the number
of key/value heads. The paper writes H, H', D, D' for N, M, D, E.

Each map is a function of explicit weights, so that tensor-parallel ranks can pass weights whose gradients are
summed over ranks, and select the heads that they own. The modules hold the weights and their initialization.
Exported models include this file as it is (`sas-megatron checkpoint export`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

Draw = Callable[[str, str, float, torch.Tensor], None]
# φ by its name in a config. `gelu` is x·Φ(x), without an approximation.
ACTIVATIONS: dict[str, Callable[..., Any]] = {"relu": F.relu, "gelu": F.gelu, "none": lambda x: x}


class ResidualMapWeights(NamedTuple):
    """Weights of y = expand(x), z = y + refine(φ(y)).

    `expand` is [M, N, k] for heads and [E, D] for features, `refine` [M, M, k] and [E, E], and the biases are
    [M] and [E], or None.
    """

    expand: torch.Tensor
    refine: torch.Tensor
    expand_bias: torch.Tensor | None
    refine_bias: torch.Tensor | None


def simulate_heads(
    heads_TND: torch.Tensor,
    weights: ResidualMapWeights,
    *,
    activation: str = "relu",
    base_heads: slice | None = None,
) -> torch.Tensor:
    """Return the simulated heads of every token, [T, M, D].

    Args:
        heads_TND: All N base heads of T tokens.
        weights: Weights of the head simulation.
        activation: φ, a name in `ACTIVATIONS`.
        base_heads: Compute only the copies of these base heads in every block, [T, r·len(base_heads), D].
    """
    padding = weights.expand.shape[-1] // 2
    num_heads = heads_TND.shape[1]
    expanded = F.conv1d(heads_TND, weights.expand, weights.expand_bias, padding=padding)
    kept, refine, bias = expanded, weights.refine, weights.refine_bias
    if base_heads is not None and base_heads != slice(0, num_heads):
        kept = _select_copies(expanded, base_heads, num_heads, dim=1)
        refine = _select_copies(refine, base_heads, num_heads, dim=0)
        bias = None if bias is None else _select_copies(bias, base_heads, num_heads, dim=0)
    # The sum is in place, in the branch's output, which no backward pass needs; this saves a large tensor.
    activated = ACTIVATIONS[activation](expanded)
    return F.conv1d(activated, refine, bias, padding=padding).add_(kept)


def _select_copies(tensor: torch.Tensor, base_heads: slice, num_heads: int, *, dim: int) -> torch.Tensor:
    """Select the copies of `base_heads` on a block-major axis of heads; the result is block-major as well."""
    blocks: torch.Tensor = tensor.unflatten(dim, (-1, num_heads))
    return blocks.narrow(dim + 1, base_heads.start, base_heads.stop - base_heads.start).flatten(dim, dim + 1)


def simulate_features(
    heads_MD: torch.Tensor, weights: ResidualMapWeights, *, activation: str = "relu"
) -> torch.Tensor:
    """Return heads with simulated features: [..., D] -> [..., E]. Each head of each token is mapped alone."""
    # On rows, not on the tensor itself: for that, `linear` would return a view of its rows, and autograd
    # copies the gradient of an in-place addition to a view three times.
    expanded = F.linear(heads_MD.flatten(0, -2), weights.expand, weights.expand_bias)
    # In place, as in `simulate_heads`.
    activated = ACTIVATIONS[activation](expanded)
    simulated = F.linear(activated, weights.refine, weights.refine_bias).add_(expanded)
    return simulated.view(*heads_MD.shape[:-1], -1)


def aggregate_blocks(
    context_SBMD: torch.Tensor, num_blocks: int, *, aggregation: str = "mean"
) -> torch.Tensor:
    """Aggregate r blocks of heads (PEAA): [S, B, r·N, D] in block-major order -> [S, B, N, D].

    In the paper, each block passes through the output projection, and the results are averaged. Projection
    and average commute, so averaging first saves r - 1 of r projections. `rsqrt` divides the sum by √r.
    """
    if num_blocks == 1:
        return context_SBMD
    mean_SBND: torch.Tensor = context_SBMD.unflatten(2, (num_blocks, -1)).mean(dim=2)
    return mean_SBND * num_blocks**0.5 if aggregation == "rsqrt" else mean_SBND


class ResidualMap(nn.Module, ABC):
    """The weights of one simulation, and their initialization."""

    def __init__(
        self,
        expand_shape: Sequence[int],
        refine_shape: Sequence[int],
        *,
        bias: bool,
        activation: str = "relu",
        **options: Any,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.expand = nn.Parameter(torch.empty(expand_shape, **options))
        self.refine = nn.Parameter(torch.empty(refine_shape, **options))
        self.expand_bias = nn.Parameter(torch.empty(expand_shape[0], **options)) if bias else None
        self.refine_bias = nn.Parameter(torch.empty(refine_shape[0], **options)) if bias else None

    def weights(self) -> ResidualMapWeights:
        """Return the parameters in the form that the `simulate_*` functions accept."""
        return ResidualMapWeights(self.expand, self.refine, self.expand_bias, self.refine_bias)

    @torch.no_grad()
    def initialize(self, scheme: str, draw: Draw) -> None:
        """Compute the weights in float64 on the CPU, and cast them.

        Args:
            scheme: `authors`: PyTorch's default for convolutions and linear maps, uniform in ±1/√fan_in,
                biases included; `normal`: N(0, 1/fan_in), which preserves the variance, biases 0;
                `identity`: the layer starts as the base layer, biases 0.
            draw: Called with a parameter's name, `uniform` (in ±scale) or `normal`, scale, tensor to fill.
        """
        for name, parameter in self.named_parameters():
            matrix = self.expand if name.startswith("expand") else self.refine
            bound = 1 / math.sqrt(matrix[0].numel())
            drawn = torch.zeros(parameter.shape, dtype=torch.float64)
            if scheme == "authors":
                draw(name, "uniform", bound, drawn)
            elif scheme == "normal" and parameter is matrix:
                draw(name, "normal", bound, drawn)
            elif scheme == "identity" and parameter is matrix:
                self.draw_identity(name, drawn, bound, draw)
            parameter.copy_(drawn)

    @abstractmethod
    def draw_identity(self, name: str, drawn: torch.Tensor, bound: float, draw: Draw) -> None:
        """Fill `drawn`, zeros in the shape of `expand` or `refine`, such that the layer is the base layer."""


class HeadSimulation(ResidualMap):
    """Simulates r·N heads from N, with kernels of k taps."""

    def __init__(self, num_heads: int, *, expansion: int, kernel_size: int, **options: Any) -> None:
        simulated = num_heads * expansion
        refine_shape = (simulated, simulated, kernel_size)
        super().__init__((simulated, num_heads, kernel_size), refine_shape, **options)

    def forward(self, heads_TND: torch.Tensor, *, base_heads: slice | None = None) -> torch.Tensor:
        """Apply `simulate_heads` with this module's weights."""
        return simulate_heads(heads_TND, self.weights(), activation=self.activation, base_heads=base_heads)

    def draw_identity(self, name: str, drawn: torch.Tensor, bound: float, draw: Draw) -> None:
        """Make every block a copy of the base heads, with a refinement that cancels over the blocks.

        `expand` has centre tap 1 from base head n to head g·N + n. In `refine`, the input columns of block g
        are c_g·R, with R random and Σ c_g = 0. While the blocks are equal copies this adds nothing, but its
        gradients differ between the blocks. Zeros would keep the copies equal throughout training.
        """
        simulated, num_heads, kernel_size = self.expand.shape
        expansion = simulated // num_heads
        if name == "expand":
            drawn[:, :, kernel_size // 2] = torch.eye(num_heads).repeat(expansion, 1)
            return
        shared = drawn.new_empty(simulated, num_heads, kernel_size)
        draw(name, "uniform", bound, shared)
        for block in range(expansion):
            columns = slice(block * num_heads, (block + 1) * num_heads)
            drawn[:, columns] = (block - (expansion - 1) / 2) * shared


class FeatureSimulation(ResidualMap):
    """Simulates E features of a head from D; all heads of the query, or of the key, share the weights."""

    def __init__(
        self, head_dim: int, *, simulated_head_dim: int, random_extra_features: bool, **options: Any
    ) -> None:
        wide = simulated_head_dim
        super().__init__((wide, head_dim), (wide, wide), **options)
        self.random_extra_features = random_extra_features

    def forward(self, heads_MD: torch.Tensor) -> torch.Tensor:
        """Apply `simulate_features` with this module's weights."""
        return simulate_features(heads_MD, self.weights(), activation=self.activation)

    def draw_identity(self, name: str, drawn: torch.Tensor, bound: float, draw: Draw) -> None:
        """Pass on the D features, with E - D further features that add nothing to the scores.

        `refine` is 0 and `expand` is [I; extra rows]·(E/D)^¼. The factor, applied to queries and to keys,
        compensates for dividing the scores by √E instead of √D. The extra rows are random for the query and
        zero for the key; if both were zero, they would stay zero throughout training.
        """
        if name != "expand":
            return
        simulated_head_dim, head_dim = drawn.shape
        if self.random_extra_features:
            draw(name, "uniform", bound, drawn)
        drawn[:head_dim] = torch.eye(head_dim)
        drawn *= (simulated_head_dim / head_dim) ** 0.25


class SimulationShape(NamedTuple):
    """Sizes of a layer's simulation.

    Attributes:
        num_heads: Base heads of each head simulation, by `query`, `key` and `value`; others are repeated.
        expansion: r, simulated heads per base head.
        kernel_size: k, taps of the convolutions.
        head_dim: D, features of a base head.
        simulated_head_dim: E, features of a simulated query or key head; None for no feature simulation.
        bias: Whether the maps have biases.
        head_activation, feature_activation: φ of the simulations of heads, and of features.
    """

    num_heads: Mapping[str, int]
    expansion: int
    kernel_size: int
    head_dim: int
    simulated_head_dim: int | None
    bias: bool
    head_activation: str = "relu"
    feature_activation: str = "relu"


class Simulation(nn.Module):
    """All simulations of a layer: `heads` by `query`, `key`, `value`, and `features` by `query`, `key`."""

    def __init__(self, shape: SimulationShape, **options: Any) -> None:
        super().__init__()
        self.expansion = shape.expansion
        options["bias"] = shape.bias
        self.heads, self.features = nn.ModuleDict(), nn.ModuleDict()
        for name, num_heads in shape.num_heads.items():
            self.heads[name] = HeadSimulation(
                num_heads,
                expansion=shape.expansion,
                kernel_size=shape.kernel_size,
                activation=shape.head_activation,
                **options,
            )
        for name in ("query", "key") if shape.simulated_head_dim is not None else ():
            self.features[name] = FeatureSimulation(
                shape.head_dim,
                simulated_head_dim=shape.simulated_head_dim or shape.head_dim,
                random_extra_features=name == "query",
                activation=shape.feature_activation,
                **options,
            )

    def forward(self, name: str, heads_TND: torch.Tensor, *, base_heads: slice | None = None) -> torch.Tensor:
        """Simulate heads and features of the query, key or value: [T, N, D] -> [T, M, E or D].

        Args:
            name: `query`, `key` or `value`.
            heads_TND: All N base heads of T tokens.
            base_heads: Compute only the copies of these base heads.
        """
        if name in self.heads:
            simulated: torch.Tensor = self.heads[name](heads_TND, base_heads=base_heads)
        else:
            selected = heads_TND if base_heads is None else heads_TND[:, base_heads]
            simulated = selected.repeat(1, self.expansion, 1)
        return self.features[name](simulated) if name in self.features else simulated

    def weights(self) -> dict[str, ResidualMapWeights]:
        """Return the weights of all maps, by `heads.query`, `features.key` and so on."""
        return {
            name: module.weights() for name, module in self.named_modules() if isinstance(module, ResidualMap)
        }
