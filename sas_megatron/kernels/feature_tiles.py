"""What the kernels of the feature simulation load and store, in pair order (`feature_kernels`)."""

# Triton reads the annotations themselves, so they must not become strings.
import triton
import triton.language as tl


@triton.jit
def feature_of(column, ROTARY: tl.constexpr):
    """The feature that lies in a column, by pair order."""
    paired = column // 2 + (column % 2) * (ROTARY // 2)
    return tl.where(column < ROTARY, paired, column)


@triton.jit
def load_bias(
    pointer,
    column,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    ROTARY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """A bias in each row. Read for each tile anew: kept, it would take as many registers as a tile."""
    if HAS_BIAS:
        bias = tl.load(pointer + feature_of(column, ROTARY), mask=column < WIDE, other=0.0)
        tile = tl.broadcast_to(bias.to(tl.float32)[None, :], [ROWS, SIZE])
    else:
        tile = tl.zeros([ROWS, SIZE], tl.float32)
    return tile


@triton.jit
def load_expand(pointer, column, narrow, NARROW: tl.constexpr, WIDE: tl.constexpr, ROTARY: tl.constexpr):
    """A part of A1 as [columns, D]."""
    places = pointer + feature_of(column, ROTARY)[:, None] * NARROW + narrow[None, :]
    return tl.load(places, mask=(column < WIDE)[:, None] & (narrow < NARROW)[None, :], other=0.0)


@triton.jit
def load_refine(pointer, out, into, WIDE: tl.constexpr, ROTARY: tl.constexpr):
    """A part of A2 as [columns of z, columns of y]."""
    places = pointer + feature_of(out, ROTARY)[:, None] * WIDE + feature_of(into, ROTARY)[None, :]
    return tl.load(places, mask=(out < WIDE)[:, None] & (into < WIDE)[None, :], other=0.0)


@triton.jit
def row_places(
    pointer,
    tile,
    num_rows,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Pointers to columns FIRST to FIRST + SIZE of a tile of rows [·, COLUMNS], and which there are."""
    row = tl.arange(0, ROWS)
    column = FIRST + tl.arange(0, SIZE)
    start = pointer + tl.cast(tile, tl.int64) * (ROWS * COLUMNS)
    exist = tl.broadcast_to((row < num_rows - tile * ROWS)[:, None], [ROWS, SIZE])
    if FIRST + SIZE > COLUMNS:
        exist = exist & (column < COLUMNS)[None, :]
    return start + row[:, None] * COLUMNS + column[None, :], exist


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
    """Columns FIRST to FIRST + SIZE of a tile of rows; zeros where there are none."""
    places, exist = row_places(pointer, tile, num_rows, FIRST, SIZE, COLUMNS, ROWS)
    return tl.load(places, mask=exist, other=0.0)


@triton.jit
def store_rows(
    values,
    pointer,
    tile,
    num_rows,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What there is of them."""
    places, exist = row_places(pointer, tile, num_rows, FIRST, SIZE, COLUMNS, ROWS)
    tl.store(places, values.to(pointer.dtype.element_ty), mask=exist)


@triton.jit
def turned(
    wide,
    turns,
    tile,
    num_rows,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PER_POSITION: tl.constexpr,
    BACK: tl.constexpr,
):
    """Pairs of neighbouring columns turned by the angles of the rows' positions, or turned back."""
    if FIRST < ROTARY:
        row = tile * ROWS + tl.arange(0, ROWS)
        column = FIRST + tl.arange(0, SIZE)
        places = turns + (row // ROWS_PER_POSITION)[:, None] * ROTARY + column[None, :]
        known = (row < num_rows)[:, None] & (column < ROTARY)[None, :]
        no_turn = tl.broadcast_to((1.0 - column % 2)[None, :], [ROWS, SIZE])
        table = tl.load(places, mask=known, other=no_turn)
        cosine, sine = tl.split(tl.reshape(table, [ROWS, SIZE // 2, 2]))
        if BACK:
            sine = -sine
        first, second = tl.split(tl.reshape(wide, [ROWS, SIZE // 2, 2]))
        turned = tl.join(first * cosine - second * sine, second * cosine + first * sine)
        wide = tl.reshape(turned, [ROWS, SIZE])
    return wide


@triton.jit
def store_sum(total, pointer, row, row_exists, column, COLUMNS: tl.constexpr):
    """A part of a matrix [·, COLUMNS] in float32, at the rows that are given."""
    kept = row_exists[:, None] & (column < COLUMNS)[None, :]
    tl.store(pointer + row[:, None] * COLUMNS + column[None, :], total, mask=kept)


@triton.jit
def store_refine(total, pointer, out, into, WIDE: tl.constexpr, ROTARY: tl.constexpr):
    """A part of a matrix like A2, from pair order."""
    places = pointer + feature_of(out, ROTARY)[:, None] * WIDE + feature_of(into, ROTARY)[None, :]
    tl.store(places, total, mask=(out < WIDE)[:, None] & (into < WIDE)[None, :])
