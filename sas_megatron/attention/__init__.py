"""Attention variants, one folder each, and the code that their layers share."""
