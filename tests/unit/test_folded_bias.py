"""Linear biases in channels of queries and keys, against their definition in float64."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from megacontext_megatron.attention.folded_bias import BiasFold, cleared, split_spare, total
from megacontext_megatron.attention.layer_spec import resolved_layers
from megacontext_megatron.attention.transformer_config import MegaContextTransformerConfig
from megacontext_megatron.config import ContextConfig, GaussianRopeConfig, RotaryConfig, Settings
from megacontext_megatron.encoding_config import SPARE_CHANNELS, BiasConfig, RetrofitConfig
from megacontext_megatron.position.retrofit_biases import AlibiLora
from tests.bias_cases import GISTS, HIDDEN, SHARE, Scene, bias_of, precise, visible
from tests.sums_over_ranks import alone

WIDTH, HEADS, GROUPS, BATCH = 32, 4, 2, 2
SCALE = 1 / math.sqrt(WIDTH)
SLOPES = [1.0, 0.3, 2**-4.5, 2**-8]
LENGTHS = [512, 32768, 131072]
"""Tokens of history; of the last, only slopes up to 1/4 are let through."""

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}
"""Largest relative rounding of a number."""

FP32_SUM = 2.0**-23
"""Relative rounding of fp32 sums of a few numbers, the largest of which counts."""


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def places(length: int, rows: int = 65, seed: int = 1) -> Tensor:
    """Return centres [s, b], whole and half, from one end of the history to the other, in order."""
    doubled = torch.randint(0, 2 * length - 1, (rows, BATCH), generator=torch.Generator().manual_seed(seed))
    doubled[0], doubled[-1] = 0, 2 * length - 2
    return doubled.sort(dim=0).values.double() / 2


def folded(slopes: Tensor, centre: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return queries and keys without content that hold the biases."""
    rows = centre.shape[0]
    query, key = (torch.zeros(rows, BATCH, heads, WIDTH, dtype=dtype) for heads in (HEADS, GROUPS))
    return BiasFold(scale=SCALE, anchor=length / 2)(query, key, slopes, centre)


def products(query: Tensor, key: Tensor) -> Tensor:
    """Return scores [b, np, sq, sk], multiplied and added in the tensors' dtype."""
    by_head = key.repeat_interleave(HEADS // GROUPS, dim=2)
    return SCALE * torch.einsum("qbhd,kbhd->bhqk", query, by_head)


def counted_from_itself(scores: Tensor) -> Tensor:
    """Return what a softmax sees of scores: their differences from that of the row's own key."""
    return scores - scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)


def definition(slopes: Tensor, centre: Tensor) -> Tensor:
    """Return -m (mu_q - mu_k), [b, np, sq, sk] float64, for slopes [np] or [s, b, np]."""
    distance = (centre[:, None] - centre[None]).permute(2, 0, 1).unsqueeze(1)
    by_row = slopes.double().expand(centre.shape[0], BATCH, HEADS).permute(1, 2, 0).unsqueeze(-1)
    return -by_row * distance


# Scores


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_places_are_exact_and_slopes_are_slopes(length, dtype):
    slopes = torch.tensor(SLOPES)
    centre = places(length)
    query, key = folded(slopes, centre, length, dtype)
    assert query.dtype == key.dtype == dtype
    # What the tensor holds is compared without any rounding of products.
    found = counted_from_itself(products(query.double(), key.double()))
    rounded = (slopes / SCALE).to(dtype).double() * SCALE
    torch.testing.assert_close(rounded, slopes.double(), rtol=1.01 * UNIT[dtype], atol=0)
    torch.testing.assert_close(found, definition(rounded, centre), rtol=1e-12, atol=1e-9 * length)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp32_sums_keep_scores_within_a_few_thousandths(length, dtype):
    """Attention multiplies numbers of its dtype exactly and adds them up in fp32."""
    slopes = torch.tensor([min(slope, 2**15 / length) for slope in SLOPES])
    centre = places(length)
    query, key = folded(slopes, centre, length, dtype)
    found = counted_from_itself(products(query.float(), key.float()).double())
    expected = counted_from_itself(products(query.double(), key.double()))
    greatest = float((slopes * length / 2).max())
    error = float((found - expected).abs().max())
    assert error <= 4 * FP32_SUM * greatest
    assert error <= 8e-3


