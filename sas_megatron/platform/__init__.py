"""What it runs on: device, process-group backend, and the CPU stand-in for Megatron-core's CUDA calls."""
