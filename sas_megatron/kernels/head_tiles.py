"""What the kernels of the head simulation load and store: tiles [heads, rows], and a convolution's taps."""

# Triton reads the annotations themselves, so they must not become strings.
import triton
import triton.language as tl


@triton.jit
def load_bias(pointer, index, exists, HAS_BIAS: tl.constexpr):
    """A bias in float32; zeros where there is none."""
    if HAS_BIAS:
        bias = tl.load(pointer + index, mask=exists, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros(index.shape, tl.float32)
    return bias


@triton.jit
def load_taps(pointer, rows, rows_exist, columns, columns_exist, COLUMNS: tl.constexpr, TAPS: tl.constexpr):
    """A convolution's weight [·, COLUMNS, TAPS] as a tuple of tiles [rows, columns], one a tap."""
    places = pointer + rows[:, None] * (COLUMNS * TAPS) + columns[None, :] * TAPS
    exist = rows_exist[:, None] & columns_exist[None, :]
    taps = ()
    for tap in tl.static_range(TAPS):
        taps = taps + (tl.load(places + tap, mask=exist, other=0.0),)
    return taps


@triton.jit
def load_taps_transposed(
    pointer, rows, rows_exist, columns, columns_exist, ROWS: tl.constexpr, TAPS: tl.constexpr
):
    """The same of a weight [·, ROWS, TAPS], whose second axis becomes the tiles' rows."""
    places = pointer + columns[None, :] * (ROWS * TAPS) + rows[:, None] * TAPS
    exist = rows_exist[:, None] & columns_exist[None, :]
    taps = ()
    for tap in tl.static_range(TAPS):
        taps = taps + (tl.load(places + tap, mask=exist, other=0.0),)
    return taps


@triton.jit
def load_heads(pointer, places, exist, token, feature, num_tokens, token_stride, FEATURES: tl.constexpr):
    """A tile [heads, rows] of some heads at the rows' features; zeros outside, as a convolution pads."""
    inside = (token < num_tokens) & (feature >= 0) & (feature < FEATURES)
    row = token.to(tl.int64) * token_stride + feature
    return tl.load(pointer + places[:, None] + row[None, :], mask=exist[:, None] & inside[None, :], other=0.0)


@triton.jit
def own_heads(index, BASE: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Of the own simulated heads, in order, which they are of all."""
    return (index // COUNT) * BASE + FIRST + index % COUNT


@triton.jit
def zero_taps(ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr):
    """Float32 sums, a tile for each tap."""
    totals = ()
    for _ in tl.static_range(TAPS):
        totals = totals + (tl.zeros([ROWS, COLUMNS], tl.float32),)
    return totals


@triton.jit
def store_bias(total, pointer, heads, exist):
    """The first column of a product with ones, whose columns are equal."""
    column = tl.arange(0, 16)
    tl.store(pointer + heads[:, None] + column[None, :], total, mask=exist[:, None] & (column == 0)[None, :])
