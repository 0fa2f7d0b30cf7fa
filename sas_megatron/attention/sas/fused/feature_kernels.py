"""Triton kernels of the feature simulation: z = y + ReLU(y)·A2ᵀ + a2, y = x·A1ᵀ + a1, and rotary positions.

A row is one head of one token. A program has all weights at hand and goes through tiles of rows; ReLU(y)
goes from the first product into the second without leaving registers.

E features are seldom a power of two, so they lie in two tiles that are (192 = 128 + 64). They are in
**pair order**, in the tiles and in memory: the two features that rotary positions turn together, i and
i + R/2, are neighbours, so that one thread has both. Scores do not notice, since query and key agree.

    column of the tiles:   0  1      2  3        ...  R-2    R-1     R  R+1  ...
    feature:               0  R/2    1  R/2 + 1  ...  R/2-1  R-1     R  R+1  ...

The table of turns, [S, R] in float32, has the cosine and the sine of a pair in its two columns.
"""

# Triton reads the annotations themselves, so they must not become strings.
import triton
import triton.language as tl

from sas_megatron.attention.sas.fused.feature_tiles import (
    columns_of_tiles,
    expanded,
    load_bias,
    load_expand,
    load_gradient,
    load_refine,
    load_rows,
    store_rows,
    store_sum,
    turned,
)
from sas_megatron.attention.sas.fused.products import ones, product


