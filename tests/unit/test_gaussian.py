"""Gaussian RoPE: rotation and damping of queries and keys by their rows' spans."""

import itertools

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megacontext_megatron.config import SIGMA_RULES, GaussianRopeConfig, RotaryConfig
from megacontext_megatron.position.frequencies import rotary_frequencies
from megacontext_megatron.position.gaussian import GaussianRotary, damping, rotate
from megacontext_megatron.position.phase import exact_angles, megatron_angles
from megacontext_megatron.spans.metadata import SpanMetadata
from tests import oracles

EPS = torch.finfo(torch.float32).eps
BLOCK = 32
HEAD_DIM = 64
SIDES, RENORM, PHASES = ("qk", "k"), ("none", "rms"), ("exact", "megatron")
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [(1.0, False), (1.0, True), (0.5, False), (0.4, True)]
"""Share of rotated channels, and whether pairs are interleaved."""

widths = st.floats(min_value=0.0, max_value=2.0**20, width=32)


@pytest.fixture(autouse=True, scope="module")
def _stock_embedding_on_cpu():
    """Megatron moves its frequencies to the current CUDA device at first use; here that is the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        yield


def rotary(*, rotary_config=None, **settings):
    config = rotary_config or RotaryConfig(head_dim=HEAD_DIM)
    return GaussianRotary(GaussianRopeConfig(**settings), rotary_frequencies(config), config.interleaved)


def random_rows(rows, batch, heads, channels=HEAD_DIM, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, batch, heads, channels, generator=generator).to(dtype)


def grad(leaf):
    """Return the gradient that a leaf has received."""
    assert leaf.grad is not None
    return leaf.grad


def token_spans(rows, batch, offset=0):
    start = torch.arange(offset, offset + rows).unsqueeze(1).expand(rows, batch)
    return SpanMetadata.of_nodes(start, torch.zeros_like(start), BLOCK)


def mixed_spans():
    """Rows of all levels in both columns: [6, 2]."""
    start = torch.tensor([[0, 1024], [1024, 2048], [1056, 3072], [1088, 3104], [1089, 3136], [1090, 3137]])
    level = torch.tensor([[2, 2], [1, 2], [1, 1], [0, 1], [0, 0], [0, 0]])
    return SpanMetadata.of_nodes(start, level, BLOCK)


def as_tokens_at(spans):
    """Return points at the first token of each row."""
    return SpanMetadata.of_nodes(spans.start, torch.zeros_like(spans.start), BLOCK)


def oracle_factors(spans, omega, *, spread=1.0):
    """E[exp(i w x)] of every row, [s, b, 1, r]."""
    width = spans.width.double().numpy()
    mu = spans.start.double().numpy() + (width - 1) / 2
    sigma = spread * np.vectorize(oracles.uniform_spread)(spans.width.numpy())
    return oracles.normal_expectation(omega.double().numpy(), mu[..., None, None], sigma[..., None, None])


# The oracle itself


@pytest.mark.parametrize(("omega", "mu", "sigma"), [(1.0, 3.0, 0.5), (0.3, -7.5, 2.0), (0.01, 1e4, 295.6)])
def test_characteristic_function_is_the_integral_of_the_density(omega, mu, sigma):
    def integrand(z):
        return mpmath.npdf(z) * mpmath.expj(omega * (mu + sigma * z))

    integral = mpmath.quad(integrand, [-12, -6, -3, 0, 3, 6, 12])
    assert abs(mpmath.mpc(oracles.normal_expectation(omega, mu, sigma)) - integral) < 1e-12


# Damping


@given(sigma=widths, omega=st.floats(min_value=2.0**-30, max_value=1.0, width=32))
def test_damping_is_the_size_of_the_expected_rotation(sigma, omega):
    damp = damping(torch.tensor(sigma, dtype=torch.float32), torch.tensor([omega], dtype=torch.float32))
    assert damp.dtype == torch.float32
    expected = float(abs(oracles.normal_expectation(omega, 0.0, sigma)))
    # Two roundings in the product's square scale with the exponent; exp itself is good to two units.
    bound = expected * EPS * (2 + 2 * (omega * sigma) ** 2) + torch.finfo(torch.float32).tiny
    assert abs(damp.item() - expected) <= bound


@given(st.floats(min_value=0.0, max_value=2.0**100, width=32))
def test_no_spread_means_no_damping_at_all(omega):
    assert damping(torch.zeros(()), torch.tensor([omega])).item() == 1.0


# Rotation


@pytest.mark.parametrize(("percent", "interleaved"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_is_bit_equal_to_megatrons(percent, interleaved, dtype):
    stock = RotaryEmbedding(HEAD_DIM, percent, rotary_interleaved=interleaved, use_cpu_initialization=True)
    embedding = stock.get_emb(100, 5)
    angles = stock.get_freqs_non_repeated(100, 5)[:, None, None, :]
    ours = random_rows(100, 2, 3, dtype=dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    turned = rotate(ours, angles.cos().to(dtype), angles.sin().to(dtype), interleaved=interleaved)
    expected = _apply_rotary_pos_emb_bshd(theirs, embedding, rotary_interleaved=interleaved)
    assert turned.dtype == dtype
    assert torch.equal(turned, expected)
    weights = random_rows(100, 2, 3, seed=1, dtype=dtype)
    gradients = [torch.autograd.grad(out, x, weights)[0] for out, x in ((turned, ours), (expected, theirs))]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_complex_multiplication(interleaved):
    x = random_rows(4, 1, 2).double()
    angle = random_rows(4, 1, 1, 20, seed=1).double() * 10
    turned = rotate(x, angle.cos(), angle.sin(), interleaved=interleaved)
    expected = oracles.multiplied(x.numpy(), np.exp(1j * angle.numpy()), interleaved=interleaved)
    np.testing.assert_allclose(turned.numpy(), expected, rtol=0, atol=1e-14)
    assert torch.equal(turned[..., 40:], x[..., 40:])


@pytest.mark.parametrize(("percent", "interleaved"), SHAPES)
@pytest.mark.parametrize("renorm", RENORM)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_with_megatrons_phase_are_stock_rope(percent, interleaved, renorm, dtype):
    config = RotaryConfig(head_dim=HEAD_DIM, percent=percent, interleaved=interleaved)
    stock = RotaryEmbedding(HEAD_DIM, percent, rotary_interleaved=interleaved, use_cpu_initialization=True)
    query, key = random_rows(70, 2, 4, dtype=dtype), random_rows(70, 2, 2, seed=1, dtype=dtype)
    module = rotary(rotary_config=config, renorm=renorm, phase="megatron")
    finished = module(query, key, token_spans(70, 2, offset=3))
    embedding = stock.get_emb(70, 3)
    for ours, plain in zip(finished, (query, key), strict=True):
        assert torch.equal(ours, _apply_rotary_pos_emb_bshd(plain, embedding, rotary_interleaved=interleaved))


STRETCHED = [
    RotaryConfig(head_dim=HEAD_DIM, interpolation=3),
    RotaryConfig(head_dim=HEAD_DIM, base=500_000, llama3_factor=8.0),
]
SHAPED = [RotaryConfig(head_dim=HEAD_DIM, percent=percent, interleaved=interleaved) for percent, interleaved in SHAPES]


@pytest.mark.parametrize("config", SHAPED + STRETCHED)
@pytest.mark.parametrize("rule", ["uniform", "none"])
def test_finished_rows_are_the_expected_rotation(config, rule):
    spans, query, key = mixed_spans(), random_rows(6, 2, 4), random_rows(6, 2, 2, seed=1)
    finished = rotary(rotary_config=config, sigma=rule)(query, key, spans)
    factors = oracle_factors(spans, rotary_frequencies(config).omega, spread=float(rule == "uniform"))
    for ours, plain in zip(finished, (query, key), strict=True):
        expected = oracles.multiplied(plain.numpy(), factors, interleaved=config.interleaved)
        # The angle is rounded at pi, the damping at exponents where it still counts, each product once.
        np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=8 * EPS * plain.abs().max().item())


@pytest.mark.parametrize("layout", list(itertools.permutations(range(4)))[1::5])
def test_memory_layout_changes_no_bit(layout):
    query, key = random_rows(6, 2, 4), random_rows(6, 2, 4, seed=1)
    inverse = [layout.index(place) for place in range(4)]
    strided = [x.permute(layout).contiguous().permute(inverse) for x in (query, key)]
    spans = mixed_spans()
    carried = SpanMetadata.unpack(SpanMetadata.of_nodes(spans.start.T, spans.level.T, BLOCK).pack("uniform"))
    module, restoring = rotary(), rotary(renorm="rms")
    plain = module(query, key, spans)
    assert all(torch.equal(*pair) for pair in zip(plain, module(*strided, carried), strict=True))
    # Sums of squares may be taken in another order, but where nothing was damped both are the same sum.
    points = as_tokens_at(carried)
    for ours, plain in zip(restoring(*strided, points), module(*strided, points), strict=True):
        assert torch.equal(ours, plain)


# Points


ALL_SETTINGS = list(itertools.product(SIDES, RENORM, PHASES, DTYPES))


def point_path(x, spans, phase, *, interleaved=False):
    """Plain rotation at each row's centre, in the arithmetic of the phase."""
    frequencies = rotary_frequencies(RotaryConfig(head_dim=HEAD_DIM))
    rule = exact_angles if phase == "exact" else megatron_angles
    angle = rule(spans.doubled_centre, frequencies).unsqueeze(2)
    cos, sin = angle.cos(), angle.sin()
    if phase == "megatron":
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return rotate(x, cos, sin, interleaved=interleaved)


