"""What a run would cost on ranks that are not there: the real code on tensors without storage."""
