"""Parts of the feature kernels: tiles of rows, and of weights in the pair order of `feature_kernels`.

E features lie in one tile or two: `columns` is a tuple of the columns of each, and what is loaded for both is
such a tuple, too.
"""

# Triton reads the annotations themselves, so they must not become strings.
import triton
import triton.language as tl

from sas_megatron.attention.sas.fused.products import product


@triton.jit
def columns_of_tiles(MAIN: tl.constexpr, REST: tl.constexpr):
    """Of one tile, or of two."""
    columns = (tl.arange(0, MAIN),)
    if REST > 0:
        columns = columns + (MAIN + tl.arange(0, REST),)
    return columns


@triton.jit
def feature_of(column, ROTARY: tl.constexpr):
    """The feature that lies in a column, by pair order."""
    paired = column // 2 + (column % 2) * (ROTARY // 2)
    return tl.where(column < ROTARY, paired, column)


@triton.jit
def weight_places(
    pointer,
    out,
    into,
    WIDE: tl.constexpr,
    INTO: tl.constexpr,
    ROTARY: tl.constexpr,
    INTO_ROTARY: tl.constexpr,
):
    """Pointers into a matrix [WIDE, INTO], whose order is that of features, and which there are."""
    places = pointer + feature_of(out, ROTARY)[:, None] * INTO + feature_of(into, INTO_ROTARY)[None, :]
    return places, (out < WIDE)[:, None] & (into < INTO)[None, :]


@triton.jit
def load_expand(pointer, columns, narrow, NARROW: tl.constexpr, WIDE: tl.constexpr, ROTARY: tl.constexpr):
    """A1, as [columns, D] for each tile."""
    tiles = ()
    for part in tl.static_range(len(columns)):
        places, exist = weight_places(pointer, columns[part], narrow, WIDE, NARROW, ROTARY, 0)
        tiles = tiles + (tl.load(places, mask=exist, other=0.0),)
    return tiles


@triton.jit
def load_refine(pointer, columns, WIDE: tl.constexpr, ROTARY: tl.constexpr):
    """A2: for each tile of z, for each of y, [columns of z, columns of y]."""
    tiles = ()
    for out in tl.static_range(len(columns)):
        of_tile = ()
        for into in tl.static_range(len(columns)):
            places, exist = weight_places(pointer, columns[out], columns[into], WIDE, WIDE, ROTARY, ROTARY)
            of_tile = of_tile + (tl.load(places, mask=exist, other=0.0),)
        tiles = tiles + (of_tile,)
    return tiles


@triton.jit
def store_sum(
    total,
    pointer,
    out,
    into,
    WIDE: tl.constexpr,
    INTO: tl.constexpr,
    ROTARY: tl.constexpr,
    INTO_ROTARY: tl.constexpr,
):
    """A tile of a program's sum [programs, WIDE, INTO]."""
    part = pointer + tl.program_id(0).to(tl.int64) * (WIDE * INTO)
    places, exist = weight_places(part, out, into, WIDE, INTO, ROTARY, INTO_ROTARY)
    tl.store(places, total, mask=exist)


@triton.jit
def load_bias(
    pointer, column, ROWS: tl.constexpr, WIDE: tl.constexpr, ROTARY: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """A bias in each row. Read for each tile anew: kept, it would take as many registers as a tile."""
    if HAS_BIAS:
        bias = tl.load(pointer + feature_of(column, ROTARY), mask=column < WIDE, other=0.0)
        tile = tl.broadcast_to(bias.to(tl.float32)[None, :], [ROWS, column.shape[0]])
    else:
        tile = tl.zeros([ROWS, column.shape[0]], tl.float32)
    return tile


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
    """A tile of rows from memory; zeros where there is none."""
    places, exist = row_places(pointer, tile, num_rows, FIRST, SIZE, COLUMNS, ROWS)
    return tl.load(places, mask=exist, other=0.0)


@triton.jit
def store_rows(
    values, pointer, tile, num_rows, FIRST: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    """A tile of rows into memory, from column FIRST on, as far as they exist."""
    places, exist = row_places(pointer, tile, num_rows, FIRST, values.shape[1], COLUMNS, ROWS)
    tl.store(places, values.to(pointer.dtype.element_ty), mask=exist)


@triton.jit
def turned(
    wide,
    turns,
    tile,
    num_rows,
    FIRST: tl.constexpr,
    ROTARY: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PER_POSITION: tl.constexpr,
    BACK: tl.constexpr,
):
    """Pairs of neighbouring columns turned by the angles of the rows' positions, or turned back."""
    if FIRST < ROTARY:
        SIZE: tl.constexpr = wide.shape[1]
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
def load_gradient(
    gradient,
    turns,
    tile,
    num_rows,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    ROTARY: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PER_POSITION: tl.constexpr,
):
    """A tile of that of z, turned back."""
    dz = load_rows(gradient, tile, num_rows, FIRST, SIZE, WIDE, ROWS).to(tl.float32)
    dz = turned(dz, turns, tile, num_rows, FIRST, ROTARY, ROWS, ROWS_PER_POSITION, True)
    return dz.to(gradient.dtype.element_ty)


@triton.jit
def expanded(
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
    """A tile of y, in float32."""
    return product(x, tl.trans(weight), load_bias(bias, column, ROWS, WIDE, ROTARY, HAS_BIAS), COMPUTE)