@pytest.mark.parametrize(("sides", "renorm", "phase", "dtype"), ALL_SETTINGS)
@pytest.mark.parametrize("points", ["tokens of any rule", "gists without spread"])
def test_rows_without_spread_take_the_point_path(sides, renorm, phase, dtype, points):
    query, key = random_rows(6, 2, 4, dtype=dtype), random_rows(6, 2, 2, seed=1, dtype=dtype)
    spans, rules = (mixed_spans(), ["none"])
    if points == "tokens of any rule":
        spans, rules = as_tokens_at(spans), SIGMA_RULES
    for rule in rules:
        finished = rotary(sigma=rule, sides=sides, renorm=renorm, phase=phase)(query, key, spans)
        for ours, plain in zip(finished, (query, key), strict=True):
            assert torch.equal(ours, point_path(plain, spans, phase))


@pytest.mark.parametrize(("sides", "renorm", "phase", "dtype"), ALL_SETTINGS)
def test_gradients_of_rows_without_spread_are_the_point_paths(sides, renorm, phase, dtype):
    spans = as_tokens_at(mixed_spans())
    weights = [random_rows(6, 2, 4, seed=2, dtype=dtype), random_rows(6, 2, 2, seed=3, dtype=dtype)]
    plain = [random_rows(6, 2, 4, dtype=dtype), random_rows(6, 2, 2, seed=1, dtype=dtype)]
    ours, point = ([x.clone().requires_grad_() for x in plain] for _ in range(2))
    finished = rotary(sides=sides, renorm=renorm, phase=phase)(*ours, spans)
    torch.autograd.backward(finished, weights)
    torch.autograd.backward([point_path(x, spans, phase) for x in point], weights)
    for x, y in zip(ours, point, strict=True):
        if renorm == "none":
            assert torch.equal(grad(x), grad(y))
        else:
            # The two ways in which x reaches its own norm cancel, but for fp32 rounding of their size.
            slack = 8 * EPS * grad(y).abs().max().item()
            rounding = torch.finfo(dtype).eps
            torch.testing.assert_close(grad(x), grad(y), rtol=rounding, atol=slack)


