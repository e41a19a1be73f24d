"""What positions must be, from the definitions: float64 and mpmath, sharing nothing with the package.

Rotary pairs are complex numbers here: a rotation is a multiplication by exp(i w x), whatever the layout of channels.
"""

import mpmath
import numpy as np
from numpy.typing import ArrayLike, NDArray

PHASE_BITS = 200
LLAMA3_CONTEXT = 8192

Floats = NDArray[np.float64]
Complexes = NDArray[np.complex128]


def cos_sin(omega: float, doubled_centre: int) -> tuple[float, float]:
    """Return cos and sin of omega mu for 2 mu, each correct to the last bit of float64."""
    with mpmath.workprec(PHASE_BITS):
        angle = mpmath.mpf(omega) * doubled_centre / 2
        return float(mpmath.cos(angle)), float(mpmath.sin(angle))


def inverse_frequencies(channels: int, base: float, interpolation: float = 1.0) -> Floats:
    """Return base^(-2i / channels) / interpolation for i = 0 .. ceil(channels / 2) - 1, in radians per token."""
    return np.power(float(base), -np.arange(0, channels, 2) / channels) / interpolation


def llama3_frequencies(plain: Floats, factor: float) -> Floats:
    """Return frequencies stretched as in Llama 3.1 for a model first trained on 8192 tokens.

    Periods below a quarter of that stay, periods above it grow by `factor`, and in between the frequency is a mix
    linear in the number of turns in the old context.
    """
    turns = LLAMA3_CONTEXT * plain / (2 * np.pi)
    share_kept = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return share_kept * plain + (1.0 - share_kept) * plain / factor


def uniform_spread(width: int) -> float:
    """Return the standard deviation of a place drawn evenly from `width` neighbouring tokens."""
    return float(np.arange(width, dtype=np.float64).std())


def normal_expectation(omega: ArrayLike, mu: ArrayLike, sigma: ArrayLike) -> Complexes:
    """Return E[exp(i omega x)] for x ~ N(mu, sigma^2): the normal distribution's characteristic function."""
    omega, mu, sigma = (np.asarray(value, dtype=np.float64) for value in (omega, mu, sigma))
    return np.exp(1j * omega * mu - np.square(omega * sigma) / 2)


def uniform_expectation(omega: ArrayLike, start: int, width: int) -> Complexes:
    """Return E[exp(i omega x)] for x drawn evenly from the tokens start .. start + width - 1, as the plain mean."""
    places = np.arange(start, start + width, dtype=np.float64)
    turns: Complexes = np.exp(1j * np.asarray(omega, dtype=np.float64)[..., None] * places)
    return turns.sum(axis=-1) / width


def as_complex(x: ArrayLike, count: int, *, interleaved: bool) -> tuple[Complexes, Floats]:
    """Return the first `count` rotary pairs of x [..., hn] as complex numbers [..., count], and the other channels."""
    x = np.asarray(x, dtype=np.float64)
    turned, passed = x[..., : 2 * count], x[..., 2 * count :]
    if interleaved:
        return turned[..., 0::2] + 1j * turned[..., 1::2], passed
    return turned[..., :count] + 1j * turned[..., count:], passed


def as_channels(numbers: Complexes, passed: Floats, *, interleaved: bool) -> Floats:
    """Return the channels [..., hn] that as_complex took apart."""
    if interleaved:
        turned = np.stack([numbers.real, numbers.imag], axis=-1).reshape(*numbers.shape[:-1], -1)
    else:
        turned = np.concatenate([numbers.real, numbers.imag], axis=-1)
    return np.concatenate([turned, passed], axis=-1)


def multiplied(x: ArrayLike, factors: Complexes, *, interleaved: bool) -> Floats:
    """Return x [..., hn] with its rotary pairs multiplied by `factors` [..., r]; other channels pass through."""
    numbers, passed = as_complex(x, factors.shape[-1], interleaved=interleaved)
    return as_channels(numbers * factors, passed, interleaved=interleaved)


def with_norm_of(x: Floats, like: ArrayLike) -> Floats:
    """Return x [..., hn] scaled so that each vector has the Euclidean norm of the one in `like`."""
    norm = np.linalg.norm(np.asarray(like, dtype=np.float64), axis=-1, keepdims=True)
    return x * norm / np.linalg.norm(x, axis=-1, keepdims=True)
