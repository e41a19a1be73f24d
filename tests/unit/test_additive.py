"""Embeddings of places that are added to rows, against transformers and the definitions in float64."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2Model
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from megacontext_megatron.config import ConfigError, ContextConfig
from megacontext_megatron.encoding_config import AdditiveConfig
from megacontext_megatron.position.additive import LearnedAbsolute, Sinusoidal, check_places, largest_place
from megacontext_megatron.spans.metadata import SpanMetadata, base_sigma
from megacontext_megatron.spans.plan import plan_rows

EPS = torch.finfo(torch.float32).eps
HIDDEN, BLOCK, LENGTH = 12, 4, 96
CONTEXT = ContextConfig(window=48, source_length=LENGTH, block_size=BLOCK, recent_tokens=8, horizon=4)
TABLE = AdditiveConfig(name="learned_absolute", length=LENGTH)
WAVES = AdditiveConfig(name="sinusoidal", length=LENGTH)
FAR = 2**40


def tokens(*starts):
    start = torch.tensor([starts])
    return SpanMetadata.of_nodes(start, torch.zeros_like(start), BLOCK)


def mixed():
    """Rows of all levels, [2, 4]."""
    start = torch.tensor([[0, 16, 20, 21], [32, 48, 64, 95]])
    return SpanMetadata.of_nodes(start, torch.tensor([[2, 1, 0, 0], [2, 2, 1, 0]]), BLOCK)


def zeros(spans, dtype=torch.float32):
    batch, rows = spans.start.shape
    return torch.zeros(rows, batch, HIDDEN, dtype=dtype)


def added(module, spans, sigma=None, rows=None):
    sigma = base_sigma(spans.width, "uniform") if sigma is None else sigma
    return module(zeros(spans) if rows is None else rows, spans, sigma)


def learned(length=LENGTH, context=CONTEXT, std=0.5, **settings):
    config = dataclasses.replace(TABLE, length=length, **settings)
    return LearnedAbsolute(config, HIDDEN, context, init_std=std, seed=3)


def omegas():
    return 10000.0 ** (-np.arange(0, HIDDEN, 2) / HIDDEN)


def gaussian_mean(mu, sigma, omega):
    """Return E[exp(i omega x)] for x ~ N(mu, sigma^2), integrated by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    return (weights * np.exp(1j * omega * (mu + sigma * nodes))).sum() / math.sqrt(2 * math.pi)


# Sinusoids


def test_tokens_get_marians_sinusoids_with_channels_interleaved():
    spans = tokens(*range(64))
    marian = MarianSinusoidalPositionalEmbedding(64, HIDDEN)
    sines, cosines = marian.create_weight().chunk(2, dim=-1)
    expected = torch.stack([sines, cosines], dim=-1).flatten(-2).unsqueeze(1)
    torch.testing.assert_close(added(Sinusoidal(WAVES, HIDDEN), spans), expected, rtol=0, atol=8 * EPS)


@pytest.mark.parametrize("start", [0, 5, 1_000_003, FAR + 1])
def test_sinusoids_are_those_of_the_definition_at_any_distance(start):
    spans = tokens(start)
    got = added(Sinusoidal(WAVES, HIDDEN), spans)[0, 0].double().numpy()
    phase = np.longdouble(start) * omegas().astype(np.longdouble)
    expected = np.stack([np.sin(phase), np.cos(phase)], -1).reshape(-1).astype(np.float64)
    # A frequency of float64 is rounded to 2^-53 of itself.
    np.testing.assert_allclose(got, expected, rtol=0, atol=4 * EPS + start * 2.0**-52)


def test_spans_get_the_expectation_of_a_normal_distribution():
    spans = mixed()
    sigma = base_sigma(spans.width, "uniform")
    got = added(Sinusoidal(WAVES, HIDDEN), spans).double().numpy()
    for b, s in np.ndindex(*spans.start.shape):
        mu, spread = spans.doubled_centre[b, s].item() / 2, sigma[b, s].item()
        waves = [gaussian_mean(mu, spread, omega) for omega in omegas()]
        expected = np.stack([np.imag(waves), np.real(waves)], -1).reshape(-1)
        np.testing.assert_allclose(got[s, b], expected, rtol=0, atol=8 * EPS)
    assert np.abs(got[0, 0, :2]).max() < 1e-3
    assert np.abs(got[2, 0, :2]).max() > 0.1