def test_tokens_do_not_feel_the_gists_beside_them():
    spans, query, key = mixed_spans(), random_rows(6, 2, 4), random_rows(6, 2, 2, seed=1)
    module = rotary(renorm="rms")
    mixed = module(query, key, spans)
    points = module(query, key, as_tokens_at(spans))
    token = spans.level == 0
    assert all(torch.equal(ours[token], alone[token]) for ours, alone in zip(mixed, points, strict=True))
    assert not any(torch.equal(ours, alone) for ours, alone in zip(mixed, points, strict=True))


# Settings


@pytest.mark.parametrize("phase", PHASES)
def test_sides_k_leaves_queries_undamped(phase):
    spans, query, key = mixed_spans(), random_rows(6, 2, 4), random_rows(6, 2, 2, seed=1)
    both = rotary(sides="qk", phase=phase)(query, key, spans)
    keys_only = rotary(sides="k", phase=phase)(query, key, spans)
    assert torch.equal(keys_only[0], point_path(query, spans, phase))
    assert torch.equal(keys_only[1], both[1])
    gist = spans.level > 0
    assert bool((both[0].norm(dim=-1)[gist] < 0.99 * query.norm(dim=-1)[gist]).all())


@pytest.mark.parametrize(("percent", "interleaved"), SHAPES)
def test_renorm_restores_norms_and_keeps_directions(percent, interleaved):
    config = RotaryConfig(head_dim=HEAD_DIM, percent=percent, interleaved=interleaved)
    spans, query, key = mixed_spans(), random_rows(6, 2, 4), random_rows(6, 2, 2, seed=1)
    finished = rotary(rotary_config=config, renorm="rms")(query, key, spans)
    factors = oracle_factors(spans, rotary_frequencies(config).omega)
    for ours, plain in zip(finished, (query, key), strict=True):
        torch.testing.assert_close(ours.norm(dim=-1), plain.norm(dim=-1), rtol=8 * EPS, atol=0)
        damped = oracles.multiplied(plain.numpy(), factors, interleaved=interleaved)
        expected = oracles.with_norm_of(damped, plain.numpy())
        gain = (np.linalg.norm(expected, axis=-1) / np.linalg.norm(damped, axis=-1)).max()
        atol = 8 * EPS * gain * plain.abs().max().item()
        np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=atol)


