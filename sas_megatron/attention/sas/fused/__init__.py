"""Triton kernels of the head and feature simulation, equal to the plain functions of `attention.sas`."""