@triton.jit
def feature_forward(
    heads,
    expand,
    expand_bias,
    refine,
    refine_bias,
    turns,
    simulated,
    num_rows,
    NARROW: tl.constexpr,
    WIDE: tl.constexpr,
    ROTARY: tl.constexpr,
    ROWS_PER_POSITION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NARROW_TILE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """heads [rows, D] -> simulated [rows, E], turned by the angles of the rows' positions."""
    DTYPE: tl.constexpr = heads.dtype.element_ty
    columns = columns_of_tiles(MAIN, REST)
    expand_tiles = load_expand(expand, columns, tl.arange(0, NARROW_TILE), NARROW, WIDE, ROTARY)
    refine_tiles = load_refine(refine, columns, WIDE, ROTARY)

    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        x = load_rows(heads, tile, num_rows, 0, NARROW_TILE, NARROW, ROWS)
        active = ()
        z = ()
        for part in tl.static_range(len(columns)):
            y = expanded(
                x, expand_tiles[part], expand_bias, columns[part], ROWS, WIDE, ROTARY, HAS_BIAS, COMPUTE
            )
            active = active + (tl.maximum(y, 0.0).to(DTYPE),)
            z_part = y + load_bias(refine_bias, columns[part], ROWS, WIDE, ROTARY, HAS_BIAS)
            z_part = product(active[part], tl.trans(refine_tiles[part][part]), z_part, COMPUTE)
            z = z + (z_part,)
        # The small tile first: no registers spill then (by the compiler, at the sizes of `tiling`).
        for out in tl.static_range(len(columns) - 1, -1, -1):
            z_out = z[out]
            for into in tl.static_range(len(columns)):
                if into != out:
                    z_out = product(active[into], tl.trans(refine_tiles[out][into]), z_out, COMPUTE)
            z_out = turned(z_out, turns, tile, num_rows, out * MAIN, ROTARY, ROWS, ROWS_PER_POSITION, False)
            store_rows(z_out, simulated, tile, num_rows, out * MAIN, WIDE, ROWS)


@triton.jit
def feature_backward(
    heads,
    expand,
    expand_bias,
    refine,
    turns,
    gradient,
    head_gradient,
    expanded_gradient,
    num_rows,
    NARROW: tl.constexpr,
    WIDE: tl.constexpr,
    ROTARY: tl.constexpr,
    ROWS_PER_POSITION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NARROW_TILE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Gradient of z [rows, E] -> that of heads, [rows, D], and that of y, [rows, E]."""
    DTYPE: tl.constexpr = heads.dtype.element_ty
    columns = columns_of_tiles(MAIN, REST)
    expand_tiles = load_expand(expand, columns, tl.arange(0, NARROW_TILE), NARROW, WIDE, ROTARY)
    refine_tiles = load_refine(refine, columns, WIDE, ROTARY)

    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        x = load_rows(heads, tile, num_rows, 0, NARROW_TILE, NARROW, ROWS)
        dz = ()
        for part in tl.static_range(len(columns)):
            dz_part = load_gradient(
                gradient,
                turns,
                tile,
                num_rows,
                part * MAIN,
                columns[part].shape[0],
                WIDE,
                ROTARY,
                ROWS,
                ROWS_PER_POSITION,
            )
            dz = dz + (dz_part,)
        dx = tl.zeros([ROWS, NARROW_TILE], tl.float32)
        for part in tl.static_range(len(columns)):
            into_active = tl.zeros([ROWS, columns[part].shape[0]], tl.float32)
            for out in tl.static_range(len(columns)):
                into_active = product(dz[out], refine_tiles[out][part], into_active, COMPUTE)
            y = expanded(
                x, expand_tiles[part], expand_bias, columns[part], ROWS, WIDE, ROTARY, HAS_BIAS, COMPUTE
            )
            dy = (dz[part].to(tl.float32) + tl.where(y > 0, into_active, 0.0)).to(DTYPE)
            store_rows(dy, expanded_gradient, tile, num_rows, part * MAIN, WIDE, ROWS)
            dx = product(dy, expand_tiles[part], dx, COMPUTE)
        store_rows(dx, head_gradient, tile, num_rows, 0, NARROW, ROWS)


@triton.jit
def expand_gradient(
    heads,
    expanded_gradient,
    expand_parts,
    expand_bias_parts,
    num_rows,
    NARROW: tl.constexpr,
    WIDE: tl.constexpr,
    ROTARY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NARROW_TILE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Gradient of y -> those of A1 and a1, dyᵀ·[x, 1], as a sum a program: [programs, E, D] and
    [programs, E].
    """
    columns = columns_of_tiles(MAIN, REST)
    narrow = tl.arange(0, NARROW_TILE)
    totals = ()
    bias_totals = ()
    for part in tl.static_range(len(columns)):
        totals = totals + (tl.zeros([columns[part].shape[0], NARROW_TILE], tl.float32),)
        bias_totals = bias_totals + (tl.zeros([columns[part].shape[0], 16], tl.float32),)

    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        x = load_rows(heads, tile, num_rows, 0, NARROW_TILE, NARROW, ROWS)
        updated = ()
        bias_updated = ()
        for part in tl.static_range(len(columns)):
            dy = tl.trans(
                load_rows(expanded_gradient, tile, num_rows, part * MAIN, columns[part].shape[0], WIDE, ROWS)
            )
            updated = updated + (product(dy, x, totals[part], COMPUTE),)
            if HAS_BIAS:
                of_ones = ones(ROWS, heads.dtype.element_ty)
                bias_updated = bias_updated + (product(dy, of_ones, bias_totals[part], COMPUTE),)
        totals = updated
        if HAS_BIAS:
            bias_totals = bias_updated

    for part in tl.static_range(len(columns)):
        store_sum(totals[part], expand_parts, columns[part], narrow, WIDE, NARROW, ROTARY, 0)
        if HAS_BIAS:
            # Of the columns of the product with ones, which are equal, the first.
            one = tl.arange(0, 16)
            store_sum(bias_totals[part], expand_bias_parts, columns[part], one, WIDE, 1, ROTARY, 0)


@triton.jit
def refine_gradient(
    heads,
    expand,
    expand_bias,
    turns,
    gradient,
    refine_parts,
    refine_bias_parts,
    num_rows,
    NARROW: tl.constexpr,
    WIDE: tl.constexpr,
    ROTARY: tl.constexpr,
    ROWS_PER_POSITION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NARROW_TILE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Gradient of z -> those of A2 and a2, dzᵀ·[ReLU(y), 1], as a sum a program: [programs, E, E], …"""
    DTYPE: tl.constexpr = heads.dtype.element_ty
    columns = columns_of_tiles(MAIN, REST)
    expand_tiles = load_expand(expand, columns, tl.arange(0, NARROW_TILE), NARROW, WIDE, ROTARY)
    totals = ()
    bias_totals = ()
    for out in tl.static_range(len(columns)):
        for into in tl.static_range(len(columns)):
            totals = totals + (tl.zeros([columns[out].shape[0], columns[into].shape[0]], tl.float32),)
        bias_totals = bias_totals + (tl.zeros([columns[out].shape[0], 16], tl.float32),)

    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        x = load_rows(heads, tile, num_rows, 0, NARROW_TILE, NARROW, ROWS)
        # Rows that do not exist have no gradient, whatever their ReLU.
        active = ()
        dz = ()
        updated = ()
        bias_updated = ()
        for part in tl.static_range(len(columns)):
            y = expanded(
                x, expand_tiles[part], expand_bias, columns[part], ROWS, WIDE, ROTARY, HAS_BIAS, COMPUTE
            )
            active = active + (tl.maximum(y, 0.0).to(DTYPE),)
            dz_part = load_gradient(
                gradient,
                turns,
                tile,
                num_rows,
                part * MAIN,
                columns[part].shape[0],
                WIDE,
                ROTARY,
                ROWS,
                ROWS_PER_POSITION,
            )
            dz = dz + (tl.trans(dz_part),)
            # Each product once its tiles are there: of two tiles, that is the order of `totals`.
            for out in tl.static_range(part + 1):
                for into in tl.static_range(part + 1):
                    if out == part or into == part:
                        total = totals[out * len(columns) + into]
                        updated = updated + (product(dz[out], active[into], total, COMPUTE),)
            if HAS_BIAS:
                of_ones = ones(ROWS, DTYPE)
                bias_updated = bias_updated + (product(dz[part], of_ones, bias_totals[part], COMPUTE),)
        totals = updated
        if HAS_BIAS:
            bias_totals = bias_updated

    for out in tl.static_range(len(columns)):
        for into in tl.static_range(len(columns)):
            total = totals[out * len(columns) + into]
            store_sum(total, refine_parts, columns[out], columns[into], WIDE, WIDE, ROTARY, ROTARY)
        if HAS_BIAS:
            one = tl.arange(0, 16)
            store_sum(bias_totals[out], refine_bias_parts, columns[out], one, WIDE, 1, ROTARY, 0)
