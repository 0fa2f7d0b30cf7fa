"""Device functions of the feature kernels: tiles of rows, and tiles of weights in pair order.

Letters and pair order as in `feature_kernels`. The E features are in one tile or two. `columns` is a tuple
with the columns of each tile, and weights and rows of all features are tuples of tiles as well. Functions
that return pointers also return their mask.
"""

# Triton reads the annotations themselves, so they must not become strings.
import triton
import triton.language as tl

from sas_megatron.attention.sas.fused.products import product


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
def load_bias(
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
    return product(x, tl.trans(weight), load_bias(bias, column, ROWS, WIDE, ROTARY, HAS_BIAS), COMPUTE)