def test_renorm_gradient_is_the_slope_of_the_definition():
    config = RotaryConfig(head_dim=8)
    spans = SpanMetadata.of_nodes(torch.tensor([[64]]), torch.tensor([[1]]), BLOCK)
    x, weights = random_rows(1, 1, 1, 8), random_rows(1, 1, 1, 8, seed=1)
    ours = x.clone().requires_grad_()
    finished, _ = rotary(rotary_config=config, renorm="rms")(ours, x, spans)
    finished.backward(weights)
    factors = oracle_factors(spans, rotary_frequencies(config).omega)

    def score(channels):
        damped = oracles.multiplied(channels, factors, interleaved=False)
        return float((oracles.with_norm_of(damped, channels) * weights.double().numpy()).sum())

    point, step = x.double().numpy(), 1e-6
    slopes = [(score(point + step * unit) - score(point - step * unit)) / (2 * step) for unit in np.eye(8)]
    np.testing.assert_allclose(grad(ours).flatten().numpy(), slopes, rtol=0, atol=64 * EPS * np.abs(slopes).max())


def test_renorm_of_nothing_is_nothing():
    nothing = torch.zeros(6, 2, 2, HEAD_DIM, requires_grad=True)
    finished, _ = rotary(renorm="rms")(nothing, nothing, mixed_spans())
    finished.sum().backward()
    assert not bool(finished.any())
    assert bool(grad(nothing).isfinite().all())


