"""Triton kernels of the head simulation: w = u + conv2(ReLU(u)), u = conv1(x), heads as channels.

A program keeps all weights in registers and shared memory, and loops over tiles of complete tokens. A row of
a tile is one feature of one token, and a column is one head. A tap of a convolution is then a matrix product
[rows, heads] · [heads, heads], whose rows are read at shifted features:

    x, k taps, loaded at shifted features  ->  u and ReLU(u), in registers  ->  w, transposed, stored

The second convolution needs ReLU(u) at shifted features as well, but registers cannot be shifted. The forward
kernel therefore computes u again for each tap, which is a quarter of its work at r = 3. The backward kernel
shifts its result instead, which has only the width of the base heads (`tl.gather`). The numbers of rows and
of heads are padded to powers of two, at least 16.

Letters: T tokens, N base heads (for key and value the number G of key/value heads), M = r·N simulated heads,
D features, k taps. A tensor-parallel rank computes the *local* simulated heads: the copies of its COUNT base
heads in each of the r blocks. Local head g·COUNT + i is simulated head g·N + FIRST + i.
"""

# Triton reads the annotations themselves, so they must not become strings.
import triton
import triton.language as tl

from sas_megatron.attention.sas.fused.tiles import (
    column_offsets,
    convolve,
    load_head_bias,
    load_heads,
    load_taps,
    local_head_index,
    ones,
    product,
    store_bias,
    store_taps,
    zero_taps,
)


