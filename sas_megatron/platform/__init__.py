"""Device, process-group backend, launcher variables, and the CPU stand-in for Megatron-core's CUDA calls."""
