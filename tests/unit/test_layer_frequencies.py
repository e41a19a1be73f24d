"""Frequencies that a layer finds itself: GRAPE-M, CLEX, multiscale."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torchdiffeq import odeint

from megacontext_megatron.config import RotaryConfig
from megacontext_megatron.encoding_config import ClexConfig, GrapeMConfig, MultiscaleConfig
from megacontext_megatron.position.clex import ClexFrequencies
from megacontext_megatron.position.contextual import ContextualSteps
from megacontext_megatron.position.heads import HeadShare
from megacontext_megatron.position.layer_frequencies import layer_frequencies
from tests import oracles
from tests.sums_over_ranks import alone, doubled

HALF = 2.0**-24
"""Half a unit of fp32, relative to a number."""
CPU = torch.device("cpu")
HEADS, GROUPS, WIDTH = 8, 4, 16
GRAPES = {"shared": GrapeMConfig(), "per head": GrapeMConfig(per_head=True)}


def share_of(rank=0, ranks=1, groups=GROUPS):
    return HeadShare(heads=HEADS, groups=groups, width=WIDTH, ranks=ranks, rank=rank)


def frequencies(config, share=None, sum_over_ranks=alone, *, layer=1, spread=0.0, **rotary) -> Any:
    """Return the module of `config`, its parameters moved by normal numbers of size `spread`."""
    asked = RotaryConfig(head_dim=rotary.pop("head_dim", WIDTH), by_layer=config, **rotary)
    module = layer_frequencies(asked, share or share_of(), sum_over_ranks, layer)
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=source)
    return module


def grads(module):
    """Return the gradients of a module's parameters by name."""
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def clex(t=3, **settings):
    return ClexConfig(original_length=100, **{"step": 0.05, **settings}), {"length": 100 * t}


# GRAPE-M


