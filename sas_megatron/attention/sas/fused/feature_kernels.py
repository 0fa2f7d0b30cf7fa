"""Triton kernels of the feature simulation with rotary embeddings.

    y = x·A1ᵀ + a1,  z = y + ReLU(y)·A2ᵀ + a2,  result = rotary embeddings applied to z

A row is one head of one token. A program keeps all weights in registers and shared memory, and loops over
tiles of rows. ReLU(y) stays in registers between the two matrix products.

The size of a tile is a power of two and E seldom is, so the features are in two tiles (192 = 128 + 64). In
the tiles and in memory they are in **pair order**: the features i and i + R/2, which rotary embeddings rotate
together, are neighbours, so that one thread has both. The attention scores do not depend on the order, since
it is the same for query and key.

    column of the tiles:   0  1      2  3        ...  R-2    R-1     R  R+1  ...
    feature:               0  R/2    1  R/2 + 1  ...  R/2-1  R-1     R  R+1  ...

The rope table, [S, R] in float32, contains the cosine and the sine of a pair in its two columns.

Letters: D features of x (NARROW), E features of y and z (WIDE), R rotary features (ROTARY), S positions. `i`,
`out` and `into` are indices of feature tiles; tile `i` starts at column i·MAIN.
"""

# Triton reads the annotations themselves, so they must not become strings.
import triton
import triton.language as tl

from sas_megatron.attention.sas.fused.tiles import (
    apply_rope,
    columns_of_tiles,
    expand_rows,
    load_expand,
    load_feature_bias,
    load_gradient,
    load_refine,
    load_rows,
    ones,
    product,
    store_partial_sum,
    store_rows,
)


