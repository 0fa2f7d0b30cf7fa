"""Device functions of the head kernels: tiles of heads and of convolution weights.

Letters as in `head_kernels`. A mask selects the indices of a padded tile that exist. The `source` of heads is
a tuple (pointer, offsets of the heads, mask of the heads, number of tokens, stride of a token).
"""

# Triton reads the annotations themselves, so they must not become strings.
import triton
import triton.language as tl

from sas_megatron.attention.sas.fused.products import product


@triton.jit
def load_bias(pointer, index, mask, HAS_BIAS: tl.constexpr):
    """Load the biases of the heads `index` in float32; zeros for masked heads, or without biases."""
    if HAS_BIAS:
        bias = tl.load(pointer + index, mask=mask, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros(index.shape, tl.float32)
    return bias


@triton.jit
def column_offsets(base, PER_GROUP: tl.constexpr, GROUP_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return the offsets of the first features of base heads among the columns of a token.

    Groups of PER_GROUP heads start GROUP_WIDTH columns apart: Megatron-core interleaves query, key and value.
    """
    return (base // PER_GROUP) * GROUP_WIDTH + (base % PER_GROUP) * HEAD_DIM


@triton.jit
def local_head_index(index, BASE: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Convert indices of local simulated heads to indices among all simulated heads."""
    return (index // COUNT) * BASE + FIRST + index % COUNT


@triton.jit
def load_heads(source, token, feature, HEAD_DIM: tl.constexpr):
    """Load a tile [heads, rows] of the heads of `source`; row i is `feature[i]` of `token[i]`.

    Features outside of a head are zero, which is the padding of the convolution.
    """
    pointer, offsets, mask, num_tokens, token_stride = source
    inside = (token < num_tokens) & (feature >= 0) & (feature < HEAD_DIM)
    row = token.to(tl.int64) * token_stride + feature
    return tl.load(pointer + offsets[:, None] + row[None, :], mask=mask[:, None] & inside[None, :], other=0.0)


@triton.jit
def convolve(source, token, feature, taps, bias, HEAD_DIM: tl.constexpr, COMPUTE: tl.constexpr):
    """Convolve the heads of `source` at the rows' features: [rows, output heads] in float32.

    Each tap is a matrix product [rows, input heads] · [input heads, output heads] with shifted features.
    """
    total = tl.zeros([token.shape[0], bias.shape[0]], tl.float32) + bias[None, :]
    for tap in tl.static_range(len(taps)):
        x = load_heads(source, token, feature + tap - len(taps) // 2, HEAD_DIM)
        total = product(tl.trans(x), tl.trans(taps[tap]), total, COMPUTE)
    return total


@triton.jit
def tap_pointers(pointer, out, out_mask, into, into_mask, INTO: tl.constexpr, TAPS: tl.constexpr):
    """Return pointers to the first tap of a convolution weight [·, INTO, TAPS], and their mask."""
    pointers = pointer + out[:, None] * (INTO * TAPS) + into[None, :] * TAPS
    return pointers, out_mask[:, None] & into_mask[None, :]


@triton.jit
def load_taps(pointer, out, out_mask, into, into_mask, INTO: tl.constexpr, TAPS: tl.constexpr):
    """Load a convolution weight as a tuple of tiles [output heads, input heads], one per tap."""
    pointers, mask = tap_pointers(pointer, out, out_mask, into, into_mask, INTO, TAPS)
    taps = ()
    for tap in tl.static_range(TAPS):
        taps = taps + (tl.load(pointers + tap, mask=mask, other=0.0),)
    return taps


@triton.jit
def zero_taps(OUT: tl.constexpr, INTO: tl.constexpr, TAPS: tl.constexpr):
    """Return a tuple of TAPS tiles of zeros in float32, for the sums of a weight gradient."""
    totals = ()
    for _ in tl.static_range(TAPS):
        totals = totals + (tl.zeros([OUT, INTO], tl.float32),)
    return totals


@triton.jit
def store_taps(totals, pointer, out, out_mask, into, into_mask, INTO: tl.constexpr, TAPS: tl.constexpr):
    """Store the sums of consecutive taps, the first of which `pointer` points to."""
    pointers, mask = tap_pointers(pointer, out, out_mask, into, into_mask, INTO, TAPS)
    for tap in tl.static_range(len(totals)):
        tl.store(pointers + tap, totals[tap], mask=mask)


@triton.jit
def store_bias(total, pointer, heads, mask):
    """Store the bias gradient: the first of the 16 equal columns of a product with ones."""
    column = tl.arange(0, 16)
    tl.store(pointer + heads[:, None] + column[None, :], total, mask=mask[:, None] & (column == 0)[None, :])
