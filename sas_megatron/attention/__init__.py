"""Attention variants, one file each, and the parts of SAS."""
