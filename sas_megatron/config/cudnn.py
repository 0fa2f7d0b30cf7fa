"""The rules of `attention.backend=cudnn` that can be checked without a GPU.

They are those of torch 2.13 for training (`check_cudnn_tensor_shapes`, `check_cudnn_dropout`,
`check_cudnn_deterministic` and `check_cudnn_d256_bprop_head_dim` in ATen's transformers/cuda/sdp_utils.cpp).
Whether the GPU and the installed cuDNN meet them is checked by torch when a model is built
(`attention/core.py`).
"""

from __future__ import annotations

from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.training import TrainingConfig

WIDTH_MULTIPLE = 8
WIDTH_LIMIT = 128
# Widths of (queries and keys, values) above the limit -> the oldest version of cuDNN that supports them, on
# GPUs of compute capability 9.0 or 10.x.
WIDE_HEADS = {(192, 128): "9.11", (256, 256): "9.23"}
# Dropout probabilities are multiples of 1/16.
DROPOUT_STEPS = 16
AUTO = ("attention.backend=auto",)


def check_cudnn(attention: AttentionConfig, training: TrainingConfig) -> None:
    """Check that cuDNN's attention supports the fields of a run with `attention.backend=cudnn`.

    Raises:
        FieldError: It does not support one of them.
    """
    if attention.backend != "cudnn":
        return
    _check_widths(attention)
    if attention.dropout * DROPOUT_STEPS % 1:
        raise attention.problem(
            "backend",
            f"needs a multiple of 1/{DROPOUT_STEPS} as attention.dropout, which is {attention.dropout:g}",
            f"use auto, or attention.dropout={round(attention.dropout * DROPOUT_STEPS) / DROPOUT_STEPS:g}",
            AUTO,
        )
    if training.precision != "bfloat16":
        raise attention.problem(
            "backend",
            f"does not support training.precision={training.precision}",
            "use auto, or training.precision=bfloat16",
            AUTO,
        )
    if training.deterministic:
        raise attention.problem(
            "backend",
            "is not deterministic, and training.deterministic=true",
            "use auto, or training.deterministic=false",
            AUTO,
        )


def _check_widths(attention: AttentionConfig) -> None:
    widths = (attention.query_key_dim, attention.value_width)
    found = f"queries and keys have {widths[0]}, values {widths[1]}"
    if any(width % WIDTH_MULTIPLE for width in widths):
        raise attention.problem(
            "backend",
            f"needs multiples of {WIDTH_MULTIPLE} features, but {found}",
            f"use auto, or multiples of {WIDTH_MULTIPLE}",
            AUTO,
        )
    if max(widths) > WIDTH_LIMIT and widths not in WIDE_HEADS:
        wide = " or ".join(
            f"{keys} and {values} (cuDNN {version} or newer)"
            for (keys, values), version in WIDE_HEADS.items()
        )
        raise attention.problem(
            "backend",
            f"supports at most {WIDTH_LIMIT} features, or {wide}, but {found}",
            f"use auto, or at most {WIDTH_LIMIT} features",
            AUTO,
        )
