"""The product that all kernels are made of."""

# Triton reads the annotations themselves, so they must not become strings.
import triton
import triton.language as tl


@triton.jit
def product(left, right, total, COMPUTE: tl.constexpr):
    """total + left · right, added up in float32; operands in COMPUTE."""
    return tl.dot(left.to(COMPUTE), right.to(COMPUTE), total, input_precision="ieee")
