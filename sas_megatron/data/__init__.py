"""Documents -> tokens -> Megatron-core indexed datasets -> batches."""
