"""Assembly against a loop over rows in float64: which embedding every row is, and what it depends on."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megacontext_megatron.config import ContextConfig
from megacontext_megatron.context.assembly import assemble_rows, gists_of
from megacontext_megatron.context.gists import GREATEST_GAIN, Gister, Gists, embedding_rms, mean_gists
from megacontext_megatron.spans.metadata import SpanMetadata
from megacontext_megatron.spans.plan import plan_rows

HIDDEN = 6
SEEDS = st.integers(0, 2**31 - 1)
# A gist rounds in the sums over its tokens, over channels and in a handful of operations more.
FP32_RTOL = 64 * torch.finfo(torch.float32).eps


def assert_same(got: Tensor, expected: Tensor, rtol: float) -> None:
    """Compare with float64 values; channels in which the tokens cancel err as much as the largest."""
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def rms(embedding: Tensor) -> Tensor:
    """Return the root mean square over channels of [..., h]."""
    return embedding.square().mean(dim=-1).sqrt()


def naive_row(tokens: Tensor, start: int, level: int, block_size: int) -> Tensor:
    """Return the embedding [h] of a node over the tokens [C, h] of its sample."""
    if level == 0:
        return tokens[start]
    below = block_size ** (level - 1)
    children = [naive_row(tokens, start + n * below, level - 1, block_size) for n in range(block_size)]
    mean = torch.stack(children).mean(dim=0)
    target = torch.stack([rms(token) for token in tokens[start : start + block_size * below]]).mean()
    return mean * target / rms(mean)


def naive_rows(tokens: Tensor, spans: SpanMetadata, variants: int, block_size: int) -> Tensor:
    """Return rows [s, b V, h] of raw samples' tokens [C, b, h], one row at a time."""
    return torch.stack(
        [
            torch.stack(
                [
                    naive_row(tokens[:, context // variants], int(start), int(level), block_size)
                    for start, level in zip(spans.start[context], spans.level[context], strict=True)
                ]
            )
            for context in range(spans.start.shape[0])
        ],
        dim=1,
    )


def embeddings(context: ContextConfig, raw: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return embeddings [C, raw, h] of tokens whose sizes differ and whose means do not cancel."""
    generator = torch.Generator().manual_seed(seed)
    shape = (context.source_length, raw)
    noise = torch.randn(*shape, HIDDEN, generator=generator, dtype=torch.float64)
    return ((noise + 2.0) * torch.rand(*shape, 1, generator=generator, dtype=torch.float64).add(0.1)).to(dtype)


def planned(context: ContextConfig, raw: int, seed: int = 1) -> SpanMetadata:
    """Return the planned rows [raw V, W] of raw samples with all their variants."""
    keys = [(seed, 0, sample, variant) for sample in range(raw) for variant in range(context.variants)]
    plans = [plan_rows(context, key) for key in keys]
    start = torch.stack([torch.from_numpy(plan.start) for plan in plans])
    level = torch.stack([torch.from_numpy(plan.level) for plan in plans])
    return SpanMetadata.of_nodes(start, level, context.block_size)


def small(variants: int = 1, **changes: Any) -> ContextConfig:
    """Return a context whose plans have rows of all three levels: 42 tokens in 20 rows, K = 3."""
    settings: dict[str, Any] = {"window": 20, "source_length": 42, "block_size": 3, "recent_tokens": 4, "horizon": 2}
    return ContextConfig(**(settings | {"variants": variants, "level2_prob": 0.6} | changes))


def entry_table(tokens: Tensor, context: ContextConfig, gister: Gister = mean_gists) -> Tensor:
    """Return tokens [C, b, h] followed by the gists of every complete block of each level: [entries, b, h]."""
    return torch.cat([tokens, *(level.vectors for level in gists_of(tokens, embedding_rms(tokens), context, gister))])


def every_node(context: ContextConfig) -> SpanMetadata:
    """Return one context [1, n] of every complete node of every level, in the order of the entry table."""
    k = context.block_size
    nodes = [
        (n * k**level, level)
        for level in range(context.max_level + 1)
        for n in range(context.source_length // k**level)
    ]
    start, level = torch.tensor(nodes).t().unsqueeze(1)
    return SpanMetadata.of_nodes(start, level, k)


def test_the_small_context_has_all_levels():
    assert set(planned(small(), raw=4).level.flatten().tolist()) == {0, 1, 2}


@given(variants=st.integers(1, 3), raw=st.integers(1, 3), seed=SEEDS)
def test_rows_are_those_of_the_loop(variants: int, raw: int, seed: int):
    context = small(variants)
    tokens, spans = embeddings(context, raw, seed), planned(context, raw, seed)
    got = assemble_rows(tokens, spans, context, mean_gists).rows
    assert (got.shape, got.dtype) == ((context.window, raw * variants, HIDDEN), torch.float32)
    expected = naive_rows(tokens.double(), spans, variants, context.block_size)
    assert_same(got, expected, FP32_RTOL)


@given(variants=st.integers(1, 3), raw=st.integers(1, 2), seed=SEEDS)
def test_gradients_are_those_of_the_loop(variants: int, raw: int, seed: int):
    context = small(variants)
    spans = planned(context, raw, seed)
    fast = embeddings(context, raw, seed).requires_grad_()
    naive = fast.detach().double().requires_grad_()
    rows = assemble_rows(fast, spans, context, mean_gists).rows
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (rows * weights.float()).sum().backward()
    (naive_rows(naive, spans, variants, context.block_size) * weights.float().double()).sum().backward()
    assert fast.grad is not None
    assert naive.grad is not None
    assert_same(fast.grad, naive.grad, FP32_RTOL)


def test_tokens_may_lie_in_memory_in_any_order():
    context, raw = small(), 2
    spans = planned(context, raw)
    dense = embeddings(context, raw, seed=3)
    gradients = []
    for tokens in (dense, dense.transpose(0, 1).contiguous().transpose(0, 1)):
        leaf = tokens.detach().requires_grad_()
        assert leaf.stride() == tokens.stride()
        rows = assemble_rows(leaf, spans, context, mean_gists).rows
        gradients += torch.autograd.grad(rows.square().sum(), leaf)
    assert torch.equal(gradients[1], gradients[0])


def plain_mean(below: Tensor, rms: Tensor, block_size: int) -> Gists:
    """Average each block and bend the average: a gister that knows nothing of sizes, by autograd alone."""
    blocks = below.unflatten(0, (-1, block_size))
    return Gists(blocks.mean(dim=1).sin(), rms.unflatten(0, (-1, block_size)).mean(dim=1))


def sized_mean(below: Tensor, rms: Tensor, block_size: int) -> Gists:
    """Do what mean_gists says, by autograd alone."""
    mean = below.unflatten(0, (-1, block_size)).mean(dim=1)
    target = rms.unflatten(0, (-1, block_size)).mean(dim=1)
    size = torch.maximum(embedding_rms(mean), target / GREATEST_GAIN)
    return Gists(mean * (target / size).unsqueeze(-1), target)


@pytest.mark.parametrize("gister", [plain_mean, mean_gists])
@pytest.mark.parametrize("variants", [1, 2, 3])
def test_gradients_check(gister: Gister, variants: int):
    context = small(variants=variants)
    spans = planned(context, raw=2)
    tokens = embeddings(context, 2, seed=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: assemble_rows(t, spans, context, gister).rows, (tokens,), fast_mode=True)


def test_gradients_of_gists_and_of_their_sizes_check():
    tokens = embeddings(small(), 2, seed=9, dtype=torch.float64)[:12].requires_grad_()
    sizes = torch.rand(12, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda below, rms: mean_gists(below, rms, 3)[:2], (tokens, sizes))
    assert torch.autograd.gradcheck(embedding_rms, (tokens,))


@given(seed=SEEDS, cancel=st.sampled_from([1e-2, 1e-4, 1e-9]))
def test_blocks_that_cancel_have_the_gradients_of_autograd(seed: int, cancel: float):
    """At the limit of the gain, and before it, for targets other than the block's own size."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(2, 3, HIDDEN, generator=generator, dtype=torch.float64)
    left = cancel * torch.randn(half.shape, generator=generator, dtype=torch.float64)
    tokens = torch.stack([half, left - half], dim=1).flatten(0, 1)
    weights = torch.randn(2, 3, HIDDEN, generator=generator, dtype=torch.float64)
    gradients = []
    for gister in (mean_gists, sized_mean):
        inputs = [tokens.clone().requires_grad_(), embedding_rms(tokens).mul(1.5).requires_grad_()]
        gists, targets = gister(inputs[0], inputs[1], 2)[:2]
        gradients.append(torch.autograd.grad((gists * weights).sum() + (targets * weights[..., 0]).sum(), inputs))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_a_learned_gister_gets_gradients_and_gives_them_to_tokens():
    class Learned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(HIDDEN, dtype=torch.float64).mul(0.7))

        def forward(self, below: Tensor, rms: Tensor, block_size: int) -> Gists:
            gists, rms, _ = plain_mean(below, rms, block_size)
            return Gists((gists @ self.weight) * rms.unsqueeze(-1), rms)

    context, learned = small(variants=2), Learned()
    spans = planned(context, raw=2)
    tokens = embeddings(context, 2, seed=6, dtype=torch.float64).requires_grad_()

    def rows(t: Tensor, weight: Tensor) -> Tensor:
        def gister(below: Tensor, rms: Tensor, block_size: int) -> Any:
            return torch.func.functional_call(learned, {"weight": weight}, (below, rms, block_size))

        return assemble_rows(t, spans, context, gister).rows

    assert torch.autograd.gradcheck(rows, (tokens, learned.weight), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_round_each_sum_a_few_times(dtype: torch.dtype):
    context, raw = small(variants=3), 2
    tokens, spans = embeddings(context, raw, seed=5, dtype=dtype), planned(context, raw)
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(context.window, 3 * raw, HIDDEN, generator=generator).to(dtype)
    gradients = []
    for inputs in (tokens.clone().requires_grad_(), tokens.double().requires_grad_()):
        rows = assemble_rows(inputs, spans, context, mean_gists).rows
        gradients += torch.autograd.grad(rows, inputs, weights.to(rows.dtype))
    # Once for each variant, and in each of the two gists above.
    assert_same(gradients[0], gradients[1], 8 * torch.finfo(dtype).eps)


def test_samples_do_not_touch_each_others_gradients():
    """Other contexts of the micro-batch change no bit of a sample's gradient."""
    context = small(variants=2)
    tokens, spans = embeddings(context, 3, seed=7), planned(context, 3)
    weights = torch.randn(context.window, 6, HIDDEN, generator=torch.Generator().manual_seed(7))
    together = tokens.clone().requires_grad_()
    assemble_rows(together, spans, context, mean_gists).rows.backward(weights)
    assert together.grad is not None
    for sample in range(3):
        alone = tokens[:, [sample]].clone().requires_grad_()
        own = slice(2 * sample, 2 * sample + 2)
        of_sample = SpanMetadata.of_nodes(spans.start[own], spans.level[own].long(), context.block_size)
        assemble_rows(alone, of_sample, context, mean_gists).rows.backward(weights[:, own].contiguous())
        assert alone.grad is not None
        assert torch.equal(alone.grad[:, 0], together.grad[:, sample])


@given(block_size=st.integers(2, 4), blocks=st.integers(1, 20), max_level=st.integers(1, 2), seed=SEEDS)
def test_table_holds_every_complete_node_in_order(block_size: int, blocks: int, max_level: int, seed: int):
    source = block_size * (blocks + 2)
    context = ContextConfig(
        window=source - block_size + 1,
        source_length=source,
        block_size=block_size,
        max_level=max_level,
        recent_tokens=1,
        horizon=1,
    )
    tokens, spans = embeddings(context, 1, seed), every_node(context)
    table = entry_table(tokens, context)
    assert table.shape[0] == spans.start.shape[1]
    expected = naive_rows(tokens.double(), spans, 1, block_size)
    assert_same(table, expected, FP32_RTOL)
    assert torch.equal(assemble_rows(tokens, spans, context, mean_gists).rows, table)


def test_recency_rows_are_the_tokens_themselves():
    context = ContextConfig.tokens_only(10)
    tokens = embeddings(context, 2, seed=0)
    assert gists_of(tokens, embedding_rms(tokens), context, mean_gists) == []
    assert torch.equal(assemble_rows(tokens, planned(context, 2), context, mean_gists).rows, tokens)


def test_token_rows_are_copied_bit_for_bit():
    context = small(variants=2)
    tokens, spans = embeddings(context, 2, seed=1), planned(context, 2)
    rows = assemble_rows(tokens, spans, context, mean_gists).rows
    for context_row in range(4):
        is_token = spans.level[context_row] == 0
        expected = tokens[spans.start[context_row][is_token], context_row // 2]
        assert torch.equal(rows[is_token, context_row], expected)


@given(seed=SEEDS, level=st.integers(1, 2), block_size=st.integers(2, 5), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_gist_rms_is_the_mean_rms_of_its_tokens(seed: int, level: int, block_size: int, scale: float):
    width = block_size**level
    generator = torch.Generator().manual_seed(seed)
    tokens = scale * torch.randn(3 * width, 2, HIDDEN, generator=generator)
    gists, targets = tokens, embedding_rms(tokens)
    for _ in range(level):
        gists, targets, _ = mean_gists(gists, targets, block_size)
    expected = rms(tokens.double()).view(3, width, 2).mean(dim=1)
    torch.testing.assert_close(targets.double(), expected, rtol=FP32_RTOL, atol=0)
    torch.testing.assert_close(rms(gists.double()), expected, rtol=FP32_RTOL, atol=0)


def test_a_gister_is_told_the_rms_of_tokens_at_every_level():
    """A gister that does not scale its gists shows whether the sizes are the tokens' or the gists' own."""
    heard = []

    def listening(below: Tensor, rms: Tensor, block_size: int) -> Gists:
        heard.append(rms)
        blocks = below.unflatten(0, (-1, block_size))
        return Gists(blocks.sum(dim=1), rms.unflatten(0, (-1, block_size)).mean(dim=1))

    context = small()
    tokens = embeddings(context, 2, seed=8)
    entry_table(tokens, context, listening)
    of_tokens = rms(tokens.double())
    k, blocks = context.block_size, context.source_length // context.block_size // context.block_size
    of_blocks = of_tokens.unflatten(0, (-1, k)).mean(dim=1)[: blocks * k]
    assert len(heard) == 2
    torch.testing.assert_close(heard[0].double(), of_tokens, rtol=FP32_RTOL, atol=0)
    torch.testing.assert_close(heard[1].double(), of_blocks, rtol=FP32_RTOL, atol=0)


def test_gist_points_where_the_mean_of_its_tokens_does():
    tokens = torch.tensor([[3.0, 0.0], [0.0, 4.0]]).unsqueeze(1)
    gist, *_ = mean_gists(tokens, embedding_rms(tokens), 2)
    size = (3 / 2**0.5 + 4 / 2**0.5) / 2
    expected = torch.tensor([[[0.6, 0.8]]]) * size * 2**0.5
    torch.testing.assert_close(gist, expected, rtol=FP32_RTOL, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_each_gist_once(dtype: torch.dtype):
    context = small()
    tokens, spans = embeddings(context, 2, seed=5, dtype=dtype), every_node(context)
    table = entry_table(tokens, context)
    assert table.dtype == dtype
    expected = torch.cat([naive_rows(tokens[:, [b]].double(), spans, 1, context.block_size) for b in range(2)], dim=1)
    # Level 2 rounds once more than level 1, whose gists it is made of.
    assert_same(table, expected, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("level", [1, 2])
def test_nothing_outside_the_block_reaches_a_gist(level: int):
    """NaN is what shows any dependence at all, even one multiplied by 0."""
    context, raw, sample = small(), 2, 1
    tokens = embeddings(context, raw, seed=2)
    width, nodes = context.block_size**level, context.source_length // context.block_size**level
    clean = entry_table(tokens, context)
    offset = sum(context.source_length // context.block_size**below for below in range(level))
    for node in range(nodes):
        poisoned = torch.full_like(tokens, float("nan"))
        inside = slice(node * width, (node + 1) * width)
        poisoned[inside, sample] = tokens[inside, sample]
        got = entry_table(poisoned, context)[offset + node]
        assert torch.equal(got[sample], clean[offset + node, sample])
        assert got[1 - sample].isnan().all()


@pytest.mark.parametrize("level", [1, 2])
def test_every_token_of_the_block_reaches_its_gist(level: int):
    context = small()
    tokens = embeddings(context, 1, seed=2).requires_grad_()
    width = context.block_size**level
    offset = sum(context.source_length // context.block_size**below for below in range(level))
    entry_table(tokens, context)[offset + 1].sum().backward()
    assert tokens.grad is not None
    touched = tokens.grad.abs().sum(dim=(1, 2)) > 0
    assert touched.nonzero().flatten().tolist() == list(range(width, 2 * width))


def test_variants_share_one_embedding():
    context = small(variants=3)
    spans = planned(context, raw=2)
    tokens = embeddings(context, 2, seed=4).requires_grad_()
    rows = assemble_rows(tokens, spans, context, mean_gists).rows
    newest = tokens[-1].repeat_interleave(3, dim=0)
    assert torch.equal(rows[-1], newest)
    (gradient,) = torch.autograd.grad(rows[-1].sum(), tokens)
    assert torch.equal(gradient[-1], torch.full((2, HIDDEN), 3.0))


def test_a_block_without_embeddings_has_a_finite_gradient():
    tokens = torch.zeros(4, 1, HIDDEN, requires_grad=True)
    gists, targets, _ = mean_gists(tokens, embedding_rms(tokens), 2)
    (gists.sum() + targets.sum()).backward()
    assert not gists.any()
    assert tokens.grad is not None
    assert tokens.grad.abs().max() <= 1


def test_a_source_shorter_than_a_level_2_block_has_no_such_entries():
    context = ContextConfig(window=5, source_length=8, block_size=4, max_level=2, recent_tokens=4, horizon=1)
    tokens = embeddings(context, 1, seed=0)
    table = entry_table(tokens, context)
    assert table.shape == (8 + 2, 1, HIDDEN)
    assert torch.equal(assemble_rows(tokens, planned(context, 1), context, mean_gists).rows, table[[8, 4, 5, 6, 7]])
