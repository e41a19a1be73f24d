"""Where position touches the model: layer specs, self attention, and core attention under context parallelism."""
