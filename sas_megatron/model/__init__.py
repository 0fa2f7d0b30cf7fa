"""The GPT around the attention: assembly, initial weights, costs."""
