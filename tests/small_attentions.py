"""Small attentions of every kind, with four heads of six features."""

from __future__ import annotations

from typing import Any

Attention = dict[str, Any]

_FOUR_HEADS: Attention = {"num_heads": 4, "head_dim": 6}
_GROUPED: Attention = {**_FOUR_HEADS, "num_kv_heads": 2}
_LATENT: Attention = {"kind": "mla", **_FOUR_HEADS, "rotary_head_dim": 4, "kv_lora_rank": 9}

MHA: Attention = {"kind": "mha", **_FOUR_HEADS}
GQA: Attention = {"kind": "gqa", **_GROUPED}
MQA: Attention = {"kind": "mqa", **_FOUR_HEADS}
MLA: Attention = {**_LATENT, "query_lora_rank": 11}
MLA_UNCOMPRESSED_QUERIES: Attention = {**_LATENT, "query_lora_rank": None}
MFA: Attention = {"kind": "mfa", **_FOUR_HEADS, "query_rank": 7}
TPA: Attention = {"kind": "tpa", **_FOUR_HEADS}
TPA_UNFACTORED_QUERIES: Attention = {**TPA, "factorize_query": False}
DIFF: Attention = {"kind": "diff", **_FOUR_HEADS}
DIFF_GROUPED: Attention = {"kind": "diff", **_GROUPED}
SAS: Attention = {"kind": "sas", **_FOUR_HEADS}
SAS_GROUPED: Attention = {"kind": "sas", **_GROUPED}
# All modifiers, which every kind supports.
MODIFIERS: Attention = {
    "qk_norm": True,
    "knocking_heads": True,
    "output_norm": True,
    "output_gate": "elementwise",
}
