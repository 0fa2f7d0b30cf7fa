"""What is looked at before a run: this node, and all ranks together."""