@pytest.mark.parametrize("config", [RotaryConfig(head_dim=8, base=100), RotaryConfig(head_dim=4, base=10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_renorm_stays_finite_when_every_pair_is_damped_away(config, dtype):
    spans = SpanMetadata.of_nodes(torch.tensor([[0], [1024]]), torch.tensor([[2], [2]]), BLOCK)
    x = (3 * random_rows(2, 1, 16, config.head_dim, dtype=dtype)).requires_grad_()
    finished, _ = rotary(rotary_config=config, renorm="rms")(x, x, spans)
    finished.float().sum().backward()
    assert bool(finished.isfinite().all())
    assert bool(grad(x).isfinite().all())


def test_fixed_rotary_adds_nothing_to_a_checkpoint():
    module = rotary(renorm="rms")
    module(random_rows(6, 2, 4), random_rows(6, 2, 2), mixed_spans())
    assert not module.state_dict()
    assert not list(module.parameters())


# Two rows at once


PAIR = SpanMetadata.of_nodes(torch.tensor([[96], [32]]), torch.tensor([[1], [1]]), BLOCK)
PAIR_CONFIG = RotaryConfig(head_dim=16, base=1000)


def pair_logit(**settings):
    """Logit of one random gist query to one random gist key, with their numbers in complex form."""
    query, key = random_rows(2, 1, 1, 16), random_rows(2, 1, 1, 16, seed=1)
    finished = rotary(rotary_config=PAIR_CONFIG, **settings)(query, key, PAIR)
    logit = (finished[0][0, 0, 0].double() @ finished[1][1, 0, 0].double()).item()
    q, k = (oracles.as_complex(x, 8, interleaved=False)[0] for x in (query[0, 0, 0].numpy(), key[1, 0, 0].numpy()))
    return logit, q * k.conj()


def pair_places():
    sigma = oracles.uniform_spread(BLOCK)
    return (96 + 15.5, 32 + 15.5), sigma


def test_logit_of_two_gists_is_the_expectation_over_independent_places():
    logit, products = pair_logit()
    omega = rotary_frequencies(PAIR_CONFIG).omega.double().numpy()
    (mu_q, mu_k), sigma = pair_places()
    # The difference of independent normals is normal, and its variance is the sum.
    expected = (products * oracles.normal_expectation(omega, mu_q - mu_k, np.sqrt(2) * sigma)).real.sum()
    assert abs(logit - expected) <= 8 * EPS * np.abs(products).sum()


def test_logit_of_two_gists_is_the_mean_over_drawn_places():
    logit, products = pair_logit()
    omega = rotary_frequencies(PAIR_CONFIG).omega.double().numpy()
    (mu_q, mu_k), sigma = pair_places()
    draws = np.random.default_rng(0)
    distance = draws.normal(mu_q, sigma, 100_000) - draws.normal(mu_k, sigma, 100_000)
    sampled = (products * np.exp(1j * omega * distance[:, None])).real.sum(axis=-1)
    standard_error = sampled.std(ddof=1) / np.sqrt(sampled.size)
    assert abs(logit - sampled.mean()) < 4 * standard_error
    for settings in ({"sigma": "none"}, {"sides": "k"}, {"sigma": "width"}):
        assert abs(pair_logit(**settings)[0] - sampled.mean()) > 8 * standard_error


@pytest.mark.parametrize("renorm", RENORM)
def test_shifting_every_row_by_2_30_tokens_changes_no_logit(renorm):
    spans, query, key = mixed_spans(), random_rows(6, 2, 2), random_rows(6, 2, 2, seed=1)
    far = SpanMetadata.of_nodes(spans.start + 2**30, spans.level, BLOCK)
    module = rotary(renorm=renorm)
    near_logits, far_logits = (
        torch.einsum("ibnh,jbnh->bnij", *(x.double() for x in module(query, key, where))) for where in (spans, far)
    )
    size = torch.einsum("ibn,jbn->bnij", query.norm(dim=-1), key.norm(dim=-1)).double()
    # Each of the four angles is off by at most pi EPS / 2, and each finished channel is rounded a few times.
    assert bool(((near_logits - far_logits).abs() <= 12 * EPS * size).all())
