"""Parts of the head kernels: tiles of heads and of weights. Letters as in `head_kernels`."""

# Triton reads the annotations themselves, so they must not become strings.
import triton
import triton.language as tl

from sas_megatron.attention.sas.fused.products import product


@triton.jit
def load_bias(pointer, index, exists, HAS_BIAS: tl.constexpr):
    """A bias at these places, in float32; zeros where there is none."""
    if HAS_BIAS:
        bias = tl.load(pointer + index, mask=exists, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros(index.shape, tl.float32)
    return bias


@triton.jit
def column_places(base, PER_GROUP: tl.constexpr, GROUP_WIDTH: tl.constexpr, FEATURES: tl.constexpr):
    """Where base heads begin among a token's columns."""
    return (base // PER_GROUP) * GROUP_WIDTH + (base % PER_GROUP) * FEATURES


@triton.jit
def own_heads(index, BASE: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Of the own simulated heads, in order, which they are of all."""
    return (index // COUNT) * BASE + FIRST + index % COUNT


@triton.jit
def load_heads(pointer, places, exist, token, feature, num_tokens, token_stride, FEATURES: tl.constexpr):
    """A tile [heads, rows] of some heads at the rows' features; zeros outside, as a convolution pads."""
    inside = (token < num_tokens) & (feature >= 0) & (feature < FEATURES)
    row = token.to(tl.int64) * token_stride + feature
    return tl.load(pointer + places[:, None] + row[None, :], mask=exist[:, None] & inside[None, :], other=0.0)


@triton.jit
def convolved(
    pointer,
    places,
    exist,
    token,
    feature,
    num_tokens,
    token_stride,
    taps,
    bias,
    FEATURES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """A convolution of some heads at the rows' features, [rows, heads that it makes], in float32."""
    total = tl.zeros([token.shape[0], bias.shape[0]], tl.float32) + bias[None, :]
    for tap in tl.static_range(len(taps)):
        shifted = feature + tap - len(taps) // 2
        x = load_heads(pointer, places, exist, token, shifted, num_tokens, token_stride, FEATURES)
        total = product(tl.trans(x), tl.trans(taps[tap]), total, COMPUTE)
    return total


@triton.jit
def tap_places(pointer, out, out_exist, into, into_exist, INTO: tl.constexpr, TAPS: tl.constexpr):
    """Pointers to the first tap of a convolution's weight [·, INTO, TAPS], and which there are."""
    places = pointer + out[:, None] * (INTO * TAPS) + into[None, :] * TAPS
    return places, out_exist[:, None] & into_exist[None, :]


@triton.jit
def load_taps(pointer, out, out_exist, into, into_exist, INTO: tl.constexpr, TAPS: tl.constexpr):
    """A convolution's weight as a tuple of tiles [out, into], one a tap."""
    places, exist = tap_places(pointer, out, out_exist, into, into_exist, INTO, TAPS)
    taps = ()
    for tap in tl.static_range(TAPS):
        taps = taps + (tl.load(places + tap, mask=exist, other=0.0),)
    return taps


@triton.jit
def no_taps(OUT: tl.constexpr, INTO: tl.constexpr, TAPS: tl.constexpr):
    """A tuple of zeros, a tile for each tap."""
    totals = ()
    for _ in tl.static_range(TAPS):
        totals = totals + (tl.zeros([OUT, INTO], tl.float32),)
    return totals


@triton.jit
def store_taps(totals, pointer, out, out_exist, into, into_exist, INTO: tl.constexpr, TAPS: tl.constexpr):
    """Sums for some of the taps, side by side."""
    places, exist = tap_places(pointer, out, out_exist, into, into_exist, INTO, TAPS)
    for tap in tl.static_range(len(totals)):
        tl.store(places + tap, totals[tap], mask=exist)


@triton.jit
def store_bias(total, pointer, heads, exist):
    """The first column of a product with ones, whose columns are equal."""
    column = tl.arange(0, 16)
    tl.store(pointer + heads[:, None] + column[None, :], total, mask=exist[:, None] & (column == 0)[None, :])
