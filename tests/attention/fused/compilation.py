"""Compiles the kernels for H100 and H200 without one, and prints what they take, as JSON.

usage: python -m tests.attention.fused.compilation NUM_HEADS HEAD_EXPANSION HEAD_DIM SIMULATED_HEAD_DIM \
         KERNEL_SIZE [KERNEL ...]
Without names of kernels, all are compiled. Not under TRITON_INTERPRET=1, where nothing is compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.sas.fused import feature_kernels, features, head_kernels, heads
from sas_megatron.attention.sas.fused.head_parts import HeadColumns, HeadPart
from sas_megatron.attention.sas.fused.padding import taps_at_once
from sas_megatron.attention.sas.fused.tiling import Tile, Tiling
from sas_megatron.attention.sas.simulated_attention import ResidualMapWeights

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    **dict.fromkeys(
        ("columns", "heads", "expand", "expand_bias", "refine", "refine_bias", "simulated", "gradient"),
        "*bf16",
    ),
    **dict.fromkeys(("column_gradient", "head_gradient", "expanded_gradient"), "*bf16"),
    **dict.fromkeys(("expand_parts", "expand_bias_parts", "refine_parts", "refine_bias_parts"), "*fp32"),
    "turns": "*fp32",
}


def compiled_kernels(
    attention: SimulatedAttentionConfig, names: Collection[str] = ()
) -> dict[str, dict[str, int]]:
    """Compile the kernels named, or all.

    Returns:
        By kernel: shared memory, registers and stack of a thread, and the matrix instructions of a warp.
    """
    tiling, base, many = Tiling(), attention.num_heads, attention.num_simulated_heads
    width, wide, taps = attention.head_dim, attention.query_key_dim, attention.kernel_size
    # Shapes alone matter; on the meta device nothing is taken for the interpreter's.
    like = torch.empty(1, 3 * base * width, dtype=torch.bfloat16, device="meta")
    maps = ResidualMapWeights(like.new_empty(many, base, taps), like.new_empty(many, many, taps), like, like)
    part = HeadPart(HeadColumns(0, base, 1, 3 * width, width), maps, slice(0, base))
    linear = ResidualMapWeights(like.new_empty(wide, width), like.new_empty(wide, wide), like, like)
    rows = features._Rows(like.new_empty(8, many, width), linear, like.new_empty(4, wide))
    at_once = taps_at_once(taps, own=many, every=many)
    launches: dict[str, tuple[Any, Tile, dict[str, Any]]] = {
        name: (getattr(head_kernels, name), tile, {**heads._shape(part, tile, like), "FIRST": 0})
        for name, tile in (("head_forward", tiling.head_forward), ("head_backward", tiling.head_backward))
    }
    shape = {**heads._shape(part, tiling.head_refine_gradient, like), "TAPS_AT_ONCE": at_once}
    launches["head_refine_gradient"] = (head_kernels.refine_gradient, tiling.head_refine_gradient, shape)
    for name, tile in (
        ("feature_forward", tiling.feature_forward),
        ("feature_backward", tiling.feature_backward),
        ("expand_gradient", tiling.feature_expand_gradient),
        ("refine_gradient", tiling.feature_refine_gradient),
    ):
        launches[name] = (getattr(feature_kernels, name), tile, {**rows.shape, "ROWS": tile.rows})
    return {name: _compiled(*launches[name]) for name in names or launches}


def _compiled(kernel: Any, tile: Tile, constants: dict[str, Any]) -> dict[str, int]:
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = POINTERS.get(name, "i32")
        # As torch allocates, and as widths of at least 8 elements are.
        attributes[(place,)] = [["tt.divisibility", 16]]
    chosen = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=chosen, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=HOPPER, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (_cuobjdump(option, cubin.name) for option in ("-res-usage", "-sass"))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    return {
        "shared_memory_bytes": compiled.metadata.shared,
        "registers": registers,
        "stack_bytes": stack,
        "matrix_instructions": len(re.findall(r"\bHGMMA\.", code)),
    }


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, option, path], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


if __name__ == "__main__":
    names = ("num_heads", "head_expansion", "head_dim", "simulated_head_dim", "kernel_size")
    fields = dict(zip(names, map(int, sys.argv[1:6]), strict=True))
    print(json.dumps(compiled_kernels(SimulatedAttentionConfig(**fields), sys.argv[6:]), indent=2))
