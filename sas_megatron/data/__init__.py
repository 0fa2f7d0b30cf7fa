"""Documents -> tokens of a sentencepiece tokenizer -> Megatron-core indexed datasets -> batches."""
