"""The model around the layers: carrier, GPT model, losses, data sets and the forward step Megatron calls."""
