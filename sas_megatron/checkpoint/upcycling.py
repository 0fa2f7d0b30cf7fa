"""A multi-head or grouped-query model continued as SAS: its weights, and a simulation that starts as none.

Under identity initialization every simulated head starts as its base head, so the logits are the same; the
simulation's weights are those that the run would draw by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.checkpoint.architecture import check_equal, check_same_rows, describe_architecture
from sas_megatron.checkpoint.importing import UnshardedModel
from sas_megatron.checkpoint.tensor_files import NamedTensors
from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig


def upcycle(base: UnshardedModel, config: RunConfig) -> UnshardedModel:
    """The base model with the simulation that `config` describes and `training.seed` draws.

    Raises:
        FieldError: one of them is not of the kind for that, or they differ in more than the simulation.
    """
    attention = config.attention
    if base.attention.kind not in ("mha", "gqa", "mqa"):
        raise FieldError(
            "attention.kind",
            base.attention.kind,
            f"of the weights in {base.origin} has heads that SAS does not start from",
            "upcycle one of mha, gqa, mqa",
        )
    if not isinstance(attention, SimulatedAttentionConfig):
        raise FieldError(
            "attention.kind", attention.kind, "has no simulation to start as the base model", "set it to sas"
        )
    if attention.initialization != "identity":
        raise FieldError(
            "attention.initialization",
            attention.initialization,
            "would not start as the base model",
            "set attention.initialization=identity",
        )
    wanted = describe_architecture(config.model, attention)
    shared = describe_architecture(base.model, base.attention)["attention"].keys()
    wanted["attention"] = {name: wanted["attention"][name] for name in shared}
    check_equal(
        describe_architecture(base.model, base.attention),
        wanted,
        ignoring=frozenset({"attention.kind"}),
        origin=base.origin,
    )
    check_same_rows(base.model, config.model, origin=base.origin)
    return dataclasses.replace(
        base, model=config.model, attention=attention, tensors=_with_simulation(base.tensors, config)
    )


def _with_simulation(tensors: NamedTensors, config: RunConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The base's tensors, then each layer's simulation."""
    dtype = torch.float32
    for name, tensor in tensors:
        # At least float32: rounded to bfloat16, (E/D)^¼ would change the scores.
        dtype = torch.promote_types(dtype, tensor.dtype)
        yield name, tensor
    for layer in range(config.model.num_layers):
        yield from _simulation_of(layer, config, dtype)


def _simulation_of(layer: int, config: RunConfig, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    # Here, since it imports Megatron-core, before which the device has to be prepared.
    from sas_megatron.attention.sas.layer import build_simulation
    from sas_megatron.model.initialization import initialize_simulation

    assert isinstance(config.attention, SimulatedAttentionConfig)
    simulation = build_simulation(config.attention, dtype=dtype, device=torch.device("cpu"))
    prefix = f"decoder.layers.{layer}.self_attention.simulation"
    initialize_simulation(simulation, config, name_of=lambda own: f"{prefix}.{own}")
    for name, parameter in simulation.named_parameters():
        yield f"{prefix}.{name}", parameter.detach()
