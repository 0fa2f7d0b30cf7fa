"""A trained model at work: held-out loss, tasks of lm-evaluation-harness, generation."""
