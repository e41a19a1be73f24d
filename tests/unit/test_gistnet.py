"""GistNet: where it starts, what its gists depend on, and its gradients, in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megacontext_megatron.config import ContextConfig, GistConfig
from megacontext_megatron.context import gistnet
from megacontext_megatron.context.assembly import assemble_rows, gists_of
from megacontext_megatron.context.block_groups import BlockGroups
from megacontext_megatron.context.gistnet import GistNet
from megacontext_megatron.context.gists import Gists, embedding_rms, mean_gists
from tests.unit.test_assembly import HIDDEN, assert_same, embeddings, planned, rms, small

BLOCK = 3
POOLINGS = ["mean", "slot"]
FP32_RTOL = 256 * torch.finfo(torch.float32).eps
"""A gist is a few hundred sums of some tens of values, each rounded once."""


def network(*, seed: int = 3, block_size: int = BLOCK, **changes: Any) -> GistNet:
    """Return a GistNet over embeddings of HIDDEN channels as a run starts with it."""
    config = GistConfig(**{"hidden": HIDDEN, "kind": "gistnet", "hidden_size": 8, **changes})
    return GistNet(config, block_size, BlockGroups(), seed)


def trained(dtype: torch.dtype = torch.float64, **changes: Any) -> GistNet:
    """Return a GistNet whose last layers are away from 0, so that its answers are as large as the mean."""
    net = network(**changes)
    generator = torch.Generator().manual_seed(11)
    for name, parameter in net.named_parameters():
        if name.startswith(("encoder.answer.", "encoder.spans.")):
            parameter.data.normal_(std=4.0, generator=generator)
    return net.to(dtype)


def made(net: GistNet, tokens: Tensor, block_size: int = BLOCK) -> Gists:
    """Return the gists of tokens [n, b, h]."""
    return net(tokens, embedding_rms(tokens), block_size)


def blocks_of(count: int, raw: int = 2, seed: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the embeddings [count K, raw, h] of tokens of different sizes."""
    return embeddings(small(), raw, seed, dtype)[: count * BLOCK].contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("span_head", [False, True])
def test_it_starts_as_the_mean_bit_for_bit(dtype: torch.dtype, pooling: str, span_head: bool):
    context = small()
    tokens = embeddings(context, 2, seed=1, dtype=dtype)
    net = network(pooling=pooling, span_head=span_head).to(dtype)
    sizes = embedding_rms(tokens)
    levels = gists_of(tokens, sizes, context, net)
    means = gists_of(tokens, sizes, context, mean_gists)
    assert len(levels) == len(means) == 2
    for level, mean in zip(levels, means, strict=True):
        assert level.vectors.dtype == dtype
        assert torch.equal(level.vectors, mean.vectors)
        assert torch.equal(level.rms, mean.rms)
        assert (level.shift is not None) == span_head
        assert level.shift is None or not level.shift.any()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_its_first_gradients_are_those_of_the_mean_and_reach_only_the_last_layers(pooling: str):
    tokens = blocks_of(4)
    weights = torch.randn(4, 2, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    net = network(pooling=pooling, span_head=True).double()
    of_tokens = []
    for gister in (net, mean_gists):
        leaf = tokens.clone().requires_grad_()
        gists = gister(leaf, embedding_rms(leaf), BLOCK)
        moved = 0.0 if gists.shift is None else gists.shift.sum()
        ((gists.vectors * weights).sum() + moved).backward()
        of_tokens.append(leaf.grad)
    torch.testing.assert_close(of_tokens[0], of_tokens[1], rtol=1e-10, atol=1e-10)
    learning = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"encoder.answer.weight", "encoder.spans.weight"}


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_gists_have_the_mean_rms_of_their_tokens(level: int, scale: float):
    tokens = scale * embeddings(small(), 2, seed=4)[: 4 * BLOCK**level]
    net = trained(torch.float32)
    gists, sizes = tokens, embedding_rms(tokens)
    for _ in range(level):
        gists, sizes, _ = net(gists, sizes, BLOCK)
    expected = rms(tokens.double()).unflatten(0, (-1, BLOCK**level)).mean(dim=1)
    assert_same(sizes, expected, FP32_RTOL)
    assert_same(rms(gists.double()), expected, FP32_RTOL)


def test_gists_do_not_depend_on_the_size_of_embeddings():
    """A model whose embeddings are a hundred times smaller gets the same gists, as much smaller."""
    tokens, net = blocks_of(4), trained()
    assert_same(100 * made(net, tokens / 100).vectors, made(net, tokens).vectors, 1e-3)


def test_a_trained_gist_is_far_from_the_mean():
    """Without this the tests of what gists depend on would test the mean."""
    tokens = blocks_of(6)
    cosine = functional.cosine_similarity(
        made(trained(), tokens).vectors, mean_gists(tokens, embedding_rms(tokens), BLOCK).vectors, dim=-1
    )
    assert cosine.mean() < 0.9