@triton.jit
def head_forward(
    columns,
    expand,
    expand_bias,
    refine,
    refine_bias,
    simulated,
    num_tokens,
    token_stride,
    BASE: tl.constexpr,
    BLOCKS: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TAPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BASE_TILE: tl.constexpr,
    ALL_TILE: tl.constexpr,
    LOCAL_TILE: tl.constexpr,
    FEATURE_TILE: tl.constexpr,
    TOKEN_TILE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Compute the local simulated heads [T, r·COUNT, D], contiguous, from the projected columns."""
    ALL: tl.constexpr = BLOCKS * BASE
    LOCAL: tl.constexpr = BLOCKS * COUNT
    CENTRE: tl.constexpr = TAPS // 2
    base = tl.arange(0, BASE_TILE)
    base_mask = base < BASE
    offsets = column_offsets(base, PER_GROUP, GROUP_WIDTH, HEAD_DIM)
    inputs = (columns, offsets, base_mask, num_tokens, token_stride)
    all_heads = tl.arange(0, ALL_TILE)
    all_mask = all_heads < ALL
    local = tl.arange(0, LOCAL_TILE)
    local_mask = local < LOCAL
    local_head = local_head_index(local, BASE, FIRST, COUNT)

    expand_taps = load_taps(expand, all_heads, all_mask, base, base_mask, BASE, TAPS)
    refine_taps = load_taps(refine, local_head, local_mask, all_heads, all_mask, ALL, TAPS)
    first_bias = load_head_bias(expand_bias, all_heads, all_mask, HAS_BIAS)
    second_bias = load_head_bias(refine_bias, local_head, local_mask, HAS_BIAS)
    if COUNT != BASE:
        # The residual u of the local heads alone, with the bias of both convolutions.
        local_taps = load_taps(expand, local_head, local_mask, base, base_mask, BASE, TAPS)
        second_bias += load_head_bias(expand_bias, local_head, local_mask, HAS_BIAS)

    rows = tl.arange(0, TOKEN_TILE * FEATURE_TILE)
    feature = rows % FEATURE_TILE
    num_tiles = tl.cdiv(num_tokens, TOKEN_TILE)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        token = tile * TOKEN_TILE + rows // FEATURE_TILE
        if COUNT == BASE:
            total = tl.zeros([TOKEN_TILE * FEATURE_TILE, LOCAL_TILE], tl.float32) + second_bias[None, :]
        else:
            total = convolve(inputs, token, feature, local_taps, second_bias, HEAD_DIM, COMPUTE)
        for tap in tl.static_range(TAPS):
            shifted = feature + tap - CENTRE
            u = convolve(inputs, token, shifted, expand_taps, first_bias, HEAD_DIM, COMPUTE)
            if COUNT == BASE and tap == CENTRE:
                total += u
            # The second convolution pads ReLU(u) with zeros. Outside of the features, u would be the sum of
            # the first bias and the taps that still reach x.
            inside = (shifted >= 0) & (shifted < HEAD_DIM)
            active = tl.where(inside[:, None], tl.maximum(u, 0.0), 0.0)
            total = product(active.to(columns.dtype.element_ty), tl.trans(refine_taps[tap]), total, COMPUTE)
        out = (token.to(tl.int64) * (LOCAL * HEAD_DIM) + feature)[None, :] + local[:, None] * HEAD_DIM
        out_mask = local_mask[:, None] & ((token < num_tokens) & (feature < HEAD_DIM))[None, :]
        tl.store(simulated + out, tl.trans(total).to(simulated.dtype.element_ty), mask=out_mask)


@triton.jit
def head_backward(
    columns,
    expand,
    expand_bias,
    refine,
    gradient,
    column_gradient,
    expand_partials,
    expand_bias_partials,
    num_tokens,
    token_stride,
    gradient_token_stride,
    gradient_head_stride,
    BASE: tl.constexpr,
    BLOCKS: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TAPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BASE_TILE: tl.constexpr,
    ALL_TILE: tl.constexpr,
    LOCAL_TILE: tl.constexpr,
    FEATURE_TILE: tl.constexpr,
    TOKEN_TILE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Compute the gradient of the columns, and partial sums of the gradients of the first convolution.

    `gradient` belongs to the local simulated heads w. Each program stores one partial sum, over its tiles, of
    the gradients of weight and bias: [programs, M, N, k] and [programs, M].
    """
    ALL: tl.constexpr = BLOCKS * BASE
    LOCAL: tl.constexpr = BLOCKS * COUNT
    CENTRE: tl.constexpr = TAPS // 2
    ROWS: tl.constexpr = TOKEN_TILE * FEATURE_TILE
    DTYPE: tl.constexpr = columns.dtype.element_ty
    base = tl.arange(0, BASE_TILE)
    base_mask = base < BASE
    offsets = column_offsets(base, PER_GROUP, GROUP_WIDTH, HEAD_DIM)
    inputs = (columns, offsets, base_mask, num_tokens, token_stride)
    all_heads = tl.arange(0, ALL_TILE)
    all_mask = all_heads < ALL
    local = tl.arange(0, LOCAL_TILE)
    local_mask = local < LOCAL
    local_gradient = (gradient, local * gradient_head_stride, local_mask, num_tokens, gradient_token_stride)
    # The same gradient, as a tile of all simulated heads in which only the local heads exist.
    within = all_heads % BASE - FIRST
    is_local = all_mask & (within >= 0) & (within < COUNT)
    all_offsets = ((all_heads // BASE) * COUNT + within) * gradient_head_stride
    gradient_of_all = (gradient, all_offsets, is_local, num_tokens, gradient_token_stride)

    expand_taps = load_taps(expand, all_heads, all_mask, base, base_mask, BASE, TAPS)
    local_head = local_head_index(local, BASE, FIRST, COUNT)
    refine_taps = load_taps(refine, local_head, local_mask, all_heads, all_mask, ALL, TAPS)
    first_bias = load_head_bias(expand_bias, all_heads, all_mask, HAS_BIAS)
    expand_totals = zero_taps(ALL_TILE, BASE_TILE, TAPS)
    bias_total = tl.zeros([ALL_TILE, 16], tl.float32)

    rows = tl.arange(0, ROWS)
    feature = rows % FEATURE_TILE
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, TOKEN_TILE), tl.num_programs(0)):
        token = tile * TOKEN_TILE + rows // FEATURE_TILE
        row_mask = (token < num_tokens) & (feature < HEAD_DIM)
        u = convolve(inputs, token, feature, expand_taps, first_bias, HEAD_DIM, COMPUTE)

        # d ReLU(u)[d] = Σ_tap dw[d - (tap - centre)] · W2[tap], since ReLU(u)[d + tap - centre] enters w[d].
        d_active = tl.zeros([ROWS, ALL_TILE], tl.float32)
        for tap in tl.static_range(TAPS):
            shifted = feature - tap + CENTRE
            dw = load_heads(local_gradient, token, shifted, HEAD_DIM)
            d_active = product(tl.trans(dw), refine_taps[tap], d_active, COMPUTE)
            if tap == CENTRE:
                residual = dw
        if COUNT != BASE:
            # Only the local heads have a gradient on the residual path; for the other heads it is zero.
            residual = load_heads(gradient_of_all, token, feature, HEAD_DIM)
        # Rows beyond the tokens and the features have no gradient, although their u is the bias.
        positive = (u > 0) & row_mask[:, None]
        du = (tl.where(positive, d_active, 0.0) + tl.trans(residual).to(tl.float32)).to(DTYPE)
        if HAS_BIAS:
            bias_total = product(tl.trans(du), ones(ROWS, DTYPE), bias_total, COMPUTE)

        dx = tl.zeros([ROWS, BASE_TILE], tl.float32)
        updated = ()
        for tap in tl.static_range(TAPS):
            shifted = feature + tap - CENTRE
            x = load_heads(inputs, token, shifted, HEAD_DIM)
            updated = updated + (product(tl.trans(du), tl.trans(x), expand_totals[tap], COMPUTE),)
            # x[d + tap - centre] enters u[d], so row d of this product belongs to row d + tap - centre of dx.
            dx_tap = product(du, expand_taps[tap], tl.zeros([ROWS, BASE_TILE], tl.float32), COMPUTE)
            if tap != CENTRE:
                # Rows are clamped to the tile; the mask drops those whose source is in another token.
                source = tl.minimum(tl.maximum(rows - tap + CENTRE, 0), ROWS - 1)
                dx_tap = tl.gather(dx_tap, tl.broadcast_to(source[:, None], [ROWS, BASE_TILE]), axis=0)
                inside = (feature - tap + CENTRE >= 0) & (feature - tap + CENTRE < HEAD_DIM)
                dx_tap = tl.where(inside[:, None], dx_tap, 0.0)
            dx += dx_tap
        expand_totals = updated
        out = (token.to(tl.int64) * token_stride + feature)[None, :] + offsets[:, None]
        out_mask = base_mask[:, None] & row_mask[None, :]
        tl.store(column_gradient + out, tl.trans(dx).to(DTYPE), mask=out_mask)

    program = tl.program_id(0).to(tl.int64)
    partial = expand_partials + program * (ALL * BASE * TAPS)
    store_taps(expand_totals, partial, all_heads, all_mask, base, base_mask, BASE, TAPS)
    if HAS_BIAS:
        store_bias(bias_total, expand_bias_partials + program * ALL, all_heads, all_mask)


@triton.jit
def refine_gradient(
    columns,
    expand,
    expand_bias,
    gradient,
    refine_partials,
    refine_bias_partials,
    num_tokens,
    token_stride,
    gradient_token_stride,
    gradient_head_stride,
    BASE: tl.constexpr,
    BLOCKS: tl.constexpr,
    COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_AT_ONCE: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BASE_TILE: tl.constexpr,
    ALL_TILE: tl.constexpr,
    LOCAL_TILE: tl.constexpr,
    FEATURE_TILE: tl.constexpr,
    TOKEN_TILE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Compute partial sums of the gradients of the second convolution, for its local output heads.

    Each program stores one partial sum, over its tiles: [programs, r·COUNT, M, k] and [programs, r·COUNT].
    The kernel is separate from `head_backward`, since its sums fill the registers. With many heads a program
    accumulates only one tap (TAPS_AT_ONCE = 1), which the second axis of the grid selects.
    """
    ALL: tl.constexpr = BLOCKS * BASE
    LOCAL: tl.constexpr = BLOCKS * COUNT
    CENTRE: tl.constexpr = TAPS // 2
    ROWS: tl.constexpr = TOKEN_TILE * FEATURE_TILE
    DTYPE: tl.constexpr = columns.dtype.element_ty
    base = tl.arange(0, BASE_TILE)
    base_mask = base < BASE
    offsets = column_offsets(base, PER_GROUP, GROUP_WIDTH, HEAD_DIM)
    inputs = (columns, offsets, base_mask, num_tokens, token_stride)
    all_heads = tl.arange(0, ALL_TILE)
    all_mask = all_heads < ALL
    local = tl.arange(0, LOCAL_TILE)
    local_mask = local < LOCAL
    local_gradient = (gradient, local * gradient_head_stride, local_mask, num_tokens, gradient_token_stride)
    if TAPS_AT_ONCE == TAPS:
        first_tap = 0
    else:
        first_tap = tl.program_id(1) * TAPS_AT_ONCE

    expand_taps = load_taps(expand, all_heads, all_mask, base, base_mask, BASE, TAPS)
    first_bias = load_head_bias(expand_bias, all_heads, all_mask, HAS_BIAS)
    totals = zero_taps(LOCAL_TILE, ALL_TILE, TAPS_AT_ONCE)
    bias_total = tl.zeros([LOCAL_TILE, 16], tl.float32)

    rows = tl.arange(0, ROWS)
    feature = rows % FEATURE_TILE
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, TOKEN_TILE), tl.num_programs(0)):
        token = tile * TOKEN_TILE + rows // FEATURE_TILE
        row_mask = (token < num_tokens) & (feature < HEAD_DIM)
        u = convolve(inputs, token, feature, expand_taps, first_bias, HEAD_DIM, COMPUTE)
        active = tl.where(row_mask[:, None], tl.maximum(u, 0.0), 0.0).to(DTYPE)
        updated = ()
        for tap in tl.static_range(TAPS_AT_ONCE):
            shifted = feature - (first_tap + tap) + CENTRE
            dw = load_heads(local_gradient, token, shifted, HEAD_DIM)
            updated = updated + (product(dw, active, totals[tap], COMPUTE),)
            if HAS_BIAS:
                # The bias gradient sums dw at the unshifted tap; the other taps shift some features out.
                if tap == CENTRE % TAPS_AT_ONCE:
                    bias_total = product(dw, ones(ROWS, DTYPE), bias_total, COMPUTE)
        totals = updated

    program = tl.program_id(0).to(tl.int64)
    partial = refine_partials + program * (LOCAL * ALL * TAPS) + first_tap
    store_taps(totals, partial, local, local_mask, all_heads, all_mask, ALL, TAPS)
    if HAS_BIAS:
        if first_tap <= CENTRE and first_tap + TAPS_AT_ONCE > CENTRE:
            store_bias(bias_total, refine_bias_partials + program * LOCAL, local, local_mask)
