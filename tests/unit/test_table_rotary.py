"""Rotation by a layer's own frequencies and by contextual places, in PyTorch and on the kernels."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from megacontext_megatron.config import GaussianRopeConfig, RotaryConfig
from megacontext_megatron.encoding_config import ClexConfig, GrapeMConfig, MultiscaleConfig, YarnRule
from megacontext_megatron.kernels.rotary_arguments import QKNorm
from megacontext_megatron.kernels.table_rotary import TableRotary
from megacontext_megatron.position.contextual import ContextualSteps
from megacontext_megatron.position.frequencies import rotary_frequencies
from megacontext_megatron.position.gaussian import GaussianRotary, LearnableSigma
from megacontext_megatron.position.heads import HeadShare
from megacontext_megatron.position.layer_frequencies import layer_frequencies
from megacontext_megatron.spans.metadata import SpanMetadata
from tests import oracles

EPS = torch.finfo(torch.float32).eps
HALF = EPS / 2
HEADS, GROUPS, WIDTH, HIDDEN, BLOCK, LEVELS = 4, 2, 16, 6, 32, 2
PAIRS = WIDTH // 2
KINDS = {
    "shared": GrapeMConfig(),
    "per head": GrapeMConfig(per_head=True),
    "fixed": GrapeMConfig(learnable=False),
    "clex": ClexConfig(original_length=2048, step=0.5),
    "multiscale": MultiscaleConfig(),
}
LEARNED = ("shared", "per head", "clex")
BACKENDS = ("torch", "triton")


def alone(value):
    """Stand on a tensor-parallel group of one."""
    return value


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotary(
    kind="shared", *, backend: Any = "torch", spread=0.1, share=None, contextual=False, sigma: Any = "none", **settings
):
    """Return a module whose parameters have moved away from where they start."""
    interleaved, percent = settings.pop("interleaved", False), settings.pop("percent", 1.0)
    asked = RotaryConfig(
        head_dim=WIDTH,
        interleaved=interleaved,
        percent=percent,
        by_layer=KINDS[kind],
        length=settings.pop("length", 4096),
    )
    share = share or HeadShare(heads=HEADS, groups=GROUPS, width=WIDTH)
    learnable = None
    if sigma != "none":
        learnable = LearnableSigma(sigma, LEVELS, GROUPS, share.local_groups, alone)
    steps = ContextualSteps(HIDDEN, 16.0, alone) if contextual else None
    module = TableRotary(
        GaussianRopeConfig(learnable_sigma=sigma, **settings),
        asked,
        layer_frequencies(asked, share, alone, 1),
        learnable,
        steps=steps,
        backend=backend,
    )
    with torch.no_grad():
        for at, (name, parameter) in enumerate(module.named_parameters()):
            scale = 16 * spread if "log_freq" in name else 4 * spread
            parameter += scale * numbers(*parameter.shape, seed=at, dtype=torch.float32)
    return module


def mixed_spans(first=0):
    """Rows of all levels in both columns, [6, 2]."""
    start = torch.tensor([[0, 1024], [1024, 2048], [1056, 3072], [1088, 3104], [1089, 3136], [1090, 3137]])
    level = torch.tensor([[2, 2], [1, 2], [1, 1], [0, 1], [0, 0], [0, 0]])
    return SpanMetadata.of_nodes(start + first, level, BLOCK)


def tokens(rows=6, first=0):
    start = torch.arange(first, first + rows).unsqueeze(1).expand(rows, 2)
    return SpanMetadata.of_nodes(start, torch.zeros_like(start), BLOCK)


def heads_of(spans, dtype=torch.float64):
    rows = spans.start.shape
    return numbers(*rows, HEADS, WIDTH, dtype=dtype), numbers(*rows, GROUPS, WIDTH, seed=1, dtype=dtype)


def hidden_of(spans):
    return numbers(*spans.start.shape, HIDDEN, seed=2)


def carried(spans):
    """Return the carrier of rows [s, b], and their metadata as layers unpack it."""
    fields = {f.name: getattr(spans, f.name).mT for f in dataclasses.fields(spans)[:4]}
    carrier = SpanMetadata(**fields).pack("uniform")
    return carrier, SpanMetadata.unpack(carrier)


def definition(module, spans, place=None, spread=None):
    """Return what queries and keys of each group are multiplied by, complex128 [s, b, 1 or groups, r]."""
    omega = module.frequencies(torch.device("cpu")).detach().double().numpy()
    width = spans.width.double().numpy()
    place = spans.start.double().numpy() + (width - 1) / 2 if place is None else place
    spread = np.vectorize(oracles.uniform_spread)(width) if spread is None else spread
    return oracles.normal_expectation(omega, place[..., None, None], spread[..., None, None])


def over(heads, factors):
    return factors.repeat(heads // factors.shape[2], axis=2) if factors.shape[2] > 1 else factors


# Rotations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("interleaved", "percent"), [(False, 1.0), (True, 1.0), (False, 0.5)])
def test_rows_are_turned_and_damped_by_the_layers_frequencies(kind, interleaved, percent):
    spans = mixed_spans()
    module, plain = rotary(kind, interleaved=interleaved, percent=percent), heads_of(spans)
    factors = definition(module, spans)
    assert factors.shape[2] == (GROUPS if kind in ("per head", "multiscale") else 1)
    for found, x in zip(module(*plain, spans), plain, strict=True):
        expected = oracles.multiplied(x.numpy(), over(x.shape[2], factors), interleaved=interleaved)
        # The definition's angles of up to 2^13 are rounded to float64; sigma is fp32, and damps up to 2^-30 here.
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=64 * HALF * np.abs(x.numpy()).max())
        assert np.abs(expected - x.numpy()).max() > 1


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_is_the_exponential_of_its_generator(interleaved):
    """2512.07805, section 2: G(n) = exp(n sum_j omega_j (b_j a_j^T - a_j b_j^T)) for the planes (a_j, b_j)."""
    spans, module = tokens(first=3), rotary("per head", interleaved=interleaved)
    omega = module.frequencies(torch.device("cpu")).detach().double()
    unit = torch.eye(WIDTH, dtype=torch.float64)
    first, second = (unit[0::2], unit[1::2]) if interleaved else (unit[:PAIRS], unit[PAIRS:])
    planes = torch.einsum("jx,jy->jxy", second, first) - torch.einsum("jx,jy->jxy", first, second)
    generator = torch.einsum("gj,jxy->gxy", omega, planes)
    turns = torch.matrix_exp(spans.start[:, 0].double()[:, None, None, None] * generator)
    for found, x in zip(module(*heads_of(spans), spans), heads_of(spans), strict=True):
        of_heads = turns.repeat_interleave(x.shape[2] // GROUPS, dim=1)
        expected = torch.einsum("snxy,sbny->sbnx", of_heads, x)
        np.testing.assert_allclose(found.detach().numpy(), expected.numpy(), atol=1e-12)


def authors_rotation(x, angles):
    """Return x [s, b, n, hn] turned as GRAPE's code turns it, by angles [s, b, n, r]: the other way round."""
    one, other = x[..., :PAIRS], x[..., PAIRS:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos + other * sin, -one * sin + other * cos], dim=-1)


