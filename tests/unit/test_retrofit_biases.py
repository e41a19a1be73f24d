"""Biases added to a trained model: exactly nothing at the start, and their definitions in float64 afterwards."""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megacontext_megatron.encoding_config import BiasConfig, RetrofitConfig
from megacontext_megatron.position.heads import HeadShare
from megacontext_megatron.position.retrofit_biases import AlibiLora, SlowBands
from megacontext_megatron.position.score_bias import BiasInputs
from tests.sums_over_ranks import alone, doubled

EPS = torch.finfo(torch.float32).eps
HEADS, GROUPS, WIDTH, ROWS, BATCH, HIDDEN, RANK = 4, 2, 8, 12, 2, 16, 3
PERIODS = (40.0, 1e3, 1e6, 1e9)
BANDS = BiasConfig(name="slow-bands", layers=(1,), periods=PERIODS)
LORA = RetrofitConfig(parts=("alibi-lora",), lora_rank=RANK, lora_length=50)
WHOLE = HeadShare(heads=HEADS, groups=GROUPS, width=WIDTH)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(share=WHOLE, rows: Iterable[int] = range(ROWS), dtype=torch.float32, shift=0.0, **given):
    """Rows at real-valued places, tokens and gists."""
    numbers = torch.tensor(list(rows))
    heads, groups = (s.stop - s.start for s in (share.local_heads, share.local_groups))
    centre = draw(ROWS, BATCH, seed=1, dtype=torch.float64).exp().cumsum(0) * 20 + shift
    return BiasInputs(
        query=torch.zeros(len(numbers), BATCH, heads, WIDTH, dtype=dtype),
        key=torch.zeros(ROWS, BATCH, groups, WIDTH, dtype=dtype),
        scores=torch.zeros(BATCH, heads, len(numbers), ROWS, dtype=dtype),
        rows=numbers,
        centre=centre,
        width=torch.ones(ROWS, BATCH, dtype=torch.int32),
        **given,
    )


def bands(values=True, share=WHOLE, sum_over_ranks=alone):
    module = SlowBands(BANDS, share, sum_over_ranks)
    if values:
        module.amplitude.data.copy_(draw(HEADS * len(PERIODS), seed=2))
    return module


def lora(values=True, share=WHOLE, sum_over_ranks=alone, seed=5):
    module = AlibiLora(LORA, share, sum_over_ranks, HIDDEN, seed)
    if values:
        module.up.data.copy_(draw(HEADS * RANK, seed=3))
    return module


def hidden(dtype=torch.float32):
    return draw(ROWS, BATCH, HIDDEN, seed=4, dtype=dtype)


def run(
    module: AlibiLora | SlowBands,
    share=WHOLE,
    rows: Iterable[int] = range(ROWS),
    dtype=torch.float32,
    states=None,
    **given,
):
    """Return a bias as a layer would have it."""
    got = inputs(share, rows, dtype, **given)
    states = hidden(dtype) if states is None else states
    return module(dataclasses.replace(got, features=module.features(states, got.query, got.key)))


def distances(at: BiasInputs):
    centre = at.centre.numpy()
    return centre[at.rows.numpy()].T[:, None, :, None] - centre.T[:, None, None, :]


def bands_by_definition(amplitude, at):
    waves = [np.cos(2 * math.pi * distances(at) / period) for period in PERIODS]
    return sum(amplitude.reshape(HEADS, -1)[None, :, j, None, None] * wave for j, wave in enumerate(waves))


def lora_by_definition(down, up, states, at):
    low = np.einsum("rh,sbh->sbr", down.reshape(RANK, HIDDEN), states)
    slope = np.einsum("nr,sbr->bns", up.reshape(HEADS, RANK), low)[:, :, at.rows.numpy(), None]
    return -slope * distances(at) / LORA.lora_length


MAKERS = {"slow-bands": bands, "alibi-lora": lora}


def expected_of(module, at, states=None):
    own: list[Any] = [p.detach().double().numpy() for p in module.parameters()]
    if isinstance(module, SlowBands):
        return bands_by_definition(own[0], at)
    return lora_by_definition(own[0], own[1], (hidden() if states is None else states).double().numpy(), at)


@pytest.mark.parametrize("name", MAKERS)
def test_biases_start_as_exactly_nothing(name):
    module = MAKERS[name](values=False)
    bias = run(module, shift=1e9)
    assert torch.equal(bias, torch.zeros_like(bias))
    scores = draw(*bias.shape)
    assert torch.equal(scores + bias, scores)


@pytest.mark.parametrize("name", MAKERS)
def test_what_starts_as_nothing_can_learn(name):
    module = MAKERS[name](values=False)
    bias = run(module)
    (bias * draw(*bias.shape)).sum().backward()
    first = next(iter(module.parameters())) if name == "slow-bands" else module.up
    assert first.grad is not None
    assert bool((first.grad != 0).all())


