"""Grouped-query attention, with MHA and MQA as its two ends."""
