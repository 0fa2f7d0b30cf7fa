"""Measurements behind `sas-megatron bench`: ratios in one run, medians, the machine named."""
