"""The cost term of the code that runs now, found from the Python stack."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

# A part of a module's or parameter's name -> the term that counts it; the first match is used.
TERM_OF_NAME = {
    "embedding.": "embedding",
    "output_layer.": "head",
    "linear_qkv.": "qkv",
    "linear_query_up.": "query_up",
    "linear_lambda.": "difference",
    "linear_proj.": "projection",
    "linear_q_proj.": "query",
    "linear_q_down_proj.": "query_down",
    "linear_q_up_proj.": "query_up",
    "linear_kv_down_proj.": "key_value_down",
    "linear_kv_up_proj.": "key_value_up",
    "q_layernorm.": "latent_norms",
    "kv_layernorm.": "latent_norms",
    "simulation.heads.": "head_simulation",
    "simulation.features.": "feature_simulation",
    "modifiers.query_norm.": "qk_norm",
    "modifiers.key_norm.": "qk_norm",
    "modifiers.knocking.": "knocking_heads",
    "modifiers.output_norm.": "output_norm",
    "modifiers.output_gate.": "output_gate",
    "core_attention.": "attention",
    "mlp.": "mlp",
    "layernorm.": "norms",
}
# Functions that belong to a term, although they are called by a module without one.
TERM_OF_FUNCTION = {
    "simulate_heads": "head_simulation",
    "simulate_features": "feature_simulation",
    "combine_factors": "factor_products",
    "apply_rope": "rotary",
    "_apply_rotary_pos_emb_bshd": "rotary",
    "DifferentialSelfAttention.reduce_heads": "difference",
    "AttentionModifiers.normalize_query": "qk_norm",
    "AttentionModifiers.normalize_key": "qk_norm",
    "AttentionModifiers.knock_values": "knocking_heads",
    "AttentionModifiers.normalize_output": "output_norm",
    "AttentionModifiers.gate_output": "output_gate",
    "Attention._checkpointed_attention_forward": "attention",
    "SimulatedSelfAttention.project": "qkv",
    "TransformerLayer._forward_mlp": "mlp",
    "_bias_dropout_add_func": "residual",
    "get_bias_dropout.<locals>.bias_dropout": "residual",
    "TransformerBlock._checkpointed_forward": "layer_inputs",
    "checkpointed_forward": "layer_inputs",  # its name from megatron-core 0.19 on
    "LanguageModule.compute_language_model_loss": "head",
    "chunked_cross_entropy": "head",
    "blocked_cross_entropy": "head",
    "forward_step.<locals>.total_loss": "loss",
    "MegatronOptimizer.scale_loss": "loss",
}


def term_of_name(name: str) -> str:
    """Return the term of a module or parameter."""
    return next(term for part, term in TERM_OF_NAME.items() if part in f"{name}.")


class TermTracer:
    """Finds the term of the running code in a forward pass, by the innermost known frame of the stack."""

    def __init__(self, *chunks: Any) -> None:
        self._names = {id(module): name for chunk in chunks for name, module in chunk.named_modules()}

    def running_term(self) -> str | None:
        """Return the term; None in the backward pass, except during recomputation."""
        for frame in _frames():
            function = frame.f_code.co_qualname
            if function == "_engine_run_backward":
                return None
            if function in TERM_OF_FUNCTION:
                return TERM_OF_FUNCTION[function]
            name = self._names.get(id(frame.f_locals.get("self"))) if function.endswith(".forward") else None
            if name is not None and any(part in f"{name}." for part in TERM_OF_NAME):
                return term_of_name(name)
        raise AssertionError("no function on the stack belongs to a term")


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back