def test_places_that_gists_moved_keep_24_bits():
    centre = places(65536) + drawn(65, BATCH, seed=4).clamp(-3, 3)
    query, key = folded(torch.tensor(SLOPES), centre, 65536, torch.bfloat16)
    held = key[:, :, 0, -SPARE_CHANNELS:-1].double().sum(-1)
    assert float((held - (centre - 32768)).abs().max()) <= 32768 * 2.0**-24
    assert bool((held != centre - 32768).any())
    assert bool((query[..., -1] == 0).all())


def test_slopes_of_each_row():
    slopes = drawn(65, BATCH, HEADS, seed=5, dtype=torch.float32).abs()
    centre = places(512)
    query, key = folded(slopes, centre, 512, torch.float32)
    found = counted_from_itself(products(query.double(), key.double()))
    torch.testing.assert_close(found, definition((slopes / SCALE).double() * SCALE, centre), rtol=1e-12, atol=1e-9)


def test_content_of_other_channels_stays():
    query, key = drawn(9, BATCH, HEADS, WIDTH), drawn(9, BATCH, GROUPS, WIDTH, seed=1)
    before = query.clone(), key.clone()
    centre = torch.arange(9).double()[:, None].repeat(1, BATCH)
    found = BiasFold(scale=SCALE, anchor=0)(query, key, torch.ones(HEADS), centre)
    for ours, theirs in zip(found, before, strict=True):
        assert torch.equal(ours[..., :-SPARE_CHANNELS], theirs[..., :-SPARE_CHANNELS])
        assert not torch.equal(ours, theirs)


# Gradients


def attended(scores: Tensor, value: Tensor) -> Tensor:
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    probabilities = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", probabilities, value.repeat_interleave(HEADS // GROUPS, dim=2))


def gradients_of(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((output * drawn(*output.shape, seed=9)).sum(), leaves))


@pytest.mark.parametrize("shape", [(HEADS,), (65, BATCH, HEADS)], ids=["heads", "rows"])
def test_slopes_and_places_get_the_gradients_of_the_definition(shape):
    length = 131072
    slopes = (drawn(*shape, seed=2).abs() / 1000).requires_grad_()
    centre = places(length).requires_grad_()
    mixed = drawn(65, BATCH, GROUPS, (HEADS // GROUPS + 2) * WIDTH, seed=3).requires_grad_()
    query, key, value = split_spare(mixed, WIDTH)
    content = products(query, key)
    expected = attended(content + definition(slopes, centre), value)
    right = gradients_of(expected, [slopes, centre, mixed])
    query, key, value = split_spare(mixed, WIDTH)
    found = attended(products(*BiasFold(scale=SCALE, anchor=length / 2)(query, key, slopes, centre)), value)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients_of(found, [slopes, centre, mixed]), right, strict=True):
        assert bool(theirs.any())
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8 * float(theirs.abs().max()))


