"""The same arithmetic, fast: Triton kernels, each beside a plain reference."""
