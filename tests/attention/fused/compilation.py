"""Compile the kernels for H100 and H200 without such a device, and print their resources as JSON.

usage: python -m tests.attention.fused.compilation NUM_HEADS HEAD_EXPANSION HEAD_DIM SIMULATED_HEAD_DIM \
         KERNEL_SIZE [KERNEL ...]
All kernels are compiled if none is named. TRITON_INTERPRET must not be set, since it disables compilation.
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
from sas_megatron.attention.sas.fused.features import Tile, Tiling
from sas_megatron.attention.sas.fused.heads import HeadColumns, HeadShard
from sas_megatron.attention.sas.simulated_attention import ResidualMapWeights
from sas_megatron.costs.kernel_tiles import taps_at_once

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    **dict.fromkeys(
        ("columns", "heads", "expand", "expand_bias", "refine", "refine_bias", "simulated", "gradient"),
        "*bf16",
    ),
    **dict.fromkeys(("column_gradient", "head_gradient", "expanded_gradient"), "*bf16"),
    **dict.fromkeys(
        ("expand_partials", "expand_bias_partials", "refine_partials", "refine_bias_partials"), "*fp32"
    ),
    "rope_table": "*fp32",
}


def compiled_kernels(
    attention: SimulatedAttentionConfig, names: Collection[str] = ()
) -> dict[str, dict[str, int]]:
    """Compile the named kernels, or all.

    Returns:
        For each kernel: shared memory, registers and stack of a thread, and number of matrix instructions.
    """
    tiling, base, many = Tiling(), attention.num_heads, attention.num_simulated_heads
    width, wide, taps = attention.head_dim, attention.query_key_dim, attention.kernel_size
    # Only shapes matter. On the meta device, operands keep their dtype instead of the interpreter's float32.
    like = torch.empty(1, 3 * base * width, dtype=torch.bfloat16, device="meta")
    maps = ResidualMapWeights(like.new_empty(many, base, taps), like.new_empty(many, many, taps), like, like)
    shard = HeadShard(HeadColumns(0, base, 1, 3 * width, width), maps, slice(0, base))
    linear = ResidualMapWeights(like.new_empty(wide, width), like.new_empty(wide, wide), like, like)
    launcher = features._Launcher(like.new_empty(8, many, width), linear, like.new_empty(4, wide))
    at_once = taps_at_once(taps, num_outputs=many, num_inputs=many)
    launches: dict[str, tuple[Any, Tile, dict[str, Any]]] = {
        name: (getattr(head_kernels, name), tile, {**heads._kernel_constants(shard, tile, like), "FIRST": 0})
        for name, tile in (("head_forward", tiling.head_forward), ("head_backward", tiling.head_backward))
    }
    constants = heads._kernel_constants(shard, tiling.head_refine_gradient, like)
    constants["TAPS_AT_ONCE"] = at_once
    launches["head_refine_gradient"] = (head_kernels.refine_gradient, tiling.head_refine_gradient, constants)
    for name, tile in (
        ("feature_forward", tiling.feature_forward),
        ("feature_backward", tiling.feature_backward),
        ("expand_gradient", tiling.feature_expand_gradient),
        ("refine_gradient", tiling.feature_refine_gradient),
    ):
        launches[name] = (getattr(feature_kernels, name), tile, {**launcher.constants, "ROWS": tile.rows})
    return {name: _compiled(*launches[name]) for name in names or launches}


def _compiled(kernel: Any, tile: Tile, constants: dict[str, Any]) -> dict[str, int]:
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = POINTERS.get(name, "i32")
        # Torch aligns allocations to 16 bytes and more; strides are multiples of at least 8 elements.
        attributes[(index,)] = [["tt.divisibility", 16]]
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
