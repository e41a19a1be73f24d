"""What rows must predict, and the sums of their losses, against loops over rows."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megacontext_megatron.config import ContextConfig
from megacontext_megatron.model.losses import Targets, evaluation_report, row_sums, row_targets, variant_names
from megacontext_megatron.spans.context_parallel import slice_rows
from megacontext_megatron.spans.metadata import SpanMetadata
from megacontext_megatron.spans.plan import plan_rows

VARIANTS = st.integers(1, 3)
RAW = st.integers(1, 2)
SEEDS = st.integers(0, 2**31 - 1)


def small(variants: int, max_level: int = 2) -> ContextConfig:
    """Return a context of 42 tokens in 20 rows, the last 5 of which are compared."""
    return ContextConfig(
        window=20 if max_level == 2 else 24,
        source_length=42,
        variants=variants,
        block_size=3,
        max_level=max_level,
        recent_tokens=6,
        horizon=5,
        level2_prob=0.6,
    )


def planned(context: ContextConfig, raw: int, seed: int) -> SpanMetadata:
    """Return the planned rows [raw V, W]."""
    keys = [(seed, 0, sample, variant) for sample in range(raw) for variant in range(context.variants)]
    plans = [plan_rows(context, key) for key in keys]
    start = torch.stack([torch.from_numpy(plan.start) for plan in plans])
    level = torch.stack([torch.from_numpy(plan.level) for plan in plans])
    return SpanMetadata.of_nodes(start, level, context.block_size)


def sampled(context: ContextConfig, raw: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return text [raw, C + 1] without repeats and a token mask [raw, C] in which some tokens do not count."""
    generator = torch.Generator().manual_seed(seed)
    length = context.source_length + 1
    text = torch.randperm(raw * length, generator=generator).view(raw, length)
    return text, (torch.rand(raw, length - 1, generator=generator) < 0.7).long()


def rows_of(context: ContextConfig, spans: SpanMetadata) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (context, row, start, end, level) of every row."""
    for b, (starts, levels) in enumerate(zip(spans.start.tolist(), spans.level.tolist(), strict=True)):
        for s, (start, level) in enumerate(zip(starts, levels, strict=True)):
            yield b, s, start, start + context.block_size**level, level


@given(variants=VARIANTS, raw=RAW, seed=SEEDS)
def test_a_row_predicts_the_token_behind_its_last(variants: int, raw: int, seed: int):
    context = small(variants)
    spans = planned(context, raw, seed)
    text, mask = sampled(context, raw, seed)
    targets = row_targets(text, mask, spans)
    assert (targets.labels.dtype, targets.mask.dtype) == (torch.int64, torch.float32)
    assert targets.labels.shape == targets.mask.shape == spans.start.shape
    for b, s, _, end, _ in rows_of(context, spans):
        sample = b // variants
        assert targets.labels[b, s] == text[sample, end]
        assert targets.mask[b, s] == mask[sample, end - 1]


def test_tokens_predict_what_megatron_lets_them_predict():
    context = ContextConfig.tokens_only(12)
    text, mask = sampled(context, 2, seed=1)
    targets = row_targets(text, mask, planned(context, 2, seed=1))
    assert torch.equal(targets.labels, text[:, 1:])
    assert torch.equal(targets.mask, mask.float())


def test_a_gist_counts_where_its_last_token_does():
    context = small(1)
    level = torch.tensor([[2, 1, 0]])
    spans = SpanMetadata.of_nodes(torch.tensor([[0, 9, 12]]), level, context.block_size)
    text = torch.arange(43).unsqueeze(0)
    mask = torch.ones(1, 42, dtype=torch.int64)
    assert row_targets(text, mask, spans).labels.tolist() == [[9, 12, 13]]
    mask[0, [0, 7, 11]] = 0
    assert row_targets(text, mask, spans).mask.tolist() == [[1.0, 0.0, 1.0]]


@given(variants=st.integers(2, 3), raw=RAW, seed=SEEDS)
def test_last_rows_have_the_same_targets_in_every_variant(variants: int, raw: int, seed: int):
    context = small(variants)
    targets = row_targets(*sampled(context, raw, seed), planned(context, raw, seed))
    for values in (targets.labels, targets.mask):
        last = values[:, -context.horizon :].view(raw, variants, context.horizon)
        assert torch.equal(last, last[:, :1].expand_as(last))


def naive_sums(
    losses: Tensor, targets: Targets, spans: SpanMetadata, context: ContextConfig
) -> dict[str, list[list[float]]]:
    """Return the sums row by row, in Python's float64."""
    sums = {
        "level": [[0.0, 0.0] for _ in range(context.max_level + 1)],
        "variant": [[0.0, 0.0] for _ in range(context.variants)],
        "width": [[0.0, 0.0]],
        "rows": [[0.0, 0.0] for _ in range(context.max_level + 1)],
    }

    def add(name: str, k: int, value: float, count: float) -> None:
        sums[name][k][0] += value
        sums[name][k][1] += count

    for b, s, start, end, level in rows_of(context, spans):
        loss, counts, variant = losses[b, s].item(), targets.mask[b, s].item(), b % context.variants
        add("level", level, loss * counts, counts)
        if end > context.source_length - context.horizon:
            add("variant", variant, loss * counts, counts)
        if context.variants == 1 or variant > 0:
            add("width", 0, end - start, 1)
            for k in range(context.max_level + 1):
                add("rows", k, float(k == level), 1)
    return sums


