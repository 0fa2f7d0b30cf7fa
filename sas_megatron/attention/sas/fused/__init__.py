"""Fused kernels in Triton; the functions they stand in for are those of `attention`, in plain torch."""
