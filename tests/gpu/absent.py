"""A ``before`` hook for ranks that must find no Transformer Engine; imports nothing that would import it."""

import sys


def without_transformer_engine() -> None:
    """Let Megatron fall back to what it has for machines without a GPU: Transformer Engine's kernels need one."""
    if any(name.partition(".")[0] in ("transformer_engine", "megatron") for name in sys.modules):
        raise RuntimeError("this rank has imported Megatron already: start it bare")
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