@pytest.mark.parametrize("rows", [range(ROWS), [3, 4, 10, 11]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MAKERS)
def test_biases_are_their_definitions(name, dtype, rows):
    module, at = MAKERS[name](), inputs(rows=rows, dtype=dtype)
    bias = run(module, rows=rows, dtype=dtype, states=hidden().to(dtype))
    expected = expected_of(module, at)
    assert bias.dtype == dtype
    assert bias.shape == (BATCH, HEADS, len(list(rows)), ROWS)
    # Beside the bias itself, float64 rounds phases of some hundred radians.
    tolerance = HIDDEN * torch.finfo(dtype).eps * np.abs(expected).max() + 1e-12
    np.testing.assert_allclose(bias.detach().numpy(), expected, rtol=0, atol=tolerance)
    assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_the_slopes_of_the_definitions(name):
    module, at = MAKERS[name](), inputs(rows=[3, 4, 10, 11])
    states = hidden().requires_grad_()
    bias = run(module, rows=at.rows.tolist(), states=states)
    weights = draw(*bias.shape, seed=6)
    (bias * weights).sum().backward()
    leaves = [*module.parameters(), *([states] if name == "alibi-lora" else [])]
    values = [leaf.detach().double().numpy() for leaf in leaves]

    def total(values):
        by_definition: Any = bands_by_definition if name == "slow-bands" else lora_by_definition
        return (by_definition(*values, at) * weights.double().numpy()).sum()

    for number, leaf in enumerate(leaves):
        slopes = np.empty(leaf.shape)
        for place in np.ndindex(*leaf.shape):
            # Biases are linear in each leaf, so any step gives the slope.
            there, back = ([v.copy() for v in values] for _ in range(2))
            there[number][place] += 0.5
            back[number][place] -= 0.5
            slopes[place] = total(there) - total(back)
        assert leaf.grad is not None
        size = np.abs(slopes).max()
        assert size > 0.1
        np.testing.assert_allclose(leaf.grad.numpy(), slopes, rtol=0, atol=64 * ROWS * EPS * size)


@pytest.mark.parametrize("name", MAKERS)
def test_ranks_compute_their_heads_of_one_layer(name):
    whole = run(MAKERS[name]())
    for ranks in (2, 4):
        shares = [HeadShare(heads=HEADS, groups=ranks, width=WIDTH, ranks=ranks, rank=r) for r in range(ranks)]
        parts = [run(MAKERS[name](share=share), share) for share in shares]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=4 * EPS, atol=4 * EPS)


@pytest.mark.parametrize("name", MAKERS)
def test_parameters_are_read_through_the_sum_over_ranks(name):
    gradients = []
    for sum_over_ranks in (alone, doubled):
        module = MAKERS[name](sum_over_ranks=sum_over_ranks)
        run(module).square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    assert all(torch.equal(twice, 2 * once) for once, twice in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_moving_all_rows_together_changes_nothing(name):
    near, far = run(MAKERS[name]()), run(MAKERS[name](), shift=2.0**36)
    # Places are then rounded to 2^-16 tokens, a 1e-6th of the shortest period, and slopes reach a few tens.
    torch.testing.assert_close(far, near, rtol=0, atol=1e-4)
    assert not torch.equal(near, torch.zeros_like(near))


def test_periods_beyond_fp32_are_told_apart_at_a_far_away_place():
    """An fp32 phase of places around 1e12 would be off by whole turns of the shortest period."""
    module, at = bands(), inputs(shift=1e12)
    expected = bands_by_definition(module.amplitude.detach().double().numpy(), at)
    # Turns of the shortest period around 2.5e10 are rounded to 2^-18.
    np.testing.assert_allclose(run(module, shift=1e12).detach().numpy(), expected, rtol=0, atol=1e-4)


def test_slopes_are_the_same_whatever_was_drawn_before_and_differ_by_seed():
    torch.manual_seed(0)
    first = lora(values=False).down
    torch.rand(3)
    assert torch.equal(first, lora(values=False).down)
    assert not torch.equal(first, lora(values=False, seed=6).down)
    many = AlibiLora(dataclasses.replace(LORA, lora_rank=64), WHOLE, alone, 256, 0).down
    assert abs(many.std().item() * math.sqrt(256) - 1) < 4 / math.sqrt(2 * many.numel())


def test_slopes_of_half_precision_rows_are_fp32():
    module, states = lora(), hidden(torch.bfloat16)
    features = module.features(states, *(torch.zeros(0) for _ in range(2)))
    assert features.dtype == torch.float32
    assert torch.equal(features, module.features(states.float(), *(torch.zeros(0) for _ in range(2))))


def test_slopes_without_features_are_an_error():
    with pytest.raises(RuntimeError, match="features"):
        lora()(inputs())


def test_places_that_move_get_gradients():
    for module in (bands(), lora()):
        at = inputs()
        centre = at.centre.clone().requires_grad_()
        features = module.features(hidden(), at.query, at.key)
        bias = module(dataclasses.replace(at, centre=centre, features=features))
        weights = draw(*bias.shape, seed=7)
        (bias * weights).sum().backward()
        assert centre.grad is not None
        for row, sample in itertools.product((0, 5), range(BATCH)):
            step = torch.zeros_like(at.centre)
            step[row, sample] = 1e-4
            ends = [expected_of(module, dataclasses.replace(at, centre=at.centre + sign * step)) for sign in (1, -1)]
            slope = ((ends[0] - ends[1]) * weights.double().numpy()).sum() / 2e-4
            assert centre.grad[row, sample].item() == pytest.approx(slope, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_parameters_are_one_dimensional_fp32_and_named_for_checkpoints(name):
    module: torch.nn.Module = MAKERS[name]()
    sizes = {"slow-bands": {"amplitude": 16}, "alibi-lora": {"down": RANK * HIDDEN, "up": HEADS * RANK}}
    before: dict[str, Tensor] = {key: value.clone() for key, value in module.state_dict().items()}
    module.bfloat16()
    assert {key: tuple(value.shape) for key, value in before.items()} == {k: (v,) for k, v in sizes[name].items()}
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    run(MAKERS[name]().bfloat16())