@pytest.mark.parametrize("contextual", [False, True])
def test_scores_are_the_authors(contextual):
    """Their rotation is ours with the second channel of every plane reversed."""
    spans, module = tokens(), rotary("shared", contextual=contextual)
    hidden, plain = hidden_of(spans), heads_of(spans)
    query, key = (x.detach() for x in module(*plain, spans, hidden))
    freq = torch.exp(module.state_dict()["frequencies.log_freq"].double() / 16.0)
    place = torch.arange(6, dtype=torch.float64).unsqueeze(1).expand(6, 2)
    if contextual:
        assert module.steps is not None
        weight, bias = (p.detach().double() for p in (module.steps.weight, module.steps.bias))
        omega = torch.sigmoid((hidden @ weight + bias) / 16.0)
        place = torch.cumsum(omega, dim=0) - omega
    reverse = torch.ones(WIDTH, dtype=torch.float64)
    reverse[PAIRS:] = -1
    query_, key_ = (authors_rotation(x * reverse, place[:, :, None, None] * freq) for x in plain)
    found = torch.einsum("ibnx,jbnx->bnij", query[:, :, ::2], key)
    expected = torch.einsum("ibnx,jbnx->bnij", query_[:, :, ::2], key_)
    # Frequencies are stored in fp32, and contextual places hold fp32 quarters of a step.
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=64 * HALF * found.abs().max().item())


