"""What all attention kernels share: ends of loops and matrix products, as the interpreter of Triton can take them."""

# Names in capitals are compile-time constants, as in all Triton code.

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def bound(x):
    """Return one end of a loop."""
    # As Python's integer, which NumPy no longer makes of an array of one number.
    if _INTERPRETED:
        return x.handle.data.item() if isinstance(x, tl.tensor) else int(x)
    return x


@triton.jit
def product(a, b, total=None):
    """Return the matrix product of a and b, fp32, added to `total`."""
    # The interpreter takes the bits of bf16 numbers for integers.
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
