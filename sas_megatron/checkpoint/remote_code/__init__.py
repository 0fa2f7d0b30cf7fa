"""Files that an exported model carries with it, as they are: they need torch, transformers, sentencepiece.

They import nothing of this package, and run where it is not installed (`trust_remote_code=True`).
"""