@pytest.mark.parametrize("first", [0, 10**6])
def test_layers_start_as_rope(first):
    spans = tokens(first=first)
    plain = heads_of(spans, torch.float32)
    settings = RotaryConfig(head_dim=WIDTH)
    stock = GaussianRotary(GaussianRopeConfig(), rotary_frequencies(settings), False)(*plain, spans)
    fixed, shared, per_head = (rotary(kind, spread=0.0)(*plain, spans) for kind in ("fixed", "shared", "per head"))
    omega = oracles.inverse_frequencies(WIDTH, 10_000)
    # A stored logarithm is rounded by half a unit, so the frequency by |ln omega| of those, and the exponential by one.
    turned = first * (omega * (1 + np.abs(np.log(omega)))).max() * HALF
    for ours in zip(stock, fixed, shared, per_head, strict=True):
        assert torch.equal(ours[1], ours[0])
        assert torch.equal(ours[3], ours[2])
        assert (ours[2] - ours[0]).abs().max() <= (turned + 8 * EPS) * 1.5 * ours[0].abs().max()
    assert first == 0 or not torch.equal(stock[0], shared[0])


@pytest.mark.parametrize("kind", ["per head", "multiscale"])
def test_query_heads_turn_as_the_key_of_their_group(kind):
    """The relative law under grouped queries: scores know only distances, and groups differ."""
    near, far = mixed_spans(), mixed_spans(first=2**40)
    module, (query, key) = rotary(kind), heads_of(near)
    scores = []
    for spans in (near, far):
        q, k = (x.detach() for x in module(query, key, spans))
        scores.append(torch.einsum("ibgnx,jbgx->bgnij", q.unflatten(2, (GROUPS, -1)), k))
    assert not torch.equal(*(module(query, key, spans)[0] for spans in (near, far)))
    assert (scores[0] - scores[1]).abs().max() < 1e-9
    same = query[:, :, :1].expand(-1, -1, HEADS, -1)
    turned, _ = module(same, key, near)
    assert torch.equal(turned[:, :, 0], turned[:, :, 1])
    assert not torch.equal(turned[:, :, 0], turned[:, :, 2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("contextual", [False, True])
def test_a_rank_finishes_its_heads_as_one_process_would(kind, contextual):
    spans = mixed_spans()
    query, key = heads_of(spans)
    query_, key_ = rotary(kind, contextual=contextual, sigma="head")(query, key, spans, hidden_of(spans))
    for rank in range(2):
        share = HeadShare(heads=HEADS, groups=GROUPS, width=WIDTH, ranks=2, rank=rank)
        module = rotary(kind, contextual=contextual, sigma="head", share=share)
        heads, groups = share.local_heads, share.local_groups
        q, k = module(query[:, :, heads], key[:, :, groups], spans, hidden_of(spans))
        assert torch.equal(q, query_[:, :, heads])
        assert torch.equal(k, key_[:, :, groups])


# Contextual places


def test_contextual_spans_are_expected_over_their_own_steps():
    """A row of w tokens lies evenly on w places, a step apart, behind those of the rows before it."""
    spans, module = mixed_spans(), rotary("shared", contextual=True)
    hidden, plain = hidden_of(spans), heads_of(spans)
    assert module.steps is not None
    weight, bias = (p.detach().double() for p in (module.steps.weight, module.steps.bias))
    step = torch.sigmoid((hidden @ weight + bias) / 16).numpy()
    width = spans.width.numpy()
    place, spread = np.zeros((6, 2)), np.zeros((6, 2))
    for row, column in np.ndindex(6, 2):
        before = (step * width)[:row, column].sum()
        places = before + step[row, column] * np.arange(int(width[row, column]))
        place[row, column], spread[row, column] = places.mean(), places.std()
    assert spread.max() > 100
    factors = definition(module, spans, place, spread)
    for found, x in zip(module(*plain, spans, hidden), plain, strict=True):
        expected = oracles.multiplied(x.numpy(), factors, interleaved=False)
        np.testing.assert_allclose(found.detach().numpy(), expected, atol=128 * HALF * np.abs(x.numpy()).max(), rtol=0)


def test_contextual_places_need_the_attentions_input():
    spans = tokens()
    with pytest.raises(RuntimeError, match="need the attention's input"):
        rotary(contextual=True)(*heads_of(spans), spans)


# Gradients


def scores_of(query, key):
    return torch.einsum("ibgnx,jbgx->bgnij", query.unflatten(2, (key.shape[2], -1)), key).tril()


@pytest.mark.parametrize("first", [0, 10**9])
@pytest.mark.parametrize("contextual", [False, True])
@pytest.mark.parametrize("kind", ["shared", "per head"])
def test_gradients_are_those_of_the_definition(kind, contextual, first):
    """Through scores, as only distances count; parameters of GRAPE-M, of steps, and of sigma by group."""
    spans = mixed_spans(first)
    module = rotary(kind, contextual=contextual, sigma="head", length=2 * first + 4096)
    hidden, plain = hidden_of(spans).requires_grad_(), [x.requires_grad_() for x in heads_of(spans)]
    loss = numbers(2, GROUPS, HEADS // GROUPS, 6, 6, seed=5)
    (scores_of(*module(*plain, spans, hidden)) * loss).sum().backward()
    leaves = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    omega = (leaves["frequencies.log_freq"] / 16).exp().view(-1, PAIRS)
    scales = torch.cat([torch.zeros(1, GROUPS), leaves["sigma_scale.log_scale"].view(LEVELS, GROUPS)]).exp()
    width = spans.width.double()
    sigma = (((width**2 - 1) / 12).sqrt().unsqueeze(-1) * scales[spans.level.long()]).unsqueeze(-1)
    place = spans.start.double() - first + (width - 1) / 2
    if contextual:
        step = torch.sigmoid((hidden @ leaves["steps.weight"] + leaves["steps.bias"]) / 16)
        place = (step * width).cumsum(0) - step * width + step * (width - 1) / 2
        sigma = sigma * step[..., None, None]
    factors = torch.polar(torch.exp(-((sigma * omega) ** 2) / 2), place[..., None, None] * omega)
    turned = []
    for x in plain:
        numbers_ = torch.complex(x[..., :PAIRS], x[..., PAIRS:])
        numbers_ = numbers_ * factors.repeat_interleave(x.shape[2] // GROUPS, dim=2)
        turned.append(torch.cat([numbers_.real, numbers_.imag], dim=-1))
    total = (scores_of(*turned) * loss).sum()
    inputs = [*plain, *([hidden] if contextual else [])]
    expected = torch.autograd.grad(total, [*inputs, *leaves.values()])
    found = [x.grad for x in (*inputs, *module.parameters())]
    for name, one, right in zip(["query", "key", *inputs[2:], *leaves], found, expected, strict=True):
        assert one is not None, name
        assert right.abs().max() > 1e-3, name
        # Angles of 4096 steps of fp32 frequencies that were rounded when stored, times distances as large.
        np.testing.assert_allclose(one.numpy(), right.numpy(), rtol=1e-4, atol=1e-5 * right.abs().max().item())


def test_far_histories_keep_the_digits_of_gradients():
    """Distances are counted from the middle of the history: in fp32 a place of 10^9 tokens is known to 64 of them."""
    found = {}
    for first, length in ((0, 4096), (10**9, 2 * 10**9 + 4096), (10**9, 0)):
        spans, module = mixed_spans(first), rotary("per head", length=length)
        scores_of(*module(*heads_of(spans, torch.float32), spans)).square().sum().backward()
        found[first, length] = next(module.parameters()).grad
    near, far, lost = found.values()
    assert near is not None
    bound = 1e-4 * near.abs().max()
    assert (far - near).abs().max() < bound
    assert (lost - near).abs().max() > 10 * bound


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("sigma", ["none", "level"])
def test_tokens_and_gists_teach_every_frequency(kind, sigma):
    spans = mixed_spans()
    module = rotary(kind, sigma=sigma)
    scores_of(*module(*heads_of(spans), spans)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.count_nonzero() >= 0.7 * parameter.numel(), name


# The kernels


@pytest.mark.parametrize(
    ("kind", "contextual", "sigma"),
    [
        ("shared", False, "none"),
        ("shared", True, "head"),
        ("per head", False, "head"),
        ("per head", True, "none"),
        ("multiscale", False, "level"),
    ],
)
def test_kernels_are_the_plain_rotation(kind, contextual, sigma):
    _, spans = carried(mixed_spans())
    hidden = hidden_of(spans).float()
    plain = heads_of(spans, torch.float32)
    weights = [x.float() for x in heads_of(tokens())]
    found = []
    for backend in BACKENDS:
        module = rotary(kind, backend=backend, contextual=contextual, sigma=sigma, percent=0.5, sides="k")
        leaves = [x.clone().requires_grad_() for x in (*plain, hidden)]
        outputs = module(*leaves[:2], spans, leaves[2])
        torch.autograd.backward(outputs, weights)
        gradients = [x.grad for x in (*leaves, *module.parameters()) if x.grad is not None]
        assert len(gradients) == 2 + contextual + len(list(module.parameters()))
        found.append([*outputs, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=2e-5 * one.abs().max().item())


@pytest.mark.parametrize(
    ("backend", "contextual", "sigma"),
    [
        ("torch", False, "none"),
        ("torch", False, "level"),
        ("torch", True, "level"),
        ("triton", False, "none"),
        ("triton", True, "none"),
    ],
)
def test_a_mixed_projection_is_split_into_the_same(backend, contextual, sigma):
    carrier, spans = carried(mixed_spans())
    module, hidden = rotary("per head", backend=backend, contextual=contextual, sigma=sigma), hidden_of(spans).float()
    query, key = heads_of(spans, torch.float32)
    mixed = torch.cat([query.unflatten(2, (GROUPS, -1)).flatten(3), key, 2 * key], dim=3)
    expected = module(query, key, spans, hidden)
    *found, value = module.split(mixed, WIDTH, carrier, None, hidden)
    assert torch.equal(value, 2 * key)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=8 * EPS * query.abs().max().item())
    weight = torch.linspace(0.5, 2, WIDTH)
    norm = QKNorm(query_weight=weight, key_weight=weight.flip(0), eps=1e-5)
    normed = [torch.nn.functional.rms_norm(x, (WIDTH,), w, 1e-5) for x, w in ((query, weight), (key, weight.flip(0)))]
    *found, _ = module.split(mixed, WIDTH, carrier, norm, hidden)
    for one, other in zip(found, module(*normed, spans, hidden), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=16 * EPS * 2 * query.abs().max().item())


@pytest.mark.parametrize(("backend", "kind"), [("triton", "fixed"), *(("torch", kind) for kind in KINDS)])
def test_a_module_first_used_in_a_validation_trains(backend, kind):
    spans, module = mixed_spans(), rotary(kind, backend=backend)
    query, key = heads_of(spans, torch.float32)
    with torch.inference_mode():
        before = module(query, key, spans)[0].clone()
    after, _ = module(query.requires_grad_(), key, spans)
    assert torch.equal(after, before)
    after.sum().backward()
    assert query.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_changed_parameters_change_the_next_rotation(backend):
    """No table outlives what it was made of."""
    for kind in LEARNED if backend == "torch" else ("shared",):
        spans, module = mixed_spans(), rotary(kind, backend=backend)
        query, key = heads_of(spans, torch.float32)
        before, _ = module(query, key, spans)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.3
        after, _ = module(query, key, spans)
        assert (after - before).abs().max() > 1e-3
        expected = oracles.multiplied(query.numpy(), over(HEADS, definition(module, spans)), interleaved=False)
        np.testing.assert_allclose(after.detach().numpy(), expected, rtol=0, atol=64 * EPS)


# Storage and refusals


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("shared", {"frequencies.log_freq"}),
        ("per head", {"frequencies.log_freq"}),
        ("fixed", set()),
        ("multiscale", set()),
        ("clex", {"frequencies.up", "frequencies.down"}),
    ],
)
def test_keys_of_checkpoints(kind, names):
    module = rotary(kind, contextual=True, sigma="head")
    assert set(module.state_dict()) == names | {"steps.weight", "steps.bias", "sigma_scale.log_scale"}
    assert {p.dim() for p in module.parameters()} == {1}
    assert set(rotary(kind).state_dict()) == names


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_computed_is_refused(backend):
    asked = RotaryConfig(head_dim=WIDTH, by_layer=KINDS["shared"])
    source = layer_frequencies(asked, HeadShare(heads=HEADS, groups=GROUPS, width=WIDTH), alone, 1)
    for config in (GaussianRopeConfig(phase="megatron"), GaussianRopeConfig(renorm="rms")):
        with pytest.raises(ValueError, match="exact phases"):
            TableRotary(config, asked, source, backend=backend)
    factor = dataclasses.replace(asked, rule=YarnRule(factor=4.0, original_length=64))
    with pytest.raises(ValueError, match="no factors"):
        TableRotary(GaussianRopeConfig(), factor, source, backend=backend)