@pytest.mark.parametrize("kind", GRAPES)
@pytest.mark.parametrize(
    "rotary", [{}, {"base": 1_000_000, "head_dim": 128}, {"percent": 0.5}, {"interpolation": 4}], ids=str
)
def test_grape_starts_as_rope(kind, rotary):
    module = frequencies(GRAPES[kind], **rotary)
    channels = int(rotary.get("head_dim", WIDTH) * rotary.get("percent", 1.0))
    plain = oracles.inverse_frequencies(channels, rotary.get("base", 10_000), rotary.get("interpolation", 1.0))
    omega = module(CPU)
    assert omega.shape == (GROUPS if kind == "per head" else 1, channels // 2)
    assert omega.dtype == torch.float32
    # Megatron's fp32 power and division, then 16 ln omega and omega rounded to fp32.
    bound = plain * HALF * (4 + np.abs(np.log(plain)))
    assert bool((np.abs(omega.detach().numpy() - plain) <= bound).all())
    assert torch.equal(omega, frequencies(GrapeMConfig(), **rotary)(CPU).expand_as(omega))


def test_grape_that_does_not_learn_is_rope_to_the_last_bit_and_has_no_parameters():
    for per_head in (False, True):
        module = frequencies(GrapeMConfig(learnable=False, per_head=per_head))
        assert not list(module.state_dict())
        assert not list(module.parameters())
        omega = module(CPU)
        assert not omega.requires_grad
        stock = 1.0 / (10_000 ** (torch.arange(0, WIDTH, 2, dtype=torch.float32) / WIDTH))
        assert torch.equal(omega, stock.unsqueeze(0))


@pytest.mark.parametrize("scale", [1.0, 16.0])
@pytest.mark.parametrize("per_head", [False, True])
def test_grape_is_the_exponential_of_what_is_stored(scale, per_head):
    module = frequencies(GrapeMConfig(per_head=per_head, log_freq_scale=scale), spread=0.3 * scale)
    omega = module(CPU)
    stored = module.log_freq.detach().double().numpy().reshape(-1, WIDTH // 2)
    expected = np.exp(stored / scale)
    np.testing.assert_allclose(omega.detach().numpy(), expected, rtol=1.01 * HALF)
    weights = torch.randn(omega.shape, generator=torch.Generator().manual_seed(1))
    (omega * weights).sum().backward()
    slopes = expected * weights.double().numpy() / scale
    np.testing.assert_allclose(grads(module)["log_freq"].numpy(), slopes.ravel(), rtol=3 * HALF)


def test_query_groups_have_rates_of_their_own():
    module = frequencies(GrapeMConfig(per_head=True), spread=1.0)
    assert module.log_freq.shape == (GROUPS * WIDTH // 2,)
    omega = module(CPU).detach()
    assert omega.shape == (GROUPS, WIDTH // 2)
    assert all(not torch.equal(omega[0], omega[group]) for group in range(1, GROUPS))


# Multiscale


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_multiscale_bases_are_log_spaced_over_query_groups(groups):
    module = frequencies(MultiscaleConfig(low=1e2, high=1e6), share_of(groups=groups), interpolation=2)
    bases = {1: [1e4], 2: [1e2, 1e6], 4: [1e2, 10 ** (10 / 3), 10 ** (14 / 3), 1e6]}[groups]
    expected = np.stack([oracles.inverse_frequencies(WIDTH, base, 2.0) for base in bases])
    np.testing.assert_allclose(module(CPU).numpy(), expected, rtol=1.01 * HALF)
    assert not list(module.state_dict())


# CLEX


@pytest.mark.parametrize(
    ("length", "t"), [(0, 1), (1, 1), (100, 1), (101, 2), (200, 2), (201, 3), (1500, 15), (10**9, 16)]
)
def test_clex_starts_as_static_ntk_of_twice_the_ratio(length, t):
    config = ClexConfig(original_length=100, step=0.5)
    module = frequencies(config, length=length)
    assert module.t == t
    base = 10_000 * (2 * t - 1) ** (WIDTH / (WIDTH - 2))
    expected = oracles.inverse_frequencies(WIDTH, base)
    np.testing.assert_allclose(module(CPU)[0].detach().numpy(), expected, rtol=5 * HALF)


def authors_rate(up, down, activation, base=10_000):
    """Return CLEX's dy/dt as clex_layer.py has it, float64."""
    index = torch.arange(0, WIDTH, 2, dtype=torch.float64)

    def rate(t, y):
        alpha = 2 * t - 1
        ntk = 1 / (base * alpha ** (WIDTH / (WIDTH - 2))) ** (index / WIDTH)
        slope = -2 * index / (WIDTH - 2) / (base ** (index / WIDTH) * alpha ** (index / (WIDTH - 2) + 1))
        return activation((y + ntk.log()) @ up) @ down + slope / ntk

    return rate, -index / WIDTH * math.log(base)


def solved(rate, start, t, step) -> torch.Tensor:
    """Return the solution at t of torchdiffeq's rk4 from 1."""
    times = torch.tensor([1.0, t], dtype=torch.float64)
    solution: Any = odeint(rate, start, times, method="rk4", options={"step_size": step})
    return solution[1]


@pytest.mark.parametrize("activation", ["tanh", "silu"])
@pytest.mark.parametrize("t", [2, 4])
def test_clex_is_the_authors_equation_integrated_by_torchdiffeq(activation, t):
    config, length = clex(t, activation=activation, step=0.02, hidden_factor=1.5)
    module = frequencies(config, spread=0.05, **length)
    omega = module(CPU)[0]
    leaves = [p.detach().double().requires_grad_() for p in (module.up, module.down)]
    up, down = leaves[0].view(WIDTH // 2, -1), leaves[1].view(-1, WIDTH // 2)
    assert up.shape[1] == 24
    act = torch.nn.functional.silu if activation == "silu" else torch.tanh
    rate, start = authors_rate(up, down, act)
    log_omega = solved(rate, start, t, config.step)
    assert (log_omega.detach() - start).abs().max() > 0.3
    # Integrating y itself instead of its distance from NTK errs by 3e-9; the first frequencies are Megatron's in fp32.
    np.testing.assert_allclose(omega.detach().numpy(), log_omega.exp().detach().numpy(), rtol=5 * HALF)
    weights = torch.randn(WIDTH // 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (omega.double().log() * weights).sum().backward()
    expected = torch.autograd.grad((log_omega * weights).sum(), leaves)
    for found, right in zip(grads(module).values(), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), right.numpy(), rtol=1e-5, atol=1e-6 * right.abs().max().item())
        assert right.abs().max() > 1e-3


@pytest.mark.parametrize("t", [2, 4])
def test_clex_steps_as_torchdiffeqs_rk4(t):
    """With steps of 1/2 other rules of order 4 differ."""
    config, length = clex(t, step=0.5)
    module = frequencies(config, spread=0.3, **length)
    up = module.up.detach().double().view(WIDTH // 2, -1)
    down = module.down.detach().double().view(-1, WIDTH // 2)
    index = torch.arange(WIDTH // 2, dtype=torch.float64)
    plain = -2 * index / WIDTH * math.log(10_000)

    def ntk(time):
        return plain - index / (WIDTH / 2 - 1) * torch.log(2 * time - 1)

    def rate(time, moved):
        return torch.tanh((moved + 2 * ntk(time)) @ up) @ down

    moved = solved(rate, torch.zeros_like(plain), t, 0.5)
    np.testing.assert_allclose(
        module(CPU)[0].detach().numpy(), (ntk(torch.tensor(t)) + moved).exp().numpy(), rtol=5 * HALF
    )
    classic = torch.zeros_like(plain)
    for step in range(2 * (t - 1)):
        at = torch.tensor(1 + step / 2)
        first = rate(at, classic)
        second = rate(at + 0.25, classic + first / 4)
        third = rate(at + 0.25, classic + second / 4)
        classic = classic + (first + 2 * (second + third) + rate(at + 0.5, classic + third / 2)) / 12
    assert (classic - moved).abs().max() > 100 * HALF


def test_clex_of_a_short_history_gives_gradients_of_zero():
    """Megatron waits for a gradient of every parameter."""
    config, _ = clex()
    module = frequencies(config, spread=0.3, length=50)
    module(CPU).sum().backward()
    assert all(not gradient.any() for gradient in grads(module).values())


def test_clex_is_not_rounded_under_autocast():
    config, length = clex()
    module = frequencies(config, spread=0.1, **length)
    with torch.autocast("cpu", torch.bfloat16):
        inside = module(CPU)
    assert torch.equal(inside, module(CPU))


def test_clex_starts_from_uniform_numbers_that_depend_on_the_layer_alone():
    config, length = clex(hidden_factor=40)
    first, again, other = (frequencies(config, layer=layer, **length) for layer in (1, 1, 2))
    assert isinstance(first, ClexFrequencies)
    bound = (40 * WIDTH) ** -0.5
    assert torch.equal(first.up, again.up)
    assert not torch.equal(first.up, other.up)
    assert first.up.shape == first.down.shape == (WIDTH // 2 * 40 * WIDTH,)
    assert 0.99 * bound < first.up.max() <= bound
    # Standard deviation of the mean of 5120 numbers is 0.008 of the bound.
    assert first.up.mean().abs() < 0.04 * bound
    assert first.up.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not first.down.any()


def test_clex_of_one_pair_keeps_its_frequency():
    config, length = clex()
    assert frequencies(config, head_dim=2, **length)(CPU).tolist() == [[1.0]]


# Ranks


LEARNED = {**GRAPES, "clex": clex()[0]}


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_hold_slices_and_their_gradients_add_up(kind, ranks):
    settings = {"spread": 0.2, "length": 300}
    whole = frequencies(LEARNED[kind], **settings)
    weights = torch.randn(GROUPS, WIDTH // 2, generator=torch.Generator().manual_seed(2))
    omega = whole(CPU).expand(GROUPS, -1)
    (omega * weights).sum().backward()
    total = dict.fromkeys(grads(whole), torch.zeros(()))
    for rank in range(ranks):
        share = share_of(rank, ranks)
        part = frequencies(LEARNED[kind], share, **settings)
        local = part(CPU).expand(GROUPS // ranks, -1)
        assert torch.equal(local, omega[share.local_groups])
        (local * weights[share.local_groups]).sum().backward()
        for name, gradient in grads(part).items():
            total[name] = total[name] + gradient
            assert not torch.equal(gradient, grads(whole)[name])
    for name, gradient in grads(whole).items():
        bound = 8 * HALF * gradient.abs().max().item() * 4
        torch.testing.assert_close(total[name], gradient, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", LEARNED)
def test_replicas_are_read_through_the_sum_over_ranks(kind):
    found = []
    for sum_over_ranks in (alone, doubled):
        module = frequencies(LEARNED[kind], sum_over_ranks=sum_over_ranks, spread=0.2, length=300)
        module(CPU).sum().backward()
        found.append(grads(module))
    for name, gradient in found[0].items():
        assert gradient.any()
        assert torch.equal(found[1][name], 2 * gradient)


def test_fixed_frequencies_of_ranks_are_slices():
    for config in (MultiscaleConfig(), GrapeMConfig(learnable=False)):
        whole = frequencies(config)(CPU).expand(GROUPS, -1)
        for rank in range(2):
            local = frequencies(config, share_of(rank, 2))(CPU).expand(2, -1)
            assert torch.equal(local, whole[2 * rank : 2 * rank + 2])


def test_what_cannot_be_had_is_refused():
    with pytest.raises(ValueError, match="no layer finds"):
        layer_frequencies(RotaryConfig(head_dim=WIDTH), share_of(), alone, 1)
    for config in (GrapeMConfig(per_head=True), MultiscaleConfig()):
        with pytest.raises(ValueError, match="2 query groups with frequencies of their own for 4 ranks"):
            frequencies(config, share_of(0, 4, groups=2))
    frequencies(GrapeMConfig(), share_of(0, 4, groups=2))


# Storage


CASTS = {
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "to": lambda module: module.to(torch.bfloat16),
    "and back": lambda module: module.bfloat16().float(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", [*LEARNED, "fixed", "multiscale", "steps"])
def test_casting_a_model_changes_no_bit(kind, cast):
    if kind == "steps":
        module = ContextualSteps(6, 16.0, alone)
        torch.nn.init.constant_(module.weight, 1 / 3)
    else:
        fixed = {"fixed": GrapeMConfig(learnable=False), "multiscale": MultiscaleConfig()}
        module = frequencies({**LEARNED, **fixed}[kind], spread=0.2, length=300)
    model = torch.nn.ModuleDict({"module": module, "linear": torch.nn.Linear(2, 2)})
    before = {name: value.clone() for name, value in module.state_dict().items()}
    omega = None if kind == "steps" else module(CPU).detach().clone()
    CASTS[cast](model)
    assert before.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        assert value.dtype == torch.float32
        assert value.dim() == 1
        assert torch.equal(value, before[name])
        assert name == "down" or not torch.equal(value, value.bfloat16().float())
    if omega is not None:
        assert torch.equal(module(CPU), omega)
    assert (model["linear"].weight.dtype == torch.float32) == (cast == "and back")


@pytest.mark.parametrize("kind", ["clex", "multiscale"])
def test_tables_first_used_in_a_validation_train(kind):
    """Meta stands for the device that tables are moved to."""
    meta = torch.device("meta")
    module = frequencies({"clex": clex()[0], "multiscale": MultiscaleConfig()}[kind], length=300).to(meta)
    with torch.inference_mode():
        module(meta)
    weight = torch.ones(1, WIDTH // 2, requires_grad=True, device=meta)
    (module(meta) * weight).sum().backward()
    assert weight.grad is not None
    assert len(grads(module)) == len(list(module.parameters()))
