"""The product that all kernels are made of, and sums as one more of it."""

# Triton reads the annotations themselves, so they must not become strings.
import triton
import triton.language as tl


@triton.jit
def product(left, right, total, COMPUTE: tl.constexpr):
    """total + left · right, added up in float32; operands in COMPUTE."""
    return tl.dot(left.to(COMPUTE), right.to(COMPUTE), total, input_precision="ieee")


@triton.jit
def ones(ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """[ROWS, 16]: a product with them is a sum over the rows, in each of 16 columns; fewer are no product."""
    return tl.full([ROWS, 16], 1.0, tl.float32).to(DTYPE)
