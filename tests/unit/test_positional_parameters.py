"""Learned positions: scales of the spread and the log-width bias, and that they stay fp32."""

import math

import numpy as np
import pytest
import torch

from megacontext_megatron.config import GaussianRopeConfig, RotaryConfig
from megacontext_megatron.position.frequencies import rotary_frequencies
from megacontext_megatron.position.gaussian import LOG_SCALE_LIMIT, GaussianRotary, LearnableSigma, LogWidthBias
from megacontext_megatron.spans.metadata import SpanMetadata, base_sigma
from tests import oracles
from tests.sums_over_ranks import alone, doubled

EPS = torch.finfo(torch.float32).eps
BLOCK, LEVELS, GROUPS, HEADS = 32, 2, 4, 8
KINDS = ("level", "layer", "head")
SIZES = {"level": LEVELS, "layer": 1, "head": LEVELS * GROUPS}
NOT_IN_HALF = (math.pi / 3, -0.123456789, 1.23456789, 0.3333333, -1.0000001, 1e-9, 2.0000002, -0.7)
"""Values that bfloat16 and float16 would change."""
ROTARY = RotaryConfig(head_dim=16, base=1000)


@pytest.fixture(autouse=True, scope="module")
def _parameters_on_cpu():
    """Megatron makes parameters on the current CUDA device; these tests do not need one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        yield


def grad(leaf):
    """Return the gradient that a leaf has received."""
    assert leaf.grad is not None
    return leaf.grad


def learnable(kind, *, local=slice(0, GROUPS), values=None, sum_over_ranks=alone):
    module = LearnableSigma(kind, LEVELS, GROUPS, local, sum_over_ranks)
    if values is not None:
        with torch.no_grad():
            module.log_scale.copy_(torch.tensor(values[: SIZES[kind]], dtype=torch.float32))
    return module


def rotary(sigma_scale=None, **settings):
    kind = "none" if sigma_scale is None else "level"
    config = GaussianRopeConfig(learnable_sigma=kind, **settings)
    return GaussianRotary(config, rotary_frequencies(ROTARY), ROTARY.interleaved, sigma_scale)


def random_rows(spans, heads, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*spans.start.shape, heads, ROTARY.head_dim, generator=generator)


def mixed_spans():
    """Rows of all levels, [4, 2]."""
    start = torch.tensor([[0, 1024], [1024, 2048], [1056, 3072], [1057, 3104]])
    return SpanMetadata.of_nodes(start, torch.tensor([[2, 2], [1, 2], [0, 1], [0, 0]]), BLOCK)


def token_spans():
    start = torch.arange(8).view(4, 2)
    return SpanMetadata.of_nodes(start, torch.zeros_like(start), BLOCK)


# Scales


@pytest.mark.parametrize("kind", KINDS)
def test_scales_start_as_the_rules_own_sigma(kind):
    module = learnable(kind)
    assert module.log_scale.shape == (SIZES[kind],)
    assert module.log_scale.dtype == torch.float32
    assert module.log_scale.requires_grad
    assert torch.equal(module(), torch.ones(LEVELS + 1, GROUPS if kind == "head" else 1))
    spans = mixed_spans()
    query, key = random_rows(spans, HEADS), random_rows(spans, GROUPS, seed=1)
    finished, fixed = rotary(module)(query, key, spans), rotary()(query, key, spans)
    assert all(torch.equal(*pair) for pair in zip(finished, fixed, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_exponentials_by_level_and_group(kind):
    scales = learnable(kind, values=NOT_IN_HALF)()
    logs = np.array(NOT_IN_HALF[: SIZES[kind]], dtype=np.float32).astype(np.float64)
    expected = np.exp(np.broadcast_to(logs.reshape(-1, GROUPS if kind == "head" else 1), (LEVELS, scales.shape[1])))
    np.testing.assert_allclose(scales[1:].detach().numpy(), expected, rtol=2 * EPS)
    assert bool((scales[0] == 1.0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sign", "limit"), [(1, 8.0), (-1, 1 / 8)])
def test_scales_stop_at_a_factor_of_8(kind, sign, limit):
    for size in (LOG_SCALE_LIMIT, LOG_SCALE_LIMIT + 1e-3, 50.0, math.inf):
        scales = learnable(kind, values=[sign * size] * 8)()
        np.testing.assert_allclose(scales[1:].detach().numpy(), limit, rtol=4 * EPS)
        assert bool((scales[0] == 1.0).all())
    assert not torch.equal(learnable(kind, values=[sign * 2.0] * 8)()[1:], scales[1:])


@pytest.mark.parametrize("sign", [1, -1])
def test_scale_beyond_its_limit_can_come_back(sign):
    module = learnable("layer", values=[sign * (LOG_SCALE_LIMIT + 0.01)])
    (sign * module()[1:].sum()).backward()
    assert sign * grad(module.log_scale).item() > 0


def test_ranks_hold_slices_of_one_table():
    whole = learnable("head", values=NOT_IN_HALF)
    parts = [learnable("head", values=NOT_IN_HALF, local=slice(low, low + 2)) for low in (0, 2)]
    assert torch.equal(torch.cat([part() for part in parts], dim=1), whole())
    for part in parts:
        assert torch.equal(part.all_scales(), whole())
        assert not part.all_scales().requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_are_read_through_the_sum_over_ranks(kind):
    gradients = []
    for sum_over_ranks in (alone, doubled):
        module = learnable(kind, values=NOT_IN_HALF, sum_over_ranks=sum_over_ranks)
        module().sum().backward()
        gradients.append(grad(module.log_scale))
    assert torch.equal(gradients[1], 2 * gradients[0])
    bias = LogWidthBias(0.25, doubled)
    spans = mixed_spans()
    query, _ = bias(random_rows(spans, HEADS), random_rows(spans, GROUPS), spans)
    query[..., -1].sum().backward()
    assert grad(bias.factor).item() == 2 * 4 * spans.start.numel() * HEADS


# Use on heads


def test_query_heads_of_a_group_share_its_scale():
    spans = mixed_spans()
    query = random_rows(spans, 1).expand(-1, -1, HEADS, -1)
    finished_query, finished_key = rotary(learnable("head", values=NOT_IN_HALF))(query, query[:, :, :GROUPS], spans)
    by_group = finished_query.unflatten(2, (GROUPS, HEADS // GROUPS))
    assert torch.equal(by_group[:, :, :, 0], by_group[:, :, :, 1])
    assert torch.equal(by_group[:, :, :, 0], finished_key)
    gist, token = spans.level > 0, spans.level == 0
    for group in range(1, GROUPS):
        assert torch.equal(finished_key[token][:, group], finished_key[token][:, 0])
        assert bool((finished_key[gist][:, group] != finished_key[gist][:, 0]).any(dim=-1).all())


@pytest.mark.parametrize("share", [1, 2, 4])
def test_each_rank_finishes_its_heads_as_one_process_would(share):
    spans = mixed_spans()
    query, key = random_rows(spans, HEADS), random_rows(spans, GROUPS, seed=1)
    whole = rotary(learnable("head", values=NOT_IN_HALF))(query, key, spans)
    per_group = HEADS // GROUPS
    for low in range(0, GROUPS, share):
        module = rotary(learnable("head", values=NOT_IN_HALF, local=slice(low, low + share)))
        heads, groups = slice(low * per_group, (low + share) * per_group), slice(low, low + share)
        local = module(query[:, :, heads], key[:, :, groups], spans)
        assert torch.equal(local[0], whole[0][:, :, heads])
        assert torch.equal(local[1], whole[1][:, :, groups])


def oracle_finished(x, log_scale, kind, spans):
    """Finished rows of x [s, b, n, hn], float64, for log-scales laid out as `kind` says."""
    groups = GROUPS if kind == "head" else 1
    by_level = np.broadcast_to(np.exp(log_scale).reshape(-1, groups), (LEVELS, groups))
    scale = np.concatenate([np.ones((1, groups)), by_level])[spans.level.numpy()]
    scale = np.repeat(scale, x.shape[2] // groups, axis=-1)
    width = spans.width.double().numpy()
    mu = spans.start.double().numpy() + (width - 1) / 2
    sigma = np.vectorize(oracles.uniform_spread)(width)[..., None] * scale
    omega = rotary_frequencies(ROTARY).omega.double().numpy()
    factors = oracles.normal_expectation(omega, mu[..., None, None], sigma[..., None])
    return oracles.multiplied(x.numpy(), factors, interleaved=False)


@pytest.mark.parametrize("kind", KINDS)
def test_learned_rows_are_the_expected_rotation(kind):
    spans = mixed_spans()
    query, key = random_rows(spans, HEADS), random_rows(spans, GROUPS, seed=1)
    module = learnable(kind, values=NOT_IN_HALF)
    logs = module.log_scale.detach().double().numpy()
    for ours, plain in zip(rotary(module)(query, key, spans), (query, key), strict=True):
        expected = oracle_finished(plain, logs, kind, spans)
        np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=0, atol=8 * EPS * plain.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_slopes_of_the_definition(kind):
    spans = mixed_spans()
    plain = random_rows(spans, HEADS), random_rows(spans, GROUPS, seed=1)
    weights = random_rows(spans, HEADS, seed=2), random_rows(spans, GROUPS, seed=3)
    module = learnable(kind, values=[value / 2 for value in NOT_IN_HALF])
    torch.autograd.backward(rotary(module)(*plain, spans), weights)

    def score(logs):
        finished = (oracle_finished(x, logs, kind, spans) for x in plain)
        return sum(float((ours * w.double().numpy()).sum()) for ours, w in zip(finished, weights, strict=True))

    point, step = module.log_scale.detach().double().numpy(), 1e-5
    slopes = [(score(point + step * unit) - score(point - step * unit)) / (2 * step) for unit in np.eye(len(point))]
    # d damping / d log-scale is below 1, so this is what a few roundings of every term can add up to.
    size = sum(float((x.abs() * w.abs()).sum()) for x, w in zip(plain, weights, strict=True))
    assert np.abs(slopes).max() > 1e3 * EPS * size
    np.testing.assert_allclose(grad(module.log_scale).numpy(), slopes, rtol=0, atol=8 * EPS * size)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_teach_the_scales_nothing(kind):
    spans = token_spans()
    module = learnable(kind, values=NOT_IN_HALF)
    finished = rotary(module, renorm="rms")(random_rows(spans, HEADS), random_rows(spans, GROUPS), spans)
    torch.stack([x.square().sum() + x.sum() for x in finished]).sum().backward()
    assert torch.equal(grad(module.log_scale), torch.zeros_like(module.log_scale))


def test_keys_alone_can_teach_the_scales():
    spans = mixed_spans()
    module = learnable("level")
    query, key = rotary(module, sides="k")(random_rows(spans, HEADS), random_rows(spans, GROUPS), spans)
    assert not query.requires_grad
    key.sum().backward()
    assert bool((grad(module.log_scale) != 0).all())


def test_level_beyond_the_table_is_not_a_number():
    spans = SpanMetadata.of_nodes(torch.tensor([[0]]), torch.tensor([[LEVELS + 1]]), BLOCK)
    assert rotary(learnable("level")).sigma(spans).isnan().all()


def test_spread_has_one_group_unless_it_is_learned_per_head():
    spans = mixed_spans()
    base = base_sigma(spans.width, "uniform")
    assert torch.equal(rotary().sigma(spans), base.unsqueeze(-1))
    assert rotary(learnable("level")).sigma(spans).shape == (*spans.start.shape, 1)
    assert rotary(learnable("head")).sigma(spans).shape == (*spans.start.shape, GROUPS)


# Storage


CASTS = {
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "to dtype": lambda module: module.to(torch.bfloat16),
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
    "twice": lambda module: module.bfloat16().half(),
    "and back": lambda module: module.bfloat16().float(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_parameters_stay_fp32_to_the_last_bit_when_the_model_is_cast(cast):
    sigma, bias = learnable("head", values=NOT_IN_HALF), LogWidthBias(0.25, alone)
    torch.nn.init.constant_(bias.factor, NOT_IN_HALF[1])
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2), "rotary": rotary(sigma), "bias": bias})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = [sigma.log_scale, bias.factor]
    CASTS[cast](model)
    assert [sigma.log_scale, bias.factor] == own
    assert all(new is old for new, old in zip([sigma.log_scale, bias.factor], own, strict=True))
    for name, value in model.state_dict().items():
        if not name.startswith("linear"):
            assert value.dtype == torch.float32
            assert torch.equal(value, before[name])
    assert (model["linear"].weight.dtype == torch.float32) == (cast == "and back")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_parameters_move_with_the_model(dtype):
    model = torch.nn.ModuleDict({"rotary": rotary(learnable("level")), "bias": LogWidthBias(0.25, alone)})
    model.to(device="meta", dtype=dtype)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float32)}


def test_gradients_stay_fp32_as_well():
    module = learnable("level", values=NOT_IN_HALF)
    module().sum().backward()
    expected = grad(module.log_scale).clone()
    module.bfloat16()
    assert grad(module.log_scale).dtype == torch.float32
    assert torch.equal(grad(module.log_scale), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_one_dimensional_and_named_for_checkpoints(kind):
    sigma = learnable(kind)
    model = torch.nn.ModuleDict({"rotary": rotary(sigma), "log_width_bias": LogWidthBias(0.25, alone)})
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shapes == {"rotary.sigma_scale.log_scale": (SIZES[kind],), "log_width_bias.factor": (1,)}
    state = {name: value + 0.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert sigma.log_scale[0] == 0.5


# Log-width bias


def biased(beta, dtype=torch.float32, scale=0.25):
    spans = mixed_spans()
    query, key = (random_rows(spans, heads, seed).to(dtype) for heads, seed in ((HEADS, 0), (GROUPS, 1)))
    bias = LogWidthBias(scale, alone)
    torch.nn.init.constant_(bias.factor, beta)
    return spans, query, key, bias, bias(query, key, spans)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.25, 1 / math.sqrt(48)])
def test_log_width_bias_adds_beta_ln_w_to_the_logits(dtype, scale):
    beta = 0.7
    spans, query, key, _, (long_query, long_key) = biased(beta, dtype, scale)
    assert long_query.dtype == long_key.dtype == dtype
    assert torch.equal(long_query[..., :-1], query)
    assert torch.equal(long_key[..., :-1], key)
    added = torch.einsum("ibn,jbm->bnmij", long_query[..., -1].double(), long_key[..., -1].double()) * scale
    expected = beta * spans.width.double().log().T[:, None, None, None, :].expand_as(added)
    # beta / scale and ln w are each rounded to the dtype, and to fp32 on the way.
    unit = max(EPS, torch.finfo(dtype).eps)
    torch.testing.assert_close(added, expected, rtol=2.5 * unit, atol=0)
    assert bool((added[..., spans.width.T[0] == 1][0] == 0).all())


def test_log_width_bias_starts_as_no_bias():
    spans, query, key, _, (long_query, long_key) = biased(0.0)
    plain, long = (
        torch.einsum("ibnh,jbnh->bnij", q[:, :, :GROUPS].double(), k.double())
        for q, k in ((query, key), (long_query, long_key))
    )
    assert torch.equal(plain, long)
    assert spans.width.max() == BLOCK**2


def test_log_width_bias_makes_a_gist_count_as_w_to_the_beta_tokens():
    beta, width = 1.0, 32
    spans = SpanMetadata.of_nodes(torch.tensor([[0], [width]]), torch.tensor([[1], [0]]), BLOCK)
    bias = LogWidthBias(0.25, alone)
    torch.nn.init.constant_(bias.factor, beta)
    query, key = bias(torch.zeros(2, 1, 1, 16), torch.zeros(2, 1, 1, 16), spans)
    shares = torch.softmax(0.25 * (query[1, 0, 0] * key[:, 0, 0]).sum(-1), dim=-1)
    np.testing.assert_allclose(shares.detach().numpy(), [width / (width + 1), 1 / (width + 1)], rtol=16 * EPS)


def test_log_width_bias_learns_from_gists():
    spans, _, _, bias, (long_query, long_key) = biased(0.3)
    logits = 0.25 * torch.einsum("ibn,jbn->bnij", long_query[:, :, :GROUPS, -1].double(), long_key[..., -1].double())
    logits.sum().backward()
    rows = spans.start.shape[0]
    expected = rows * GROUPS * spans.width.double().log().sum().item()
    assert grad(bias.factor).item() == pytest.approx(expected, rel=64 * EPS)
    assert not long_key.requires_grad
