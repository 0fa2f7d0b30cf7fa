"""Tensor product attention (TPA)."""
