"""SAS (Simulated Attention Score) attention on Megatron-core, for scaling-law experiments."""

__version__ = "0.1.0"
