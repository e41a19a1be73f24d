"""Around the line: what checkpoints must agree on with a run."""
