"""Checkpoints: save, verify and load them on any layout; Hugging Face export and import; upcycling."""
