"""Prints a kernel of window strips as PTX for Hopper, which takes no GPU: KERNEL [forward, plain, ...] DTYPE."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from megacontext_megatron.kernels import window_strips as strips

ROTATIONS = {
    "plain": {"ROTATE": False, "R": 1, "INTERLEAVED": False, "table": None, "planes": 0},
    "halves": {"ROTATE": True, "R": 64, "INTERLEAVED": False},
    "interleaved": {"ROTATE": True, "R": 32, "INTERLEAVED": True},
    "neighbours": {"ROTATE": True, "R": 1, "INTERLEAVED": False},
    "eight": {"ROTATE": True, "R": 8, "INTERLEAVED": False},
}


def compiled(which: str, dtype: str) -> str:
    """Return PTX for compute capability 9.0a."""
    kernel, constants = strips.strip_forward_kernel, {"NG": 8}
    if which != "forward":
        kernel = strips.strip_query_kernel
        constants |= {"TABLE_GROUPS": 1, **ROTATIONS[which]}
    heads, keys = strips._shared_layout(3), strips._shared_layout(2)
    of_heads, of_keys = f"tensordesc<{dtype}[16, 4, 128],{heads!r}>", f"tensordesc<{dtype}[64, 128],{keys!r}>"
    types: dict[str, str] = dict.fromkeys(("query", "out", "out_grad", "query_grad"), of_heads)
    types |= dict.fromkeys(("key", "value"), of_keys) | dict.fromkeys(("normaliser", "delta", "table"), "*fp32")
    types |= {"scale": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = GluonASTSource(kernel, signature, constants, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]


if __name__ == "__main__":
    print(compiled(sys.argv[1], sys.argv[2]))
