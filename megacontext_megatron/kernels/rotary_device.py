"""What the span rotary kernels are made of: phases, cosines and sines, and heads in and out of memory.

Tiles are [lanes, rotary pairs], where a lane is one head of one row; pointers and places of lanes are [lanes, 1].
"""

# Names in capitals are compile-time constants, as in all Triton code.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_phase(doubled, words, group, pair, R: tl.constexpr, GROUPS: tl.constexpr):
    """Return omega mu modulo one turn in units of 2^-32 turn, uint32 [lanes, BLOCK_R], of doubled centres int64.

    The product of a 64-bit place and a 96-bit frequency modulo 2^96, of which the highest word is kept; carries from
    below are left out, an error of at most 2 units.
    """
    at = group * R + pair
    inside = pair < R
    top = tl.load(words + at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    middle = tl.load(words + GROUPS * R + at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    low = tl.load(words + 2 * GROUPS * R + at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    place0 = (doubled & 0xFFFFFFFF).to(tl.uint32)
    place1 = ((doubled >> 32) & 0xFFFFFFFF).to(tl.uint32)
    place2 = ((doubled >> 63) & 0xFFFFFFFF).to(tl.uint32)
    return place0 * top + place1 * middle + place2 * low + tl.umulhi(place0, middle) + tl.umulhi(place1, low)


@triton.jit
def turned_by(phase, shift):
    """Return a phase in units of 2^-32 turn moved on by `shift` turns, fp32."""
    part = shift - tl.floor(shift + 0.5)
    return phase + (part * 4294967296.0).to(tl.int64).to(tl.uint32)


@triton.jit
def cos_sin(phase):
    """Return cosine and sine, fp32, of a phase uint32 in units of 2^-32 turn.

    The nearest quarter turn is split off exactly; the rest, at most pi / 4, goes through the single-precision
    polynomials of the Cephes library (Moshier), whose error is below 2^-23.  The same on every device.
    """
    quarter = (phase + 0x20000000) >> 30
    rest = (phase - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32)
    x = rest * 1.4629180792671596e-09
    z = x * x
    sin = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cos = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    swapped = (quarter & 1) != 0
    cosine = tl.where(swapped, sin, cos)
    sine = tl.where(swapped, cos, sin)
    return tl.where(((quarter + 1) & 2) != 0, -cosine, cosine), tl.where((quarter & 2) != 0, -sine, sine)


@triton.jit
def load_pairs(pointer, pair, inside, R: tl.constexpr, BLOCK_R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return both members of each rotary pair, fp32 [lanes, BLOCK_R], of heads that start at `pointer` [lanes, 1]."""
    if INTERLEAVED:
        channel = tl.arange(0, 2 * BLOCK_R)[None, :]
        both = tl.load(pointer + channel, mask=inside & (channel < 2 * R), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (both.shape[0], BLOCK_R, 2)))
    else:
        inside = inside & (pair < R)
        first = tl.load(pointer + pair, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(pointer + R + pair, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(
    pointer, first, second, pair, inside, R: tl.constexpr, BLOCK_R: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Write both members of each rotary pair where `load_pairs` reads them."""
    if INTERLEAVED:
        channel = tl.arange(0, 2 * BLOCK_R)[None, :]
        both = tl.reshape(tl.join(first, second), (first.shape[0], 2 * BLOCK_R))
        tl.store(pointer + channel, both.to(pointer.dtype.element_ty), mask=inside & (channel < 2 * R))
    else:
        inside = inside & (pair < R)
        tl.store(pointer + pair, first.to(pointer.dtype.element_ty), mask=inside)
        tl.store(pointer + R + pair, second.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_rest(pointer, rest, inside, HN: tl.constexpr, R: tl.constexpr):
    """Return the channels of heads that are not rotated, fp32 [lanes, BLOCK_REST]; zeros where there are none."""
    return tl.load(pointer + 2 * R + rest, mask=inside & (rest < HN - 2 * R), other=0.0).to(tl.float32)


@triton.jit
def copy_heads(source, target, inside, HN: tl.constexpr, BLOCK_HN: tl.constexpr):
    """Copy heads from `source` [lanes, 1] to `target` [lanes, 1]."""
    channel = tl.arange(0, BLOCK_HN)[None, :]
    inside = inside & (channel < HN)
    tl.store(target + channel, tl.load(source + channel, mask=inside), mask=inside)


@triton.jit
def load_weight(
    weight, pair, rest, HN: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, CENTRED: tl.constexpr
):
    """Return a norm's weight for both members of each pair and for the channels that are not rotated, fp32."""
    step: tl.constexpr = 2 if INTERLEAVED else 1
    other: tl.constexpr = 1 if INTERLEAVED else R
    first = tl.load(weight + step * pair, mask=pair < R, other=0.0).to(tl.float32)
    second = tl.load(weight + step * pair + other, mask=pair < R, other=0.0).to(tl.float32)
    passed = tl.load(weight + 2 * R + rest, mask=rest < HN - 2 * R, other=0.0).to(tl.float32)
    if CENTRED:
        return first + 1.0, second + 1.0, passed + 1.0
    return first, second, passed


@triton.jit
def inverse_rms(first, second, passed, eps, HN: tl.constexpr):
    """Return 1 / rms of heads, fp32 [lanes, 1]."""
    energy = tl.sum(first * first + second * second, axis=1) + tl.sum(passed * passed, axis=1)
    return tl.rsqrt(energy / HN + eps)[:, None]


@triton.jit
def damping(spread, rate):
    """Return exp(-(omega sigma)^2 / 2); exactly 1 where sigma is 0."""
    width = spread * rate
    return tl.exp2(-0.7213475204444817 * width * width)


@triton.jit
def load_of_row(tensor, row, live, batch, stride_s, stride_b):
    """Return the element of a [s, b] tensor for row number s b + i of sequence i; 0 beyond the last row."""
    return tl.load(tensor + (row // batch) * stride_s + (row % batch) * stride_b, mask=live, other=0)


@triton.jit
def row_angles(
    doubled, moved, words, group, rate, pair, R: tl.constexpr, GROUPS: tl.constexpr, HAS_OFFSET: tl.constexpr
):
    """Return cosine and sine, fp32 [lanes, BLOCK_R], of rows with doubled centres int64 and offsets fp32 [lanes, 1]."""
    phase = row_phase(doubled, words, group, pair, R, GROUPS)
    if HAS_OFFSET:
        phase = turned_by(phase, moved * rate * 0.15915494309189535)
    return cos_sin(phase)
