"""Where each row lies: span metadata, levels of detail, plans, and slicing for context parallelism."""
