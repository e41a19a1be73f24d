"""T5's buckets against transformers and in integers, FIRE against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from megacontext_megatron.config import ConfigError
from megacontext_megatron.position.table_biases import T5Bias, t5_buckets
from tests.bias_cases import GISTS, HEADS, TOKENS, Scene, assert_is, bias_of, precise

BUCKETS = 32


def their_buckets(distance: torch.Tensor, buckets: int, longest: int) -> torch.Tensor:
    return T5Attention._relative_position_bucket(
        -distance, bidirectional=False, num_buckets=buckets, max_distance=longest
    )


@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (32, 100), (64, 512), (16, 1000), (33, 128), (8, 64)])
def test_buckets_are_those_of_transformers(buckets, longest):
    distance = torch.arange(4097)
    ours = torch.tensor(t5_buckets(buckets, longest))[distance.clamp(max=longest)]
    assert torch.equal(ours, their_buckets(distance, buckets, longest))


def test_no_edge_is_moved_by_rounding():
    """All edges of these settings are whole distances, where a floating-point logarithm can fall on either side."""
    found = t5_buckets(32, 2 * 16**2)
    assert found == [*range(16), *(16 + sum(n**16 >= 16**16 * 32**k for k in range(1, 16)) for n in range(16, 513))]
    assert t5_buckets(8, 64) == [0, 1, 2, 3, *[4] * 4, *[5] * 8, *[6] * 16, *[7] * 33]


def test_a_table_without_room_for_long_distances_is_refused():
    for buckets, longest in ((32, 16), (1, 128)):
        with pytest.raises(ConfigError, match="--t5-max-distance must exceed half of --t5-num-buckets"):
            t5_buckets(buckets, longest)


def stock_layer(table: torch.Tensor) -> T5Attention:
    """Return a layer of transformers' decoder with our table."""
    config = T5Config(is_decoder=True, num_heads=HEADS, relative_attention_num_buckets=BUCKETS)
    layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double()
    layer.relative_attention_bias.weight = torch.nn.Parameter(table.detach().view(BUCKETS, HEADS).clone())
    return layer


def test_t5_of_tokens_is_transformers_with_its_gradient():
    rows = 200
    scene, bias = Scene(widths=[1] * rows, batch=1), precise(bias_of("t5"))
    assert isinstance(bias, T5Bias)
    theirs = stock_layer(bias.table)
    expected, found = theirs.compute_bias(rows, rows).tril(), scene.of(bias)
    assert torch.equal(found, expected)
    mix = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (found * mix).sum().backward()
    (expected * mix).sum().backward()
    assert bias.table.grad is not None
    torch.testing.assert_close(bias.table.grad.view(BUCKETS, HEADS), theirs.relative_attention_bias.weight.grad)


@pytest.mark.parametrize(("buckets", "longest"), [(BUCKETS, 128), (8, 5)])
def test_t5_between_whole_distances_is_the_line_between_them(buckets, longest):
    def oracle(bias: Any, scene: Scene):
        table = bias.table.view(buckets, HEADS)
        place = scene.centre.t()
        distance = (place[:, :, None] - place[:, None, :]).clamp(min=0)
        below, above = distance.detach().floor(), distance.detach().floor() + 1
        low, high = (table[their_buckets(n.long(), buckets, longest)] for n in (below, above))
        mixed = low * (above - distance).unsqueeze(-1) + high * (distance - below).unsqueeze(-1)
        return mixed.permute(0, 3, 1, 2)

    scene = Scene(widths=[32, 1, 32, *TOKENS, 32, 1])
    with torch.no_grad():
        scene.centre[1::2] += 0.3125
    assert_is(precise(bias_of("t5", t5_buckets=buckets, t5_max_distance=longest)), scene, oracle)


def test_t5_is_continuous():
    scene, bias = Scene(widths=TOKENS, batch=1), precise(bias_of("t5"))
    before = scene.of(bias)
    with torch.no_grad():
        scene.centre[0] += 1e-9
    torch.testing.assert_close(scene.of(bias), before, rtol=0, atol=1e-7)


class Fire(torch.nn.Module):
    """FIRE of whole places, with layers of torch.nn."""

    def __init__(self, bias: Any, hidden_layers: int, hidden: int):
        super().__init__()
        layers: list[torch.nn.Module] = []
        for i, (before, after) in enumerate([(1, hidden), *[(hidden, hidden)] * (hidden_layers - 1), (hidden, HEADS)]):
            layer = torch.nn.Linear(before, after, dtype=torch.float64)
            del layer.weight, layer.bias
            layer.weight = getattr(bias, f"weight{i}").view(after, before)
            layer.bias = getattr(bias, f"bias{i}")
            layers += [layer, torch.nn.ReLU()]
        self.f = torch.nn.Sequential(*layers[:-1])


def fire_oracle(hidden_layers: int, hidden: int, length: int):
    """Return f(psi(i - j) / psi(max(|l L|, i))) with psi(x) = log(|c x| + 1)."""

    def oracle(bias: Any, scene: Scene):
        f = Fire(bias, hidden_layers, hidden).f
        place = scene.centre.t()

        def psi(x: torch.Tensor) -> torch.Tensor:
            return torch.log((bias.curvature * x).abs() + 1)

        threshold = (bias.length_scale * length).abs()
        normaliser = psi(torch.maximum(place, threshold)) + 1e-6
        z = psi(place[:, :, None] - place[:, None, :]) / normaliser[:, :, None]
        return f(z.unsqueeze(-1)).permute(0, 3, 1, 2)

    return oracle


@pytest.mark.parametrize("widths", [TOKENS, GISTS])
@pytest.mark.parametrize(("hidden_layers", "length"), [(1, 512), (2, 4), (1, 4), (3, 512)])
def test_fire_is_its_definition(widths, hidden_layers, length):
    bias = precise(bias_of("fire", fire_layers=hidden_layers, fire_hidden=6, fire_length=length), size=0.1)
    assert_is(bias, Scene(widths=widths), fire_oracle(hidden_layers, 6, length))


def test_fire_reads_curvature_and_length_by_their_size():
    scene, bias = Scene(widths=GISTS), precise(bias_of("fire", fire_length=4), size=0.1)
    before = scene.of(bias)
    for name in ("curvature", "length_scale"):
        bias.get_parameter(name).data.neg_()
    assert torch.equal(scene.of(bias), before)


def test_fire_begins_as_in_the_paper():
    bias = bias_of("fire")
    sizes = {name: p.numel() for name, p in bias.named_parameters()}
    assert sizes == {
        "curvature": 1, "length_scale": 1, "weight0": 32, "bias0": 32, "weight1": 32 * HEADS, "bias1": HEADS
    }  # fmt: skip
    assert bias.get_parameter("curvature").item() == pytest.approx(0.1)
    assert bias.get_parameter("length_scale").item() == 1.0
    for name, fan_in in (("weight0", 1), ("bias0", 1), ("weight1", 32), ("bias1", 32)):
        values = bias.get_parameter(name).detach() * fan_in**0.5
        assert float(values.abs().max()) <= 1.0
        assert float(values.std()) > 0.2


def test_fire_of_a_later_query_is_squeezed_beyond_its_length():
    """Progressive interpolation: the same distance is a smaller share of a later query's place."""
    bias = precise(bias_of("fire", fire_length=4), size=0.1)
    near, far = (Scene(widths=TOKENS, shift=shift) for shift in (0, 10_000))
    assert not torch.allclose(near.of(bias), far.of(bias))
    long = precise(bias_of("fire", fire_length=10**6), size=0.1)
    torch.testing.assert_close(near.of(long), far.of(long))
