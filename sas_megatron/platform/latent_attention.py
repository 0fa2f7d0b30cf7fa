"""Megatron-core's latent attention where TransformerEngine is absent."""

from __future__ import annotations


def admit_absent_transformer_engine() -> None:
    """Lets `MultiLatentAttention` be built without TransformerEngine; does nothing where that is present.

    0.16.1 takes it for present because its own wrappers can be imported, which are then made of mocks,
    and asks whether the output projection is an instance of one: a TypeError.
    """
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.HAVE_TE = transformer_engine.HAVE_TE
