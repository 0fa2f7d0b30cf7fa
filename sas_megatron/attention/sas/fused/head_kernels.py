"""Triton kernels of the head simulation: w = u + conv2(ReLU(u)), u = conv1(x), heads as channels.

A program has all weights at hand and goes through tiles of whole tokens. A row of a tile is one feature
of one token, a column one head, so that a convolution's tap is a product [rows, heads] · [heads, heads]
with the rows' features shifted:

    x, k taps, from memory at shifted features  ->  u, ReLU, in registers  ->  w, transposed into memory

The second convolution needs ReLU(u) at shifted features too. Registers cannot be shifted, so the forward
kernel computes u once for each tap, a quarter of the work at r = 3. The backward kernel shifts its result,
of the width of the base heads. Rows and heads are padded to powers of two, 16 at least.

Letters: T tokens, C base heads, m = r·C simulated heads, of which the own ones are computed, D features,
k taps. An own head is head `first + i` of some block of C, for 0 ≤ i < `count`.
"""

# Triton reads the annotations themselves, so they must not become strings.
import triton
import triton.language as tl

from sas_megatron.attention.sas.fused.head_tiles import (
    column_places,
    convolved,
    load_bias,
    load_heads,
    load_taps,
    no_taps,
    own_heads,
    store_bias,
    store_taps,
)
from sas_megatron.attention.sas.fused.products import ones, product


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
    FEATURES: tl.constexpr,
    TAPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BASE_TILE: tl.constexpr,
    ALL_TILE: tl.constexpr,
    OWN_TILE: tl.constexpr,
    FEATURE_TILE: tl.constexpr,
    TOKEN_TILE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """columns -> simulated [T, own heads, D], contiguous."""
    ALL: tl.constexpr = BLOCKS * BASE
    OWN: tl.constexpr = BLOCKS * COUNT
    CENTRE: tl.constexpr = TAPS // 2
    base = tl.arange(0, BASE_TILE)
    base_exists = base < BASE
    places = column_places(base, PER_GROUP, GROUP_WIDTH, FEATURES)
    every = tl.arange(0, ALL_TILE)
    every_exists = every < ALL
    own = tl.arange(0, OWN_TILE)
    own_exists = own < OWN
    own_head = own_heads(own, BASE, FIRST, COUNT)

    expand_taps = load_taps(expand, every, every_exists, base, base_exists, BASE, TAPS)
    refine_taps = load_taps(refine, own_head, own_exists, every, every_exists, ALL, TAPS)
    first_bias = load_bias(expand_bias, every, every_exists, HAS_BIAS)
    second_bias = load_bias(refine_bias, own_head, own_exists, HAS_BIAS)
    if COUNT != BASE:
        own_taps = load_taps(expand, own_head, own_exists, base, base_exists, BASE, TAPS)
        second_bias += load_bias(expand_bias, own_head, own_exists, HAS_BIAS)

    rows = tl.arange(0, TOKEN_TILE * FEATURE_TILE)
    feature = rows % FEATURE_TILE
    num_tiles = tl.cdiv(num_tokens, TOKEN_TILE)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        token = tile * TOKEN_TILE + rows // FEATURE_TILE
        if COUNT == BASE:
            total = tl.zeros([TOKEN_TILE * FEATURE_TILE, OWN_TILE], tl.float32) + second_bias[None, :]
        else:
            total = convolved(
                columns,
                places,
                base_exists,
                token,
                feature,
                num_tokens,
                token_stride,
                own_taps,
                second_bias,
                FEATURES,
                COMPUTE,
            )
        for shift in tl.static_range(TAPS):
            shifted = feature + shift - CENTRE
            expanded = convolved(
                columns,
                places,
                base_exists,
                token,
                shifted,
                num_tokens,
                token_stride,
                expand_taps,
                first_bias,
                FEATURES,
                COMPUTE,
            )
            if COUNT == BASE and shift == CENTRE:
                total += expanded
            # The second convolution pads with zeros, where the first would have its bias.
            inside = (shifted >= 0) & (shifted < FEATURES)
            active = tl.where(inside[:, None], tl.maximum(expanded, 0.0), 0.0)
            total = product(active.to(columns.dtype.element_ty), tl.trans(refine_taps[shift]), total, COMPUTE)
        out = (token.to(tl.int64) * (OWN * FEATURES) + feature)[None, :] + own[:, None] * FEATURES
        kept = own_exists[:, None] & ((token < num_tokens) & (feature < FEATURES))[None, :]
        tl.store(simulated + out, tl.trans(total).to(simulated.dtype.element_ty), mask=kept)


