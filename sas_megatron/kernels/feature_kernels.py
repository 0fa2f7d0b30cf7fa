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

from sas_megatron.kernels.feature_tiles import (
    feature_of,
    load_bias,
    load_expand,
    load_refine,
    load_rows,
    store_refine,
    store_rows,
    store_sum,
    turned,
)
from sas_megatron.kernels.products import product


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
    narrow = tl.arange(0, NARROW_TILE)
    main = tl.arange(0, MAIN)
    expand_main = load_expand(expand, main, narrow, NARROW, WIDE, ROTARY)
    refine_main = load_refine(refine, main, main, WIDE, ROTARY)
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        expand_rest = load_expand(expand, rest, narrow, NARROW, WIDE, ROTARY)
        refine_main_rest = load_refine(refine, main, rest, WIDE, ROTARY)
        refine_rest_main = load_refine(refine, rest, main, WIDE, ROTARY)
        refine_rest = load_refine(refine, rest, rest, WIDE, ROTARY)

    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        x = load_rows(heads, tile, num_rows, 0, NARROW_TILE, NARROW, ROWS)
        y_main = load_bias(expand_bias, main, ROWS, MAIN, WIDE, ROTARY, HAS_BIAS)
        y_main = product(x, tl.trans(expand_main), y_main, COMPUTE)
        active_main = tl.maximum(y_main, 0.0).to(DTYPE)
        z_main = y_main + load_bias(refine_bias, main, ROWS, MAIN, WIDE, ROTARY, HAS_BIAS)
        z_main = product(active_main, tl.trans(refine_main), z_main, COMPUTE)
        if REST > 0:
            y_rest = load_bias(expand_bias, rest, ROWS, REST, WIDE, ROTARY, HAS_BIAS)
            y_rest = product(x, tl.trans(expand_rest), y_rest, COMPUTE)
            active_rest = tl.maximum(y_rest, 0.0).to(DTYPE)
            z_rest = y_rest + load_bias(refine_bias, rest, ROWS, REST, WIDE, ROTARY, HAS_BIAS)
            z_rest = product(active_rest, tl.trans(refine_rest), z_rest, COMPUTE)
            z_rest = product(active_main, tl.trans(refine_rest_main), z_rest, COMPUTE)
            z_main = product(active_rest, tl.trans(refine_main_rest), z_main, COMPUTE)
            z_rest = turned(z_rest, turns, tile, num_rows, MAIN, REST, ROTARY, ROWS, ROWS_PER_POSITION, False)
            store_rows(z_rest, simulated, tile, num_rows, MAIN, REST, WIDE, ROWS)
        z_main = turned(z_main, turns, tile, num_rows, 0, MAIN, ROTARY, ROWS, ROWS_PER_POSITION, False)
        store_rows(z_main, simulated, tile, num_rows, 0, MAIN, WIDE, ROWS)


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
    narrow = tl.arange(0, NARROW_TILE)
    main = tl.arange(0, MAIN)
    expand_main = load_expand(expand, main, narrow, NARROW, WIDE, ROTARY)
    refine_main = load_refine(refine, main, main, WIDE, ROTARY)
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        expand_rest = load_expand(expand, rest, narrow, NARROW, WIDE, ROTARY)
        refine_main_rest = load_refine(refine, main, rest, WIDE, ROTARY)
        refine_rest_main = load_refine(refine, rest, main, WIDE, ROTARY)
        refine_rest = load_refine(refine, rest, rest, WIDE, ROTARY)

    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        x = load_rows(heads, tile, num_rows, 0, NARROW_TILE, NARROW, ROWS)
        dz_main = load_rows(gradient, tile, num_rows, 0, MAIN, WIDE, ROWS).to(tl.float32)
        dz_main = turned(dz_main, turns, tile, num_rows, 0, MAIN, ROTARY, ROWS, ROWS_PER_POSITION, True).to(
            DTYPE
        )
        into_main = product(dz_main, refine_main, tl.zeros([ROWS, MAIN], tl.float32), COMPUTE)
        if REST > 0:
            dz_rest = load_rows(gradient, tile, num_rows, MAIN, REST, WIDE, ROWS).to(tl.float32)
            dz_rest = turned(
                dz_rest, turns, tile, num_rows, MAIN, REST, ROTARY, ROWS, ROWS_PER_POSITION, True
            ).to(DTYPE)
            into_main = product(dz_rest, refine_rest_main, into_main, COMPUTE)
        y_main = load_bias(expand_bias, main, ROWS, MAIN, WIDE, ROTARY, HAS_BIAS)
        y_main = product(x, tl.trans(expand_main), y_main, COMPUTE)
        dy_main = (dz_main.to(tl.float32) + tl.where(y_main > 0, into_main, 0.0)).to(DTYPE)
        store_rows(dy_main, expanded_gradient, tile, num_rows, 0, MAIN, WIDE, ROWS)
        dx = product(dy_main, expand_main, tl.zeros([ROWS, NARROW_TILE], tl.float32), COMPUTE)
        if REST > 0:
            into_rest = product(dz_main, refine_main_rest, tl.zeros([ROWS, REST], tl.float32), COMPUTE)
            into_rest = product(dz_rest, refine_rest, into_rest, COMPUTE)
            y_rest = load_bias(expand_bias, rest, ROWS, REST, WIDE, ROTARY, HAS_BIAS)
            y_rest = product(x, tl.trans(expand_rest), y_rest, COMPUTE)
            dy_rest = (dz_rest.to(tl.float32) + tl.where(y_rest > 0, into_rest, 0.0)).to(DTYPE)
            store_rows(dy_rest, expanded_gradient, tile, num_rows, MAIN, REST, WIDE, ROWS)
            dx = product(dy_rest, expand_rest, dx, COMPUTE)
        store_rows(dx, head_gradient, tile, num_rows, 0, NARROW_TILE, NARROW, ROWS)


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
    DTYPE: tl.constexpr = heads.dtype.element_ty
    narrow = tl.arange(0, NARROW_TILE)
    main = tl.arange(0, MAIN)
    ones = tl.full([ROWS, 16], 1.0, tl.float32).to(DTYPE)
    total_main = tl.zeros([MAIN, NARROW_TILE], tl.float32)
    bias_main = tl.zeros([MAIN, 16], tl.float32)
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        total_rest = tl.zeros([REST, NARROW_TILE], tl.float32)
        bias_rest = tl.zeros([REST, 16], tl.float32)

    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        x = load_rows(heads, tile, num_rows, 0, NARROW_TILE, NARROW, ROWS)
        dy_main = tl.trans(load_rows(expanded_gradient, tile, num_rows, 0, MAIN, WIDE, ROWS))
        total_main = product(dy_main, x, total_main, COMPUTE)
        if HAS_BIAS:
            bias_main = product(dy_main, ones, bias_main, COMPUTE)
        if REST > 0:
            dy_rest = tl.trans(load_rows(expanded_gradient, tile, num_rows, MAIN, REST, WIDE, ROWS))
            total_rest = product(dy_rest, x, total_rest, COMPUTE)
            if HAS_BIAS:
                bias_rest = product(dy_rest, ones, bias_rest, COMPUTE)

    part = expand_parts + tl.program_id(0).to(tl.int64) * (WIDE * NARROW)
    bias_part = expand_bias_parts + tl.program_id(0).to(tl.int64) * WIDE
    # Of the columns of the product with ones, which are equal, the first.
    one = tl.arange(0, 16)
    store_sum(total_main, part, feature_of(main, ROTARY), main < WIDE, narrow, NARROW)
    if HAS_BIAS:
        store_sum(bias_main, bias_part, feature_of(main, ROTARY), main < WIDE, one, 1)
    if REST > 0:
        store_sum(total_rest, part, feature_of(rest, ROTARY), rest < WIDE, narrow, NARROW)
        if HAS_BIAS:
            store_sum(bias_rest, bias_part, feature_of(rest, ROTARY), rest < WIDE, one, 1)


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
    narrow = tl.arange(0, NARROW_TILE)
    main = tl.arange(0, MAIN)
    ones = tl.full([ROWS, 16], 1.0, tl.float32).to(DTYPE)
    expand_main = load_expand(expand, main, narrow, NARROW, WIDE, ROTARY)
    total_main = tl.zeros([MAIN, MAIN], tl.float32)
    bias_main = tl.zeros([MAIN, 16], tl.float32)
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        expand_rest = load_expand(expand, rest, narrow, NARROW, WIDE, ROTARY)
        total_main_rest = tl.zeros([MAIN, REST], tl.float32)
        total_rest_main = tl.zeros([REST, MAIN], tl.float32)
        total_rest = tl.zeros([REST, REST], tl.float32)
        bias_rest = tl.zeros([REST, 16], tl.float32)

    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        x = load_rows(heads, tile, num_rows, 0, NARROW_TILE, NARROW, ROWS)
        # Rows that do not exist have no gradient, whatever their ReLU.
        y = load_bias(expand_bias, main, ROWS, MAIN, WIDE, ROTARY, HAS_BIAS)
        active_main = tl.maximum(product(x, tl.trans(expand_main), y, COMPUTE), 0.0).to(DTYPE)
        dz = load_rows(gradient, tile, num_rows, 0, MAIN, WIDE, ROWS).to(tl.float32)
        dz = turned(dz, turns, tile, num_rows, 0, MAIN, ROTARY, ROWS, ROWS_PER_POSITION, True)
        dz_main = tl.trans(dz.to(DTYPE))
        total_main = product(dz_main, active_main, total_main, COMPUTE)
        if HAS_BIAS:
            bias_main = product(dz_main, ones, bias_main, COMPUTE)
        if REST > 0:
            y = load_bias(expand_bias, rest, ROWS, REST, WIDE, ROTARY, HAS_BIAS)
            active_rest = tl.maximum(product(x, tl.trans(expand_rest), y, COMPUTE), 0.0).to(DTYPE)
            dz = load_rows(gradient, tile, num_rows, MAIN, REST, WIDE, ROWS).to(tl.float32)
            dz = turned(dz, turns, tile, num_rows, MAIN, REST, ROTARY, ROWS, ROWS_PER_POSITION, True)
            dz_rest = tl.trans(dz.to(DTYPE))
            total_main_rest = product(dz_main, active_rest, total_main_rest, COMPUTE)
            total_rest_main = product(dz_rest, active_main, total_rest_main, COMPUTE)
            total_rest = product(dz_rest, active_rest, total_rest, COMPUTE)
            if HAS_BIAS:
                bias_rest = product(dz_rest, ones, bias_rest, COMPUTE)

    part = refine_parts + tl.program_id(0).to(tl.int64) * (WIDE * WIDE)
    bias_part = refine_bias_parts + tl.program_id(0).to(tl.int64) * WIDE
    one = tl.arange(0, 16)
    store_refine(total_main, part, main, main, WIDE, ROTARY)
    if HAS_BIAS:
        store_sum(bias_main, bias_part, feature_of(main, ROTARY), main < WIDE, one, 1)
    if REST > 0:
        store_refine(total_main_rest, part, main, rest, WIDE, ROTARY)
        store_refine(total_rest_main, part, rest, main, WIDE, ROTARY)
        store_refine(total_rest, part, rest, rest, WIDE, ROTARY)
        if HAS_BIAS:
            store_sum(bias_rest, bias_part, feature_of(rest, ROTARY), rest < WIDE, one, 1)
