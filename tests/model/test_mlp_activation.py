"""The MLP computes the activation function that the config names, on every device and after export."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch

from sas_megatron.config.run import RunConfig
from tests.rank_pool import in_layout
from tests.run_configs import small_config


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x·Φ(x), with the normal distribution Φ (Hendrycks and Gimpel 2016, equation 1)."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The approximation in the text below equation 1 there."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp_outputs(config: RunConfig, cuda_is_available: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of the model's and of the exported MLP, with unit weights, for [-3, 3]."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    from sas_megatron.checkpoint.remote_code import modeling_sas_megatron
    from sas_megatron.model.assembly import RecomputableRowParallelLinear, build_transformer_config

    in_layout(config.parallel)
    # Only the choice of fused functions asks for the device.
    with mock.patch("torch.cuda.is_available", return_value=cuda_is_available):
        transformer = build_transformer_config(config, dtype=torch.float64)
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RecomputableRowParallelLinear)
    exported_config: Any = mock.Mock(
        activation=config.model.activation, linear_bias=True, intermediate_size=1, hidden_size=1
    )
    exported = modeling_sas_megatron.FeedForward(exported_config).double()
    mlp = MLP(transformer, submodules)
    for module in (mlp, exported):
        for name, parameter in module.named_parameters():
            torch.nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    hidden = torch.linspace(-3, 3, 61, dtype=torch.float64)[None, :, None]
    output, bias = mlp(hidden)
    return (output + bias).flatten().detach(), exported(hidden).flatten().detach()


@pytest.mark.parametrize("cuda_is_available", [False, True], ids=["CPU", "GPU"])
@pytest.mark.parametrize(
    ("activation", "definition"),
    [("gelu", gelu), ("gelu_tanh", gelu_tanh), ("swiglu", lambda x: x * torch.sigmoid(x) * x)],
    ids=["gelu", "gelu_tanh", "swiglu"],
)
def test_the_config_names_the_activation_function(
    ranks: Any, activation: str, definition: Any, cuda_is_available: bool
) -> None:
    model = {"hidden_size": 1, "ffn_hidden_size": 1, "activation": activation, "linear_bias": True}
    config = small_config(model=model)
    expected = definition(torch.linspace(-3, 3, 61, dtype=torch.float64))
    [(output, exported)] = ranks(1).run(mlp_outputs, config, cuda_is_available)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exported, expected, rtol=1e-12, atol=1e-12)