def test_spread_of_zero_is_a_point_bit_for_bit_whatever_the_width():
    spans, module = mixed(), Sinusoidal(WAVES, HIDDEN)
    start, level = torch.tensor([[0]]), torch.tensor([[0]])
    point = added(module, SpanMetadata.of_nodes(start, level, BLOCK))
    assert torch.equal(point[0, 0], torch.tensor([0.0, 1.0] * (HIDDEN // 2)))
    sharp = added(module, spans, torch.zeros_like(spans.start, dtype=torch.float32))
    assert not torch.equal(sharp, added(module, spans))
    energy = sharp.unflatten(-1, (-1, 2)).square().sum(-1)
    torch.testing.assert_close(energy, torch.ones_like(energy), rtol=0, atol=4 * EPS)


def test_scale_multiplies_what_is_added():
    spans = mixed()
    once, thrice = (added(Sinusoidal(dataclasses.replace(WAVES, scale=s), HIDDEN), spans) for s in (1.0, 3.0))
    torch.testing.assert_close(thrice, 3 * once, rtol=2 * EPS, atol=0)


def test_moved_spans_are_read_where_they_lie_and_learn():
    spans, module = mixed(), Sinusoidal(WAVES, HIDDEN)
    sigma = base_sigma(spans.width, "uniform").requires_grad_()
    offset = torch.full(spans.start.shape, 2.0, requires_grad=True)
    moved = added(module, dataclasses.replace(spans, offset=offset), sigma)
    elsewhere = added(module, dataclasses.replace(spans, start=spans.start + 2), sigma.detach())
    torch.testing.assert_close(moved.detach(), elsewhere, rtol=0, atol=8 * EPS)
    weights = torch.randn(moved.shape, generator=torch.Generator().manual_seed(0))
    (moved * weights).sum().backward()
    mu = spans.doubled_centre.double().numpy() / 2 + 2.0
    of, spread = weights.transpose(0, 1).double().numpy(), sigma.detach().double().numpy()
    for leaf, place in ((offset, 1), (sigma, 2)):
        assert leaf.grad is not None
        slopes = central_difference(of, mu, spread, place)
        np.testing.assert_allclose(leaf.grad.double().numpy(), slopes, rtol=0, atol=HIDDEN * 16 * EPS)
        assert np.abs(slopes).max() > 0.01


def central_difference(weights, mu, sigma, which, step=1e-5):
    """Return the slope of the weighted sum of expectations along mu (1) or sigma (2), float64 [b, s]."""

    def total(mu, sigma):
        waves = np.exp(1j * omegas() * mu[..., None] - np.square(omegas() * sigma[..., None]) / 2)
        return (np.stack([waves.imag, waves.real], -1).reshape(weights.shape) * weights).sum(-1)

    d_mu, d_sigma = (step, 0) if which == 1 else (0, step)
    return (total(mu + d_mu, sigma + d_sigma) - total(mu - d_mu, sigma - d_sigma)) / (2 * step)


@pytest.mark.parametrize("make", [lambda: Sinusoidal(WAVES, HIDDEN), learned])
def test_rows_keep_their_dtype_and_the_sum_rounds_once(make):
    spans, module = mixed(), make()
    rows = torch.randn(zeros(spans).shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = added(module, spans, rows=rows)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, (rows.float() + added(module, spans)).bfloat16())


def test_odd_widths_lose_the_last_cosine():
    spans = tokens(3)
    got = Sinusoidal(WAVES, 5)(torch.zeros(1, 1, 5), spans, torch.zeros(1, 1))[0, 0]
    omega = 10000.0 ** (-np.arange(0, 5, 2) / 5)
    expected = np.stack([np.sin(3 * omega), np.cos(3 * omega)], -1).reshape(-1)[:5]
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=4 * EPS)


# Learned table


def test_tokens_get_rows_of_the_table_as_gpt2_does():
    config = GPT2Config(n_positions=LENGTH, n_embd=HIDDEN, n_layer=0, n_head=1, vocab_size=7, embd_pdrop=0.0)
    gpt2, module, spans = GPT2Model(config).eval(), learned(), tokens(*range(LENGTH))
    ids = torch.randint(0, 7, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        module.weight.copy_(gpt2.wpe.weight)
        got = added(module, spans, rows=gpt2.wte(ids).transpose(0, 1))
        expected = gpt2.ln_f(got)
        assert torch.equal(gpt2(input_ids=ids).last_hidden_state.transpose(0, 1), expected)


def test_gists_get_the_mean_of_the_rows_they_cover():
    spans, module = mixed(), learned()
    got, table = added(module, spans), module.weight.detach().double()
    for b, s in np.ndindex(*spans.start.shape):
        start, end = spans.start[b, s].item(), spans.end[b, s].item()
        expected = table[start:end].mean(dim=0).float()
        torch.testing.assert_close(got[s, b], expected, rtol=0, atol=8 * EPS)
    assert torch.equal(got[3, 1], module.weight[95])


def test_gradients_are_those_of_the_means():
    spans, module = mixed(), learned()
    got = added(module, spans)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(4))
    (got * weights).sum().backward()
    expected = torch.zeros(LENGTH, HIDDEN, dtype=torch.float64)
    for b, s in np.ndindex(*spans.start.shape):
        start, width = spans.start[b, s].item(), spans.width[b, s].item()
        expected[start : start + width] += weights[s, b].double() / width
    assert module.weight.grad is not None
    torch.testing.assert_close(module.weight.grad.double(), expected, rtol=0, atol=8 * EPS)


def test_interpolation_reads_the_table_at_the_centre():
    spans, module = mixed(), learned(interpolate=True)
    got = added(module, spans)
    table, centres = module.weight.detach().double().numpy(), spans.doubled_centre.numpy() / 2
    for b, s in np.ndindex(*spans.start.shape):
        expected = [np.interp(centres[b, s], np.arange(LENGTH), table[:, h]) for h in range(HIDDEN)]
        np.testing.assert_allclose(got.detach()[s, b].numpy(), expected, rtol=0, atol=4 * EPS)
    assert torch.equal(got[3, 1], module.weight[95])
    assert not torch.allclose(got, added(learned(), spans))


def test_interpolation_follows_moved_spans():
    spans, module = mixed(), learned(interpolate=True)
    offset = torch.full(spans.start.shape, 0.25, requires_grad=True)
    last = torch.tensor([[False] * 4, [False] * 3 + [True]])
    moved = dataclasses.replace(spans, offset=offset.masked_fill(last, 0.0))
    got = added(module, moved)
    table, centres = module.weight.detach().double().numpy(), spans.doubled_centre.numpy() / 2 + 0.25 * ~last.numpy()
    expected = [[np.interp(c, np.arange(LENGTH), table[:, h]) for h in range(HIDDEN)] for c in centres.T.flatten()]
    np.testing.assert_allclose(got.detach().flatten(0, 1).numpy(), expected, rtol=0, atol=4 * EPS)
    got.sum().backward()
    low = np.floor(centres).astype(int)
    slopes = (table[np.minimum(low + 1, LENGTH - 1)] - table[low]).sum(-1)
    assert offset.grad is not None
    np.testing.assert_allclose(offset.grad.numpy(), np.where(last, 0.0, slopes), rtol=0, atol=HIDDEN * 8 * EPS)
    with pytest.raises(RuntimeError, match="--learned-absolute-interpolate"):
        added(learned(), moved)


def test_bf16_tables_add_their_means_up_in_fp32():
    spans, module = mixed(), learned().bfloat16()
    got = added(module, spans, rows=zeros(spans, torch.bfloat16))
    exact = [module.weight.detach()[a:b].double().mean(0) for a, b in ((0, 16), (32, 48))]
    for b in (0, 1):
        # Each of two levels rounds once.
        torch.testing.assert_close(got[0, b].double(), exact[b], rtol=0, atol=2.0**-8 * 0.5)


def test_places_beyond_the_table_are_an_error_and_never_clamped():
    module = learned()
    with pytest.raises(IndexError):
        added(module, tokens(LENGTH))
    spans = SpanMetadata.of_nodes(torch.tensor([[LENGTH]]), torch.tensor([[1]]), BLOCK)
    with pytest.raises(IndexError):
        added(module, spans)
    with pytest.raises(IndexError):
        added(learned(interpolate=True), tokens(LENGTH))


@pytest.mark.parametrize("plan", ["random", "heuristic", "recency"])
def test_largest_place_is_the_newest_token_of_every_plan(plan):
    context = dataclasses.replace(CONTEXT, plan=plan)
    planned = plan_rows(context, (1, 0, 5, 0), None)
    start, level = (torch.from_numpy(values)[None] for values in (planned.start, planned.level))
    spans = SpanMetadata.of_nodes(start, level, BLOCK)
    assert spans.end.max().item() - 1 == largest_place(context)
    added(learned(context=context), spans)


def test_short_tables_are_refused_by_name():
    check_places(TABLE, CONTEXT)
    check_places(dataclasses.replace(WAVES, length=1), CONTEXT)
    short = dataclasses.replace(TABLE, length=LENGTH - 1)
    with pytest.raises(ConfigError, match=f"--max-position-embeddings {LENGTH - 1} .*at least {LENGTH}"):
        check_places(short, CONTEXT)
    with pytest.raises(ConfigError, match="--max-position-embeddings"):
        LearnedAbsolute(short, HIDDEN, CONTEXT, init_std=0.02, seed=0)


def test_tables_are_longer_than_the_source_if_asked():
    spans, module = mixed(), learned(length=LENGTH + 37)
    expected = torch.stack([module.weight.detach()[a : a + 16].mean(0) for a in (0, 32)])
    torch.testing.assert_close(added(module, spans)[0], expected, rtol=0, atol=8 * EPS)


def test_tables_start_normal_and_the_same_whatever_was_drawn_before():
    torch.manual_seed(0)
    first = learned(length=4000, std=0.02).weight
    torch.rand(7)
    assert torch.equal(first, learned(length=4000, std=0.02).weight)
    assert first.shape == (4000, HIDDEN)
    count = first.numel()
    assert abs(first.std().item() / 0.02 - 1) < 4 / math.sqrt(2 * count)
    assert abs(first.mean().item()) < 4 * 0.02 / math.sqrt(count)
    assert {name for name, _ in learned().named_parameters()} == {"weight"}
