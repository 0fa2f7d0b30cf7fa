"""Documents -> sentencepiece pieces -> Megatron indexed datasets -> batches."""
