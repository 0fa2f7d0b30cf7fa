"""Attention variants, one folder each, and what their layers share."""
