"""What holds for every score bias: shifts, shares of heads, causality, rows of one rank, and their parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megacontext_megatron.encoding_config import BIASES, BiasConfig
from megacontext_megatron.position.content_biases import CopeBias, FoxBias, GrapeAPBias
from megacontext_megatron.position.heads import HeadShare
from megacontext_megatron.position.linear_biases import Alibi, GrapeA
from megacontext_megatron.position.retrofit_biases import SlowBands
from megacontext_megatron.position.score_biases import build_bias
from megacontext_megatron.position.table_biases import FireBias, T5Bias
from tests.bias_cases import GISTS, GROUPS, HEADS, HIDDEN, LAYERS, TOKENS, WIDTH, Scene, bias_of, precise
from tests.sums_over_ranks import alone, doubled

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "alibi": ("alibi", {}),
    "t5": ("t5", {}),
    "fire": ("fire", {"fire_length": 1000}),
    "fire of two layers": ("fire", {"fire_layers": 2, "fire_length": 1000}),
    "cope": ("cope", {}),
    "cope by width": ("cope", {"cope_count": "width"}),
    "grape-a": ("grape-a", {"learnable_slopes": True}),
    "grape-a q": ("grape-a", {"gate": "q"}),
    "grape-a k": ("grape-a", {"gate": "k"}),
    "grape-a qk": ("grape-a", {"gate": "qk", "learnable_slopes": True}),
    "grape-ap": ("grape-ap", {}),
    "fox": ("fox", {}),
}
BY_ABSOLUTE_PLACE = {"fire", "grape-ap"}
every_bias = pytest.mark.parametrize(("name", "fields"), list(CASES.values()), ids=list(CASES))


CLASSES = {
    "alibi": Alibi,
    "t5": T5Bias,
    "fire": FireBias,
    "cope": CopeBias,
    "grape-a": GrapeA,
    "grape-ap": GrapeAPBias,
    "fox": FoxBias,
    "slow-bands": SlowBands,
}


def test_every_name_is_its_class():
    assert {name: type(bias_of(name)) for name in BIASES} == CLASSES
    assert {name for name, _ in CASES.values()} == set(BIASES) - {"slow-bands"}


@every_bias
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_distances_matter(name, fields, dtype):
    """At place 1 000 003 as at 3, to the last bit, but for the two that read absolute places."""
    bias = bias_of(name, **fields)
    precise(bias)
    for parameter in bias.parameters():
        parameter.data = parameter.data.float()
    near, far = (Scene(widths=GISTS, shift=shift, dtype=dtype).of(bias) for shift in (3, 1_000_003))
    assert torch.equal(near, far) == (name not in BY_ABSOLUTE_PLACE)


@every_bias
def test_a_share_of_heads_is_part_of_the_whole(name, fields):
    """Two tensor-parallel ranks: their heads side by side, and their gradients summed."""
    scene, whole = Scene(widths=GISTS), precise(bias_of(name, **fields))
    expected = scene.of(whole)
    mix = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * mix).sum().backward()
    inputs = {key: leaf.grad for key, leaf in scene.leaves.items()}
    for leaf in scene.leaves.values():
        leaf.grad = None
    parts, shares = [], []
    for rank in range(2):
        share = HeadShare(heads=HEADS, groups=GROUPS, width=WIDTH, ranks=2, rank=rank)
        part = precise(bias_of(name, share, **fields))
        parts.append(scene.part(share.local_heads, share.local_groups).of(part))
        shares.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-12, atol=1e-12)
    (torch.cat(parts, dim=1) * mix).sum().backward()
    for key, leaf in scene.leaves.items():
        assert (leaf.grad is None) == (inputs[key] is None)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, inputs[key])
    for key, parameter in whole.named_parameters():
        summed = sum(part.get_parameter(key).grad for part in shares)  # type: ignore[misc]
        torch.testing.assert_close(summed, parameter.grad)
        assert bool(parameter.grad.any())  # type: ignore[union-attr]


@every_bias
def test_parameters_are_read_through_the_sum_over_ranks(name, fields):
    scene, gradients = Scene(widths=TOKENS), []
    for sum_over_ranks in (alone, doubled):
        bias = precise(bias_of(name, sum_over_ranks=sum_over_ranks, **fields))
        if not list(bias.parameters()):
            assert name == "alibi"
            return
        scene.of(bias).sum().backward()
        gradients.append([parameter.grad for parameter in bias.parameters()])
    assert all(torch.equal(2 * one, two) for one, two in zip(*gradients, strict=True))


@every_bias
def test_rows_of_one_rank_are_rows_of_the_whole(name, fields):
    scene, bias = Scene(widths=GISTS), precise(bias_of(name, **fields))
    rows = torch.tensor([0, 1, 6, 7])
    torch.testing.assert_close(scene.of(bias, rows), scene.of(bias)[:, :, rows], rtol=1e-13, atol=1e-13)


@every_bias
def test_no_bias_knows_what_follows(name, fields):
    bias, before, after = precise(bias_of(name, **fields)), Scene(widths=GISTS), Scene(widths=GISTS)
    with torch.no_grad():
        for leaf in after.leaves.values():
            leaf[5:] += 3
    found = after.of(bias)
    torch.testing.assert_close(found[:, :, :5], before.of(bias)[:, :, :5], rtol=0, atol=0)
    assert bool(torch.isfinite(bias(after.inputs(bias))).all())


@every_bias
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_biases_and_their_features_are_fp32_whatever_the_model(name, fields, dtype):
    bias, scene = bias_of(name, **fields).to(dtype), Scene(widths=GISTS, dtype=dtype)
    assert all(parameter.dtype == torch.float32 and parameter.dim() == 1 for parameter in bias.parameters())
    features = bias.features(scene.hidden, scene.query, scene.key)
    assert features is None or features.dtype == torch.float32
    inputs = scene.inputs(bias)
    found = bias(replace(inputs, scores=inputs.scores.float()))
    assert found.dtype == torch.float32


@every_bias
def test_fp32_is_float64_but_for_rounding(name, fields):
    bias = bias_of(name, **fields)
    low, high = (Scene(widths=GISTS, dtype=dtype).of(bias).double() for dtype in (torch.float32, torch.float64))
    size = high.abs().max().clamp(min=1.0)
    assert float(((low - high).abs().max() / size).detach()) < 100 * torch.finfo(torch.float32).eps


def built(layer_number: int = 1, seed: int = 7, **fields: Any) -> list[torch.Tensor]:
    config = BiasConfig(layers=LAYERS, **fields)
    bias = build_bias(
        config,
        HeadShare(heads=HEADS, groups=GROUPS, width=WIDTH),
        alone,
        hidden_size=HIDDEN,
        layer_number=layer_number,
        seed=seed,
    )
    return [parameter.detach() for parameter in bias.parameters()]


@pytest.mark.parametrize("name", ["t5", "fire", "grape-ap", "fox"])
def test_initial_values_depend_on_seed_layer_and_name_alone(name):
    first = built(name=name)
    torch.manual_seed(123)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(first, built(name=name), strict=True))
    for other in (built(name=name, layer_number=2), built(name=name, seed=8)):
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    query, key = built(name="grape-a", gate="qk")
    assert not torch.equal(query, key)


def test_a_shared_fire_starts_alike_in_all_layers():
    first, second = (built(layer, name="fire", fire_shared=True) for layer in (1, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("name", "index", "std"),
    [("t5", 0, 0.02), ("grape-ap", 0, 0.5 / HIDDEN**0.5), ("fox", 0, 0.02), ("grape-a", 0, WIDTH**-0.5)],
)
def test_initial_values_have_their_spread(name, index, std):
    share = HeadShare(heads=128, groups=128, width=WIDTH)
    fields: dict[str, Any] = {"gate": "q"} if name == "grape-a" else {}
    values = list(bias_of(name, share, **fields).parameters())[index].detach()
    assert float(values.std()) == pytest.approx(std, rel=0.1)
    assert abs(float(values.mean())) < 0.1 * std
