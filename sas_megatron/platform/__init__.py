"""Device, process-group backend, launcher variables, and CPU replacements for CUDA calls of Megatron-core."""
