"""Device functions of the kernels: matrix products, tiles of heads, and tiles of features.

Letters as in `head_kernels` and `feature_kernels`. A mask selects the indices of a padded tile that exist.
Functions that return pointers also return their mask. The head kernels use the functions up to `store_bias`,
and the feature kernels those from `columns_of_tiles` on.

The `source` of heads is a tuple (pointer, offsets of the heads, mask of the heads, number of tokens, stride
of a token). The E features, in pair order, are in one tile or two: `columns` is a tuple with the columns of
each tile, and weights and rows of all features are tuples of tiles as well.
"""

# Triton reads the annotations themselves, so they must not become strings.
import triton
import triton.language as tl


@triton.jit
def product(left, right, total, COMPUTE: tl.constexpr):
    """Return total + left · right, accumulated in float32, with operands of the dtype COMPUTE."""
    return tl.dot(left.to(COMPUTE), right.to(COMPUTE), total, input_precision="ieee")


@triton.jit
def ones(ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """Return ones [ROWS, 16]. A product with them sums over the rows; `tl.dot` needs at least 16 columns."""
    return tl.full([ROWS, 16], 1.0, tl.float32).to(DTYPE)


@triton.jit
def load_head_bias(pointer, index, mask, HAS_BIAS: tl.constexpr):
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


@triton.jit
def columns_of_tiles(MAIN: tl.constexpr, REST: tl.constexpr):
    """Return the columns of one tile of MAIN columns, or of that and a second one of REST columns."""
    columns = (tl.arange(0, MAIN),)
    if REST > 0:
        columns = columns + (MAIN + tl.arange(0, REST),)
    return columns


@triton.jit
def feature_of(column, ROTARY: tl.constexpr):
    """Return the feature of a column, by pair order over the first ROTARY columns."""
    paired = column // 2 + (column % 2) * (ROTARY // 2)
    return tl.where(column < ROTARY, paired, column)


@triton.jit
def weight_pointers(
    pointer,
    out,
    into,
    WIDE: tl.constexpr,
    INTO: tl.constexpr,
    ROTARY: tl.constexpr,
    INTO_ROTARY: tl.constexpr,
):
    """Return pointers to elements (out, into) of a matrix [WIDE, INTO] in feature order, and their mask."""
    pointers = pointer + feature_of(out, ROTARY)[:, None] * INTO + feature_of(into, INTO_ROTARY)[None, :]
    return pointers, (out < WIDE)[:, None] & (into < INTO)[None, :]


@triton.jit
def load_expand(pointer, columns, narrow, NARROW: tl.constexpr, WIDE: tl.constexpr, ROTARY: tl.constexpr):
    """Load A1 as a tuple of tiles [columns, D]."""
    tiles = ()
    for i in tl.static_range(len(columns)):
        pointers, mask = weight_pointers(pointer, columns[i], narrow, WIDE, NARROW, ROTARY, 0)
        tiles = tiles + (tl.load(pointers, mask=mask, other=0.0),)
    return tiles


@triton.jit
def load_refine(pointer, columns, WIDE: tl.constexpr, ROTARY: tl.constexpr):
    """Load A2 as a tuple, over tiles of z, of tuples, over tiles of y, of [columns of z, columns of y]."""
    tiles = ()
    for out in tl.static_range(len(columns)):
        tiles_of_out = ()
        for into in tl.static_range(len(columns)):
            pointers, mask = weight_pointers(pointer, columns[out], columns[into], WIDE, WIDE, ROTARY, ROTARY)
            tiles_of_out = tiles_of_out + (tl.load(pointers, mask=mask, other=0.0),)
        tiles = tiles + (tiles_of_out,)
    return tiles


@triton.jit
def store_partial_sum(
    total,
    pointer,
    out,
    into,
    WIDE: tl.constexpr,
    INTO: tl.constexpr,
    ROTARY: tl.constexpr,
    INTO_ROTARY: tl.constexpr,
):
    """Store a tile of this program's sum in [programs, WIDE, INTO], in feature order."""
    partial = pointer + tl.program_id(0).to(tl.int64) * (WIDE * INTO)
    pointers, mask = weight_pointers(partial, out, into, WIDE, INTO, ROTARY, INTO_ROTARY)
    tl.store(pointers, total, mask=mask)


@triton.jit
def load_feature_bias(
    pointer, column, ROWS: tl.constexpr, WIDE: tl.constexpr, ROTARY: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Load a bias, repeated in each row. It is loaded again for each tile of rows to save registers."""
    if HAS_BIAS:
        bias = tl.load(pointer + feature_of(column, ROTARY), mask=column < WIDE, other=0.0)
        tile = tl.broadcast_to(bias.to(tl.float32)[None, :], [ROWS, column.shape[0]])
    else:
        tile = tl.zeros([ROWS, column.shape[0]], tl.float32)
    return tile


@triton.jit
def row_pointers(
    pointer,
    tile,
    num_rows,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return pointers to columns FIRST to FIRST + SIZE of a tile of rows [·, COLUMNS], and their mask."""
    row = tl.arange(0, ROWS)
    column = FIRST + tl.arange(0, SIZE)
    start = pointer + tl.cast(tile, tl.int64) * (ROWS * COLUMNS)
    mask = tl.broadcast_to((row < num_rows - tile * ROWS)[:, None], [ROWS, SIZE])
    if FIRST + SIZE > COLUMNS:
        mask = mask & (column < COLUMNS)[None, :]
    return start + row[:, None] * COLUMNS + column[None, :], mask


@triton.jit
def load_rows(
    pointer,
    tile,
    num_rows,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Load columns FIRST to FIRST + SIZE of a tile of rows; zeros outside of the matrix."""
    pointers, mask = row_pointers(pointer, tile, num_rows, FIRST, SIZE, COLUMNS, ROWS)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(
    values, pointer, tile, num_rows, FIRST: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    """Store a tile of rows from column FIRST on, without what is outside of the matrix."""
    pointers, mask = row_pointers(pointer, tile, num_rows, FIRST, values.shape[1], COLUMNS, ROWS)
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def apply_rope(
    wide,
    rope_table,
    tile,
    num_rows,
    FIRST: tl.constexpr,
    ROTARY: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PER_POSITION: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Rotate pairs of neighbouring columns by the angles of the rows' positions, or by their negatives.

    Columns beyond ROTARY are rotated by zero: cosine 1 in the even and sine 0 in the odd columns.
    """
    if FIRST < ROTARY:
        SIZE: tl.constexpr = wide.shape[1]
        row = tile * ROWS + tl.arange(0, ROWS)
        column = FIRST + tl.arange(0, SIZE)
        pointers = rope_table + (row // ROWS_PER_POSITION)[:, None] * ROTARY + column[None, :]
        mask = (row < num_rows)[:, None] & (column < ROTARY)[None, :]
        identity = tl.broadcast_to((1.0 - column % 2)[None, :], [ROWS, SIZE])
        table = tl.load(pointers, mask=mask, other=identity)
        cosine, sine = tl.split(tl.reshape(table, [ROWS, SIZE // 2, 2]))
        if INVERSE:
            sine = -sine
        first, second = tl.split(tl.reshape(wide, [ROWS, SIZE // 2, 2]))
        rotated = tl.join(first * cosine - second * sine, second * cosine + first * sine)
        wide = tl.reshape(rotated, [ROWS, SIZE])
    return wide


@triton.jit
def load_gradient(
    gradient,
    rope_table,
    tile,
    num_rows,
    column,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    ROTARY: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PER_POSITION: tl.constexpr,
):
    """Load the columns `column`, from FIRST on, of the gradient of the rotated z, and rotate them back."""
    dz = load_rows(gradient, tile, num_rows, FIRST, column.shape[0], WIDE, ROWS).to(tl.float32)
    dz = apply_rope(dz, rope_table, tile, num_rows, FIRST, ROTARY, ROWS, ROWS_PER_POSITION, True)
    return dz.to(gradient.dtype.element_ty)


@triton.jit
def expand_rows(
    x,
    weight,
    bias,
    column,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    ROTARY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Compute a tile of y = x·A1ᵀ + a1 in float32."""
    return product(
        x, tl.trans(weight), load_feature_bias(bias, column, ROWS, WIDE, ROTARY, HAS_BIAS), COMPUTE
    )