def states_of(net: GistNet, blocks: Tensor) -> Tensor:
    """Return what the last layer says of every entry of blocks [n, K, h]: [n, K, d]."""
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)

    handle = net.encoder.layers[-1].register_forward_hook(keep)
    net.encoder(blocks)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("causal", [False, True])
def test_every_entry_sees_the_whole_block(causal: bool, monkeypatch: pytest.MonkeyPatch):
    """The last entry changes what the first contributes; with a causal mask, which is what this would notice, not."""
    if causal:
        real = functional.scaled_dot_product_attention
        monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda q, k, v: real(q, k, v, is_causal=True))
    blocks = blocks_of(4).transpose(0, 1).reshape(-1, BLOCK, HIDDEN)
    changed = blocks.clone()
    changed[:, -1] = -changed[:, -1]
    before, after = (states_of(trained(), each) for each in (blocks, changed))
    assert (before[:, 0] == after[:, 0]).all() == causal
    assert not (before[:, -1] == after[:, -1]).all(dim=-1).any()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_nothing_outside_its_block_reaches_a_gist(pooling: str):
    """NaN is what shows any dependence at all, even one multiplied by 0."""
    tokens, net = blocks_of(4), trained(pooling=pooling, span_head=True)
    clean = made(net, tokens)
    for block in range(4):
        poisoned = torch.full_like(tokens, float("nan"))
        inside = slice(block * BLOCK, (block + 1) * BLOCK)
        poisoned[inside, 1] = tokens[inside, 1]
        found = made(net, poisoned)
        for got, right in zip(found, clean, strict=True):
            assert got is not None
            assert right is not None
            assert torch.equal(got[block, 1], right[block, 1])
        assert found.vectors[block, 0].isnan().all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_entry_of_its_block_reaches_a_gist(pooling: str):
    tokens = blocks_of(4).requires_grad_()
    made(trained(pooling=pooling), tokens).vectors[1, 0].sum().backward()
    assert tokens.grad is not None
    touched = tokens.grad.abs().sum(dim=2) > 0
    assert touched.nonzero().tolist() == [[entry, 0] for entry in range(BLOCK, 2 * BLOCK)]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_order_of_entries_matters_through_places_and_neighbours_alone(pooling: str):
    tokens, net = blocks_of(4), trained(pooling=pooling)
    turned = tokens.unflatten(0, (-1, BLOCK)).flip(1).flatten(0, 1)
    gap = (made(net, tokens).vectors - made(net, turned).vectors).abs()
    assert gap.amax(dim=-1).min() > 1e-3
    width = net.encoder.places.shape[1]
    net.encoder.places.data.zero_()
    net.encoder.project.weight.data[:width] = net.encoder.project.weight.data[-width:] = 0.0
    torch.testing.assert_close(made(net, turned).vectors, made(net, tokens).vectors, rtol=1e-9, atol=1e-12)


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    first = network(seed=7, pooling="slot", span_head=True).state_dict()
    torch.manual_seed(2)
    again = network(seed=7, pooling="slot", span_head=True).state_dict()
    other = network(seed=8, pooling="slot", span_head=True).state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = {name for name in first if not torch.equal(first[name], other[name])}
    fixed = {name for name in first if name.endswith("norm.weight")} | {"encoder.answer.weight", "encoder.spans.weight"}
    assert drawn == first.keys() - fixed
    assert all(first[name].unique().numel() == 1 for name in fixed)