@triton.jit
def head_backward(
    columns,
    expand,
    expand_bias,
    refine,
    gradient,
    column_gradient,
    expand_parts,
    expand_bias_parts,
    num_tokens,
    token_stride,
    gradient_token_stride,
    gradient_head_stride,
    BASE: tl.constexpr,
    BLOCKS: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    FEATURES: tl.constexpr,
    TAPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BASE_TILE: tl.constexpr,
    ALL_TILE: tl.constexpr,
    OWN_TILE: tl.constexpr,
    FEATURE_TILE: tl.constexpr,
    TOKEN_TILE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Gradient of the own simulated heads -> that of the columns; those of the first convolution's weights
    as a sum a program: [programs, m, C, k] and [programs, m].
    """
    ALL: tl.constexpr = BLOCKS * BASE
    OWN: tl.constexpr = BLOCKS * COUNT
    CENTRE: tl.constexpr = TAPS // 2
    ROWS: tl.constexpr = TOKEN_TILE * FEATURE_TILE
    DTYPE: tl.constexpr = columns.dtype.element_ty
    base = tl.arange(0, BASE_TILE)
    base_exists = base < BASE
    places = column_places(base, PER_GROUP, GROUP_WIDTH, FEATURES)
    every = tl.arange(0, ALL_TILE)
    every_exists = every < ALL
    own = tl.arange(0, OWN_TILE)
    own_exists = own < OWN
    own_places = own * gradient_head_stride
    # Of every simulated head: whether it is an own one, and which.
    within = every % BASE - FIRST
    every_is_own = every_exists & (within >= 0) & (within < COUNT)
    every_places = ((every // BASE) * COUNT + within) * gradient_head_stride

    expand_taps = load_taps(expand, every, every_exists, base, base_exists, BASE, TAPS)
    own_head = own_heads(own, BASE, FIRST, COUNT)
    refine_taps = load_taps(refine, own_head, own_exists, every, every_exists, ALL, TAPS)
    first_bias = load_bias(expand_bias, every, every_exists, HAS_BIAS)
    expand_totals = no_taps(ALL_TILE, BASE_TILE, TAPS)
    bias_total = tl.zeros([ALL_TILE, 16], tl.float32)

    rows = tl.arange(0, ROWS)
    feature = rows % FEATURE_TILE
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, TOKEN_TILE), tl.num_programs(0)):
        token = tile * TOKEN_TILE + rows // FEATURE_TILE
        exists = (token < num_tokens) & (feature < FEATURES)
        expanded = convolved(
            columns,
            places,
            base_exists,
            token,
            feature,
            num_tokens,
            token_stride,
            expand_taps,
            first_bias,
            FEATURES,
            COMPUTE,
        )

        into_active = tl.zeros([ROWS, ALL_TILE], tl.float32)
        for tap in tl.static_range(TAPS):
            # Row d of ReLU(u) went into row d - tap of w.
            dw = load_heads(
                gradient,
                own_places,
                own_exists,
                token,
                feature - tap + CENTRE,
                num_tokens,
                gradient_token_stride,
                FEATURES,
            )
            into_active = product(tl.trans(dw), refine_taps[tap], into_active, COMPUTE)
            if tap == CENTRE:
                residual = dw
        if COUNT != BASE:
            residual = load_heads(
                gradient,
                every_places,
                every_is_own,
                token,
                feature,
                num_tokens,
                gradient_token_stride,
                FEATURES,
            )
        positive = (expanded > 0) & exists[:, None]
        into_expanded = tl.where(positive, into_active, 0.0) + tl.trans(residual).to(tl.float32)
        into_expanded = into_expanded.to(DTYPE)
        if HAS_BIAS:
            bias_total = product(tl.trans(into_expanded), ones(ROWS, DTYPE), bias_total, COMPUTE)

        into_x = tl.zeros([ROWS, BASE_TILE], tl.float32)
        updated = ()
        for tap in tl.static_range(TAPS):
            x = load_heads(
                columns,
                places,
                base_exists,
                token,
                feature + tap - CENTRE,
                num_tokens,
                token_stride,
                FEATURES,
            )
            updated = updated + (product(tl.trans(into_expanded), tl.trans(x), expand_totals[tap], COMPUTE),)
            # Row d + tap of x went into row d of u.
            of_tap = product(
                into_expanded, expand_taps[tap], tl.zeros([ROWS, BASE_TILE], tl.float32), COMPUTE
            )
            if tap != CENTRE:
                source = tl.minimum(tl.maximum(rows - tap + CENTRE, 0), ROWS - 1)
                of_tap = tl.gather(of_tap, tl.broadcast_to(source[:, None], [ROWS, BASE_TILE]), axis=0)
                inside = (feature - tap + CENTRE >= 0) & (feature - tap + CENTRE < FEATURES)
                of_tap = tl.where(inside[:, None], of_tap, 0.0)
            into_x += of_tap
        expand_totals = updated
        out = (token.to(tl.int64) * token_stride + feature)[None, :] + places[:, None]
        kept = base_exists[:, None] & exists[None, :]
        tl.store(column_gradient + out, tl.trans(into_x).to(DTYPE), mask=kept)

    program = tl.program_id(0).to(tl.int64)
    part = expand_parts + program * (ALL * BASE * TAPS)
    store_taps(expand_totals, part, every, every_exists, base, base_exists, BASE, TAPS)
    if HAS_BIAS:
        store_bias(bias_total, expand_bias_parts + program * ALL, every, every_exists)


@triton.jit
def refine_gradient(
    columns,
    expand,
    expand_bias,
    gradient,
    refine_parts,
    refine_bias_parts,
    num_tokens,
    token_stride,
    gradient_token_stride,
    gradient_head_stride,
    BASE: tl.constexpr,
    BLOCKS: tl.constexpr,
    COUNT: tl.constexpr,
    FEATURES: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_AT_ONCE: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BASE_TILE: tl.constexpr,
    ALL_TILE: tl.constexpr,
    OWN_TILE: tl.constexpr,
    FEATURE_TILE: tl.constexpr,
    TOKEN_TILE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Gradient of the own simulated heads -> those of the second convolution's weights, their own rows alone,
    as a sum a program: [programs, own heads, m, k] and [programs, own heads].

    By itself and, with many heads, tap by tap (of the grid's second axis): its sums fill the registers.
    """
    ALL: tl.constexpr = BLOCKS * BASE
    OWN: tl.constexpr = BLOCKS * COUNT
    CENTRE: tl.constexpr = TAPS // 2
    ROWS: tl.constexpr = TOKEN_TILE * FEATURE_TILE
    DTYPE: tl.constexpr = columns.dtype.element_ty
    base = tl.arange(0, BASE_TILE)
    base_exists = base < BASE
    places = column_places(base, PER_GROUP, GROUP_WIDTH, FEATURES)
    every = tl.arange(0, ALL_TILE)
    every_exists = every < ALL
    own = tl.arange(0, OWN_TILE)
    own_exists = own < OWN
    if TAPS_AT_ONCE == TAPS:
        first = 0
    else:
        first = tl.program_id(1) * TAPS_AT_ONCE

    expand_taps = load_taps(expand, every, every_exists, base, base_exists, BASE, TAPS)
    first_bias = load_bias(expand_bias, every, every_exists, HAS_BIAS)
    totals = no_taps(OWN_TILE, ALL_TILE, TAPS_AT_ONCE)
    bias_total = tl.zeros([OWN_TILE, 16], tl.float32)

    rows = tl.arange(0, ROWS)
    feature = rows % FEATURE_TILE
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, TOKEN_TILE), tl.num_programs(0)):
        token = tile * TOKEN_TILE + rows // FEATURE_TILE
        exists = (token < num_tokens) & (feature < FEATURES)
        expanded = convolved(
            columns,
            places,
            base_exists,
            token,
            feature,
            num_tokens,
            token_stride,
            expand_taps,
            first_bias,
            FEATURES,
            COMPUTE,
        )
        active = tl.where(exists[:, None], tl.maximum(expanded, 0.0), 0.0).to(DTYPE)
        updated = ()
        for tap in tl.static_range(TAPS_AT_ONCE):
            dw = load_heads(
                gradient,
                own * gradient_head_stride,
                own_exists,
                token,
                feature - (first + tap) + CENTRE,
                num_tokens,
                gradient_token_stride,
                FEATURES,
            )
            updated = updated + (product(dw, active, totals[tap], COMPUTE),)
            if HAS_BIAS:
                # Of the tap that shifts nothing: the others lose what they shift out.
                if tap == CENTRE % TAPS_AT_ONCE:
                    bias_total = product(dw, ones(ROWS, DTYPE), bias_total, COMPUTE)
        totals = updated

    program = tl.program_id(0).to(tl.int64)
    part = refine_parts + program * (OWN * ALL * TAPS) + first
    store_taps(totals, part, own, own_exists, every, every_exists, ALL, TAPS)
    if HAS_BIAS:
        if first <= CENTRE and first + TAPS_AT_ONCE > CENTRE:
            store_bias(bias_total, refine_bias_parts + program * OWN, own, own_exists)
