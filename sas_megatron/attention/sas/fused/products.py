"""The matrix product of all kernels, and the sum over rows as a product with ones."""

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