def test_the_same_gists_are_made_every_time():
    tokens, net = blocks_of(4, dtype=torch.float32), trained(torch.float32)
    assert torch.equal(made(net, tokens).vectors, made(net, tokens).vectors)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_of_entries_sizes_and_weights_check(pooling: str):
    net = trained(pooling=pooling, layers=1)
    names, weights = zip(*net.named_parameters(), strict=True)
    tokens, sizes = blocks_of(2).requires_grad_(), embedding_rms(blocks_of(2)).mul(1.5).requires_grad_()

    def gists(below: Tensor, of_tokens: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        values = dict(zip(names, parameters, strict=True))
        vectors, target, _ = torch.func.functional_call(net, values, (below, of_tokens, BLOCK))
        return vectors, target

    assert torch.autograd.gradcheck(gists, (tokens, sizes, *weights), fast_mode=True)


@pytest.mark.parametrize("span_head", [False, True])
def test_gradients_through_both_levels_are_those_of_float64(span_head: bool):
    """In fp32, of tokens and of all weights, which both levels share."""
    context, raw = small(variants=2), 2
    spans = planned(context, raw)
    weights = torch.randn(context.window, 2 * raw, HIDDEN, generator=torch.Generator().manual_seed(5)).double()
    gradients = []
    for dtype in (torch.float32, torch.float64):
        net = trained(dtype, span_head=span_head)
        tokens = embeddings(context, raw, seed=6, dtype=dtype).requires_grad_()
        assembly = assemble_rows(tokens, spans, context, net)
        loss = (assembly.rows * weights.to(dtype)).sum()
        if span_head:
            assert assembly.shift is not None
            assert {assembly.shift.offset.dtype, assembly.shift.log_scale.dtype} == {torch.float32}
            loss = loss + (assembly.shift.offset + assembly.shift.log_scale).sum()
        loss.backward()
        gradients.append({"tokens": tokens.grad, **{name: p.grad for name, p in net.named_parameters()}})
    for name, right in gradients[1].items():
        assert right.any(), name
        assert_same(gradients[0][name], right, 16 * FP32_RTOL)


def test_level_2_alone_trains_the_shared_weights():
    context = small()
    net, tokens = trained(), embeddings(context, 1, seed=6, dtype=torch.float64)
    gists_of(tokens, embedding_rms(tokens), context, net)[1].vectors[..., 0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    direct = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    below = made(net, tokens)
    cut = below.vectors.detach()[: cut_to(below.vectors)], below.rms.detach()[: cut_to(below.vectors)]
    net(*cut, BLOCK).vectors[..., 0].sum().backward()
    again = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    changed = [name for name, gradient in again.items() if not torch.allclose(gradient, direct[name])]
    assert set(changed) == direct.keys(), "level 1 has no part in the gradient"


def cut_to(level: Tensor) -> int:
    """Return how many entries of a level lie in complete blocks."""
    return level.shape[0] // BLOCK * BLOCK


@pytest.mark.parametrize("raw_variants", [(1, 1), (1, 3), (2, 2)])
def test_each_block_of_a_raw_sample_is_encoded_once_for_all_variants(raw_variants: tuple[int, int]):
    raw, variants = raw_variants
    context, net, seen = small(variants=variants), trained(), []
    net.encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
    assemble_rows(embeddings(context, raw, seed=1, dtype=torch.float64), planned(context, raw), context, net)
    assert seen == [raw * (context.source_length // context.block_size**level) for level in (1, 2)]


def test_half_precision_rounds_the_sums_of_the_encoder_alone():
    """The mean, the sizes and the scale are computed in fp32 as in mean_gists."""
    tokens = embeddings(small(), 2, seed=5, dtype=torch.bfloat16)[: 4 * BLOCK]
    net = trained(torch.float32)
    exact = made(net.double(), tokens.double())
    rounded = made(net.bfloat16(), tokens)
    assert rounded.vectors.dtype == torch.bfloat16
    assert_same(rounded.rms, exact.rms, FP32_RTOL)
    assert_same(rms(rounded.vectors.double()), exact.rms, 2 * torch.finfo(torch.bfloat16).eps)
    cosine = functional.cosine_similarity(rounded.vectors.double(), exact.vectors, dim=-1)
    assert cosine.min() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_of_zeros_have_finite_gradients(dtype: torch.dtype):
    tokens = torch.zeros(2 * BLOCK, 1, HIDDEN, dtype=dtype).requires_grad_()
    net = trained(dtype, span_head=True)
    gists = made(net, tokens)
    assert gists.shift is not None
    (gists.vectors.float().sum() + gists.rms.sum() + gists.shift.sum()).backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_level_without_a_complete_block_has_no_gists():
    context = ContextConfig(window=5, source_length=8, block_size=4, max_level=2, recent_tokens=4, horizon=1)
    tokens = embeddings(context, 1, seed=0)
    levels = gists_of(tokens, embedding_rms(tokens), context, trained(torch.float32, block_size=4))
    assert [level.vectors.shape for level in levels] == [(2, 1, HIDDEN)]


def test_an_incomplete_block_is_in_no_gist():
    """Where K does not divide the entries of a level, the last ones are in no block of the next."""
    context, net = small(), trained()
    assert context.source_length % BLOCK**2
    tokens = embeddings(context, 2, seed=3, dtype=torch.float64)
    levels = gists_of(tokens[:-1], embedding_rms(tokens[:-1]), context, net)
    assert [level.vectors.shape[0] for level in levels] == [13, 4]
    whole = gists_of(tokens, embedding_rms(tokens), context, net)
    for part, level in zip(levels, whole, strict=True):
        torch.testing.assert_close(part.vectors, level.vectors[: part.vectors.shape[0]], rtol=1e-12, atol=1e-12)


def test_attention_in_parts_is_attention(monkeypatch: pytest.MonkeyPatch):
    """More blocks than one launch takes are attended in several."""
    generator = torch.Generator().manual_seed(5)
    query, key, value = torch.randn(3, 7, 4, 8, generator=generator, dtype=torch.float64)
    whole = gistnet.attend(query, (key, value), 2)
    monkeypatch.setattr(gistnet, "MOST_BLOCKS", 3)
    torch.testing.assert_close(gistnet.attend(query, (key, value), 2), whole, rtol=1e-12, atol=1e-12)