def drawn(context: ContextConfig, raw: int, seed: int) -> tuple[Tensor, Targets, SpanMetadata]:
    """Return losses, targets and rows of a micro-batch."""
    spans = planned(context, raw, seed)
    losses = torch.rand(spans.start.shape, generator=torch.Generator().manual_seed(seed)) * 6
    return losses, row_targets(*sampled(context, raw, seed), spans), spans


@given(variants=VARIANTS, raw=RAW, seed=SEEDS, max_level=st.integers(1, 2))
def test_row_sums_are_those_of_the_loop(variants: int, raw: int, seed: int, max_level: int):
    context = small(variants, max_level)
    losses, targets, spans = drawn(context, raw, seed)
    got = row_sums(losses, targets, spans, context)
    expected = naive_sums(losses, targets, spans, context)
    assert got.keys() == expected.keys()
    for name, pairs in expected.items():
        assert got[name].dtype == torch.float32
        # Every term is positive, so a sum of n terms errs by at most n roundings.
        rtol = losses.numel() * torch.finfo(torch.float32).eps
        torch.testing.assert_close(got[name].double(), torch.tensor(pairs).double(), rtol=rtol, atol=0)


@given(variants=VARIANTS, seed=SEEDS, size=st.sampled_from([2, 5]))
def test_row_sums_add_up_over_context_parallel_ranks(variants: int, seed: int, size: int):
    context = small(variants)
    losses, targets, spans = drawn(context, 2, seed)
    whole = row_sums(losses, targets, spans, context)
    parts = []
    for rank in range(size):
        local = SpanMetadata.of_nodes(
            slice_rows(spans.start, size, rank), slice_rows(spans.level.long(), size, rank), context.block_size
        )
        text, mask = sampled(context, 2, seed)
        parts.append(row_sums(slice_rows(losses, size, rank), row_targets(text, mask, local), local, context))
    rtol = losses.numel() * torch.finfo(torch.float32).eps
    for name, expected in whole.items():
        got = torch.stack([part[name] for part in parts]).sum(dim=0)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=0)


def test_row_sums_take_no_gradient_and_sum_in_single_precision():
    context = small(1)
    losses, targets, spans = drawn(context, 1, seed=1)
    sums = row_sums(losses.bfloat16().requires_grad_(), targets, spans, context)
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in sums.values())
    exact = naive_sums(losses.bfloat16().float(), targets, spans, context)["level"][0][0]
    rtol = losses.numel() * torch.finfo(torch.float32).eps
    assert sums["level"][0, 0].item() == pytest.approx(exact, rel=rtol)


def test_levels_and_variants_account_for_every_row():
    context = small(3)
    losses, targets, spans = drawn(context, 2, seed=9)
    sums = row_sums(losses, targets, spans, context)
    assert sums["level"][:, 1].sum() == targets.mask.sum()
    assert sums["rows"][:, 0].sum() == 2 * 2 * context.window
    assert sums["rows"][:, 1].tolist() == [2 * 2 * context.window] * 3
    assert sums["width"][0].tolist() == [
        2 * 2 * (context.source_length - context.dropped_tokens),
        2 * 2 * context.window,
    ]
    assert sums["variant"][0, 1] == sums["variant"][1, 1] == sums["variant"][2, 1]


@pytest.mark.parametrize(
    ("variants", "names"), [(1, ["random"]), (2, ["recency", "random"]), (3, ["recency", "random1", "random2"])]
)
def test_validation_reports_the_last_rows_by_variant(variants: int, names: list[str]):
    context = small(variants)
    losses, targets, spans = drawn(context, 2, seed=3)
    sums = row_sums(losses, targets, spans, context)
    report = evaluation_report(sums, context)
    assert variant_names(context) == names
    assert list(report) == [f"mc/nll_last/5/{name}" for name in names]
    for variant, pair in enumerate(report.values()):
        last = targets.mask[variant::variants, -5:]
        assert pair[1] == last.sum()
        expected = (losses[variant::variants, -5:] * last).double().sum().item()
        assert pair[0].item() == pytest.approx(expected, rel=10 * torch.finfo(torch.float32).eps)