@triton.jit
def feature_forward(
    heads,
    expand,
    expand_bias,
    refine,
    refine_bias,
    rope_table,
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
    """Compute z [rows, E] with rotary embeddings from heads [rows, D]."""
    DTYPE: tl.constexpr = heads.dtype.element_ty
    columns = columns_of_tiles(MAIN, REST)
    expand_tiles = load_expand(expand, columns, tl.arange(0, NARROW_TILE), NARROW, WIDE, ROTARY)
    refine_tiles = load_refine(refine, columns, WIDE, ROTARY)

    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        x = load_rows(heads, tile, num_rows, 0, NARROW_TILE, NARROW, ROWS)
        active = ()
        z = ()
        for i in tl.static_range(len(columns)):
            y = expand_rows(
                x, expand_tiles[i], expand_bias, columns[i], ROWS, WIDE, ROTARY, HAS_BIAS, COMPUTE
            )
            active = active + (tl.maximum(y, 0.0).to(DTYPE),)
            z_i = y + load_feature_bias(refine_bias, columns[i], ROWS, WIDE, ROTARY, HAS_BIAS)
            z_i = product(active[i], tl.trans(refine_tiles[i][i]), z_i, COMPUTE)
            z = z + (z_i,)
        # With the small tile first no registers spill (by the compiler's report, at the sizes of `Tiling`).
        for out in tl.static_range(len(columns) - 1, -1, -1):
            z_out = z[out]
            for into in tl.static_range(len(columns)):
                if into != out:
                    z_out = product(active[into], tl.trans(refine_tiles[out][into]), z_out, COMPUTE)
            z_out = apply_rope(
                z_out, rope_table, tile, num_rows, out * MAIN, ROTARY, ROWS, ROWS_PER_POSITION, False
            )
            store_rows(z_out, simulated, tile, num_rows, out * MAIN, WIDE, ROWS)


@triton.jit
def feature_backward(
    heads,
    expand,
    expand_bias,
    refine,
    rope_table,
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
    """Compute the gradients of the heads [rows, D] and of y [rows, E] from the gradient of z [rows, E].

    dy = dz + (dz·A2) where y > 0, and dx = dy·A1.
    """
    DTYPE: tl.constexpr = heads.dtype.element_ty
    columns = columns_of_tiles(MAIN, REST)
    expand_tiles = load_expand(expand, columns, tl.arange(0, NARROW_TILE), NARROW, WIDE, ROTARY)
    refine_tiles = load_refine(refine, columns, WIDE, ROTARY)

    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        x = load_rows(heads, tile, num_rows, 0, NARROW_TILE, NARROW, ROWS)
        dz = ()
        for i in tl.static_range(len(columns)):
            dz_i = load_gradient(
                gradient,
                rope_table,
                tile,
                num_rows,
                columns[i],
                i * MAIN,
                WIDE,
                ROTARY,
                ROWS,
                ROWS_PER_POSITION,
            )
            dz = dz + (dz_i,)
        dx = tl.zeros([ROWS, NARROW_TILE], tl.float32)
        for i in tl.static_range(len(columns)):
            d_active = tl.zeros([ROWS, columns[i].shape[0]], tl.float32)
            for out in tl.static_range(len(columns)):
                d_active = product(dz[out], refine_tiles[out][i], d_active, COMPUTE)
            y = expand_rows(
                x, expand_tiles[i], expand_bias, columns[i], ROWS, WIDE, ROTARY, HAS_BIAS, COMPUTE
            )
            dy = (dz[i].to(tl.float32) + tl.where(y > 0, d_active, 0.0)).to(DTYPE)
            store_rows(dy, expanded_gradient, tile, num_rows, i * MAIN, WIDE, ROWS)
            dx = product(dy, expand_tiles[i], dx, COMPUTE)
        store_rows(dx, head_gradient, tile, num_rows, 0, NARROW, ROWS)


@triton.jit
def expand_gradient(
    heads,
    expanded_gradient,
    expand_partials,
    expand_bias_partials,
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
    """Compute partial sums of the gradients of A1 and a1, dyᵀ·[x, 1], from the gradient of y.

    Each program stores one partial sum, over its tiles: [programs, E, D] and [programs, E].
    """
    columns = columns_of_tiles(MAIN, REST)
    narrow = tl.arange(0, NARROW_TILE)
    totals = ()
    bias_totals = ()
    for i in tl.static_range(len(columns)):
        totals = totals + (tl.zeros([columns[i].shape[0], NARROW_TILE], tl.float32),)
        bias_totals = bias_totals + (tl.zeros([columns[i].shape[0], 16], tl.float32),)

    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        x = load_rows(heads, tile, num_rows, 0, NARROW_TILE, NARROW, ROWS)
        updated = ()
        bias_updated = ()
        for i in tl.static_range(len(columns)):
            dy = load_rows(expanded_gradient, tile, num_rows, i * MAIN, columns[i].shape[0], WIDE, ROWS)
            updated = updated + (product(tl.trans(dy), x, totals[i], COMPUTE),)
            if HAS_BIAS:
                row_ones = ones(ROWS, heads.dtype.element_ty)
                bias_updated = bias_updated + (product(tl.trans(dy), row_ones, bias_totals[i], COMPUTE),)
        totals = updated
        if HAS_BIAS:
            bias_totals = bias_updated

    for i in tl.static_range(len(columns)):
        store_partial_sum(totals[i], expand_partials, columns[i], narrow, WIDE, NARROW, ROTARY, 0)
        if HAS_BIAS:
            # The 16 columns of the product with ones are equal; INTO = 1 stores the first one.
            one = tl.arange(0, 16)
            store_partial_sum(bias_totals[i], expand_bias_partials, columns[i], one, WIDE, 1, ROTARY, 0)


@triton.jit
def refine_gradient(
    heads,
    expand,
    expand_bias,
    rope_table,
    gradient,
    refine_partials,
    refine_bias_partials,
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
    """Compute partial sums of the gradients of A2 and a2, dzᵀ·[ReLU(y), 1], from the gradient of z.

    Each program stores one partial sum, over its tiles: [programs, E, E] and [programs, E].
    """
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
        # Rows beyond the last one have the ReLU of the bias, but a gradient of zero.
        active = ()
        dz = ()
        updated = ()
        bias_updated = ()
        for i in tl.static_range(len(columns)):
            y = expand_rows(
                x, expand_tiles[i], expand_bias, columns[i], ROWS, WIDE, ROTARY, HAS_BIAS, COMPUTE
            )
            active = active + (tl.maximum(y, 0.0).to(DTYPE),)
            dz_i = load_gradient(
                gradient,
                rope_table,
                tile,
                num_rows,
                columns[i],
                i * MAIN,
                WIDE,
                ROTARY,
                ROWS,
                ROWS_PER_POSITION,
            )
            dz = dz + (tl.trans(dz_i),)
            # Each product is computed as soon as both of its tiles are loaded. With one tile or two, this is
            # the order of `totals`.
            for out in tl.static_range(i + 1):
                for into in tl.static_range(i + 1):
                    if out == i or into == i:
                        total = totals[out * len(columns) + into]
                        updated = updated + (product(dz[out], active[into], total, COMPUTE),)
            if HAS_BIAS:
                bias_updated = bias_updated + (product(dz[i], ones(ROWS, DTYPE), bias_totals[i], COMPUTE),)
        totals = updated
        if HAS_BIAS:
            bias_totals = bias_updated

    for out in tl.static_range(len(columns)):
        for into in tl.static_range(len(columns)):
            total = totals[out * len(columns) + into]
            store_partial_sum(total, refine_partials, columns[out], columns[into], WIDE, WIDE, ROTARY, ROTARY)
        if HAS_BIAS:
            one = tl.arange(0, 16)
            store_partial_sum(bias_totals[out], refine_bias_partials, columns[out], one, WIDE, 1, ROTARY, 0)