class Rounded(torch.autograd.Function):
    """Attention's products of queries and keys, whose gradients of scores it rounds to bf16 before it uses them."""

    @staticmethod
    def forward(ctx, query, key):
        ctx.save_for_backward(query, key)
        return products(query.double(), key.double())

    @staticmethod
    def backward(ctx, gradient):
        query, key = ctx.saved_tensors
        rounded = SCALE * gradient.bfloat16().double()
        by_head = key.double().repeat_interleave(HEADS // GROUPS, dim=2)
        of_query = torch.einsum("bhqk,kbhd->qbhd", rounded, by_head)
        of_key = torch.einsum("bhqk,qbhd->kbhd", rounded, query.double()).unflatten(2, (GROUPS, -1)).sum(3)
        return of_query.to(query.dtype), of_key.to(key.dtype)


def test_gradients_of_slopes_survive_scores_whose_gradients_are_rounded():
    """Far from the anchor, the rounding of a row's gradients times the distance is more than the gradient itself."""
    length, rows = 32768, 256
    centre = (length - rows + torch.arange(rows).double())[:, None].repeat(1, BATCH)
    value = drawn(rows, BATCH, GROUPS, WIDTH, seed=6)
    leaf = torch.tensor(SLOPES, dtype=torch.float64, requires_grad=True)
    slopes = ((leaf / SCALE).bfloat16().double() * SCALE).detach()
    scores = definition(slopes, centre).requires_grad_()
    [gradient] = gradients_of(attended(scores, value), [scores])
    by_slope = definition(torch.ones(HEADS), centre)
    right = (gradient * by_slope).sum((0, 2, 3))
    found = []
    for checked in (True, False):
        query, key = folded(leaf, centre, length, torch.bfloat16)
        if not checked:
            query = query.clone()
            query.register_hook(lambda g: torch.cat([g[..., :-1], torch.zeros_like(g[..., -1:])], dim=-1))
        found += gradients_of(attended(Rounded.apply(query, key), value), [leaf])
    # Of the gradients of scores, and then of those of queries, whose part in the last channel is what rounding left.
    unit, far = UNIT[torch.bfloat16], length / 2
    bound = (gradient.abs() * (2 * unit * by_slope.abs() + 4 * unit**2 * far)).sum((0, 2, 3))
    off = [((ours - right).abs() / bound).max() for ours in found]
    assert off[0] <= 1
    assert off[1] > max(1.0, 20 * off[0])


# Spare channels


def projection(seed: int = 0) -> Tensor:
    return drawn(5, BATCH, GROUPS, (HEADS // GROUPS + 2) * WIDTH, seed=seed)


def spare_of(mixed: Tensor) -> Tensor:
    """Return a view of the spare channels of queries and keys."""
    return mixed.unflatten(-1, (-1, WIDTH))[..., :-1, -SPARE_CHANNELS:]


@pytest.mark.parametrize("norm", [torch.nn.RMSNorm, torch.nn.LayerNorm])
def test_norms_do_not_see_spare_channels_and_give_them_no_gradient(norm):
    found, gradients = [], []
    norm = norm(WIDTH, dtype=torch.float64)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(drawn(WIDTH, seed=8))
    for size in (0.0, 100.0):
        mixed = projection()
        spare_of(mixed).copy_(size * drawn(*spare_of(mixed).shape, seed=7))
        mixed.requires_grad_()
        query, key, value = split_spare(mixed, WIDTH)
        query, key = (cleared(norm(each)) for each in (query, key))
        assert not bool(query[..., -SPARE_CHANNELS:].any() or key[..., -SPARE_CHANNELS:].any())
        centre = torch.arange(5).double()[:, None].repeat(1, BATCH)
        query, key = BiasFold(scale=SCALE, anchor=2.5)(query, key, torch.tensor(SLOPES), centre)
        output = attended(products(query, key), value)
        found.append(output)
        gradients.append(gradients_of(output, [mixed, *norm.parameters()]))
        of_mixed, *of_norm = gradients[-1]
        assert not bool(spare_of(of_mixed).any())
        assert all(bool(each[:-SPARE_CHANNELS].any()) for each in of_norm)
        assert not any(bool(each[-SPARE_CHANNELS:].any()) for each in of_norm)
    assert torch.equal(*found)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


class HandsOutViews(torch.autograd.Function):
    """Doubles its input, and returns the result as a view, as Transformer Engine's norms do."""

    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value)
        return (2 * value.flatten()).view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        [value] = ctx.saved_tensors
        return 2 * gradient + 0 * value


def test_biases_are_written_into_views_too():
    mixed = projection().requires_grad_()
    centre = torch.arange(5).double()[:, None].repeat(1, BATCH)
    slopes = torch.tensor(SLOPES, dtype=torch.float64).requires_grad_()
    found = []
    for double in (HandsOutViews.apply, lambda value: 2 * value):
        query, key, value = split_spare(mixed, WIDTH)
        folded = BiasFold(scale=SCALE, anchor=2.5)(double(query), double(key), slopes, centre)
        output = attended(products(*folded), value)
        found.append([output, *gradients_of(output, [mixed, slopes])])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
        assert bool(ours.any())


def test_the_split_is_megatrons_but_for_spare_channels():
    mixed = projection().requires_grad_()
    query, key, value = split_spare(mixed, WIDTH)
    widths = [HEADS // GROUPS * WIDTH, WIDTH, WIDTH]
    theirs = mixed.split(widths, dim=3)
    by_head = theirs[0].reshape(5, BATCH, HEADS, WIDTH), *theirs[1:]
    for ours, right in zip((query, key), by_head, strict=False):
        assert torch.equal(ours[..., :-SPARE_CHANNELS], right[..., :-SPARE_CHANNELS])
    assert torch.equal(value, theirs[2])
    mixes = [drawn(*each.shape, seed=n) for n, each in enumerate((query, key, value))]
    ours, right = (
        torch.autograd.grad(torch.stack([(a * b).sum() for a, b in zip(parts, mixes, strict=True)]).sum(), mixed)[0]
        for parts in ((query, key, value), by_head)
    )
    spare_of(right).zero_()
    assert torch.equal(ours, right)


# Slopes of biases


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("alibi", {"slope_scale": 0.7}),
        ("grape-a", {}),
        ("grape-a", {"learnable_slopes": True}),
        ("grape-a", {"learnable_slopes": True, "gate": "q"}),
    ],
)
def test_slopes_are_those_of_the_bias(name, fields):
    scene, bias = Scene(widths=GISTS), precise(bias_of(name, **fields))
    assert BiasConfig(name=name, layers=(1,), **fields).linear
    slopes = bias.linear_slopes(scene.query, bias.features(scene.hidden, scene.query, scene.key))
    assert slopes is not None
    by_row = slopes.expand(len(GISTS), scene.batch, -1).permute(1, 2, 0).unsqueeze(-1)
    distance = (scene.centre[:, None] - scene.centre[None]).permute(2, 0, 1).unsqueeze(1)
    torch.testing.assert_close(visible(-by_row * distance), scene.of(bias), rtol=1e-12, atol=1e-12)


def test_slopes_of_queries_through_a_lora_are_those_of_the_bias():
    bias = precise(AlibiLora(RetrofitConfig(parts=("alibi-lora",)), SHARE, alone, HIDDEN, 7))
    scene = Scene(widths=GISTS)
    slopes = bias.linear_slopes(scene.query, bias.features(scene.hidden, scene.query, scene.key))
    assert slopes is not None
    distance = (scene.centre[:, None] - scene.centre[None]).permute(2, 0, 1).unsqueeze(1)
    torch.testing.assert_close(
        visible(-slopes.permute(1, 2, 0).unsqueeze(-1) * distance), scene.of(bias), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("name", "fields"), [("t5", {}), ("fire", {}), ("fox", {}), ("grape-a", {"gate": "k"}), ("grape-a", {"gate": "qk"})]
)
def test_other_biases_have_no_slopes(name, fields):
    scene, bias = Scene(widths=GISTS), bias_of(name, **fields)
    features = bias.features(scene.hidden, scene.query, scene.key)
    assert bias.linear_slopes(scene.query, features) is None
    assert bias.has_features == (features is not None)
    assert not BiasConfig(name=name, layers=(1,), **fields).linear
    with pytest.raises(RuntimeError, match="not linear"):
        total([torch.ones(4), None])


def test_slopes_of_several_biases_add_up():
    row, heads = drawn(5, BATCH, HEADS), drawn(HEADS, seed=1)
    assert torch.equal(total([heads, row]), heads + row)
    assert torch.equal(total([heads]), heads)


# The layer table


def table(
    dtype: torch.dtype = torch.float32, implementation: Literal["local", "transformer_engine"] = "local"
) -> list[tuple[str, str]]:
    """Return bias and core attention of a layer with a linear bias, and of one without."""
    config = MegaContextTransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        transformer_impl=implementation,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        mc_settings=Settings(
            encoding="none",
            rotary=RotaryConfig(head_dim=16),
            context=ContextConfig.tokens_only(64),
            gaussian=GaussianRopeConfig(),
            biases=(BiasConfig(name="grape-a", layers=(1,)),),
            no_rope_layers=(1, 2),
            bias_fold=True,
        ),
    )
    return [(layer.bias, layer.backend) for layer in resolved_layers(config)]


def test_the_table_says_where_biases_are():
    assert table() == [("grape-a, folded", "dense"), ("none", "dense")]
    on_te = table(torch.bfloat16, "transformer_engine")
    assert on_te == [("grape-a, folded", "transformer_engine, auto"), ("none", "transformer_engine, auto")]


def test_dense_attention_in_half_precision_adds_what_it_would_round():
    assert table(torch.bfloat16)[0] == ("grape-a, 4 channels spare", "dense, biased")
