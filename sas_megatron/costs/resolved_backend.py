"""The core attention's back end in a run, from the config alone. No torch."""

from __future__ import annotations

from sas_megatron.attention.shared_heads import attended_heads
from sas_megatron.config.attention_backend import Backend, Device, runs_in_chunks
from sas_megatron.config.run import RunConfig


def resolve_backend(config: RunConfig, *, device: Device, sequence_length: int | None = None) -> Backend:
    """What `attention.backend` comes to on a device, at the config's sequence length or another.

    `config.attention_backend` has the rules.
    """
    attention, parallel = config.attention, config.parallel
    if attention.backend in ("unfused", "cudnn"):
        return attention.backend
    queries, keys = attended_heads(attention, tensor=parallel.tensor, context=parallel.context)
    in_chunks = attention.backend == "auto" and runs_in_chunks(
        device=device,
        causal=not config.data.reset_at_document_ends,
        dropout=attention.dropout,
        wide=config.training.precision == "float32",
        paired=queries == keys,
        length=sequence_length or config.data.sequence_length,
    )
    if in_chunks:
        return "chunked"
    return "composed" if attention.dropout > 0 and device == "cpu" else "fused"
