"""The GPT model: assembly, initial weights, loss."""
