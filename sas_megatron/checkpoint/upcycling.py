"""Upcycle a multi-head or grouped-query model to SAS by adding the weights of an identity simulation.

With identity initialization every simulated head starts as its base head, so the logits do not change. The
weights of the simulation equal those with which a new run would be initialized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.checkpoint.tensor_files import NamedTensors
from sas_megatron.checkpoint.unsharded_weights import UnshardedModel
from sas_megatron.checkpoint.weights_source import (
    describe_architecture,
    raise_if_architectures_differ,
    raise_if_vocab_padding_differs,
)
from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig


def upcycle(base: UnshardedModel, config: RunConfig) -> UnshardedModel:
    """Add the simulation that `config` describes, initialized with `training.seed`, to a base model.

    Raises:
        FieldError: The base model is not mha, gqa or mqa, `config` is not SAS with identity initialization,
            or the two models differ in more than the simulation.
    """
    attention = config.attention
    if base.attention.kind not in ("mha", "gqa", "mqa"):
        raise FieldError(
            "attention.kind",
            base.attention.kind,
            f"is the attention of the weights in {base.origin}, but only mha, gqa and mqa can be upcycled",
            "name the weights of such a model",
        )
    if not isinstance(attention, SimulatedAttentionConfig):
        raise FieldError(
            "attention.kind", attention.kind, "must be sas to upcycle a model", "set attention.kind=sas"
        )
    if attention.initialization != "identity":
        raise FieldError(
            "attention.initialization",
            attention.initialization,
            "must be identity, so that the upcycled model computes the same as the base model",
            "set attention.initialization=identity",
        )
    base_architecture = describe_architecture(base.model, base.attention)
    expected = describe_architecture(config.model, attention)
    expected["attention"] = {name: expected["attention"][name] for name in base_architecture["attention"]}
    raise_if_architectures_differ(
        base_architecture, expected, ignored=frozenset({"attention.kind"}), origin=base.origin
    )
    raise_if_vocab_padding_differs(base.model, config.model, origin=base.origin)
    return dataclasses.replace(
        base, model=config.model, attention=attention, tensors=_add_simulation(base.tensors, config)
    )


def _add_simulation(tensors: NamedTensors, config: RunConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the base model, then the simulation of each layer."""
    dtype = torch.float32
    for name, tensor in tensors:
        # The dtype is at least float32, because in bfloat16 the rounding of (E/D)^¼ would change the scores.
        dtype = torch.promote_types(dtype, tensor.dtype)
        yield name, tensor
    for layer in range(config.model.num_layers):
        yield from _build_simulation(layer, config, dtype)


def _build_simulation(
    layer: int, config: RunConfig, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    # Imported here because they import Megatron-core, before which the device must be prepared.
    from sas_megatron.attention.sas.simulation_kernels import build_simulation
    from sas_megatron.model.initialization import initialize_simulation

    assert isinstance(config.attention, SimulatedAttentionConfig), "upcycle() checks the kind of attention"
    simulation = build_simulation(config.attention, dtype=dtype, device=torch.device("cpu"))
    prefix = f"decoder.layers.{layer}.self_attention.simulation"
    initialize_simulation(simulation, config, name_of=lambda name: f"{prefix}.{name}")
    for name, parameter in simulation.named_parameters():
        yield f"{prefix}.{name}", parameter.detach()
