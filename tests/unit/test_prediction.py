"""Prediction of coming gists against plain loops over rows, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megacontext_megatron.config import ContextConfig, PredictionConfig
from megacontext_megatron.context.gists import Gists
from megacontext_megatron.model.prediction import (
    TEMPERATURE,
    GistPredictor,
    Predicted,
    expected_embedding,
    prediction_terms,
    states_at,
)
from megacontext_megatron.spans.context_parallel import slice_rows
from megacontext_megatron.spans.metadata import SpanMetadata
from megacontext_megatron.spans.plan import plan_rows
from tests.launch import call

HIDDEN = 5
VOCABULARY = 7
SEEDS = st.integers(0, 2**31 - 1)
READOUTS: tuple[Literal["hidden", "soft-embed", "infonce"], ...] = ("hidden", "soft-embed", "infonce")


def small(variants: int) -> ContextConfig:
    """Return a context of 42 tokens in 20 rows, in blocks of 3 and 9; the last level-2 block is not complete."""
    return ContextConfig(
        window=20, source_length=42, variants=variants, block_size=3, recent_tokens=6, horizon=5, level2_prob=0.6
    )


def planned(context: ContextConfig, raw: int, seed: int) -> SpanMetadata:
    """Return the planned rows [raw V, W]."""
    keys = [(seed, 0, sample, variant) for sample in range(raw) for variant in range(context.variants)]
    plans = [plan_rows(context, key) for key in keys]
    start, level = (torch.stack([torch.from_numpy(getattr(p, name)) for p in plans]) for name in ("start", "level"))
    return SpanMetadata.of_nodes(start, level, context.block_size)


def gists(context: ContextConfig, raw: int, generator: torch.Generator) -> list[Gists]:
    """Return gists of both levels."""
    counts = [context.source_length // context.block_size**level for level in (1, 2)]
    vectors = [torch.randn(n, raw, HIDDEN, generator=generator, dtype=torch.float64) for n in counts]
    return [Gists(vectors=v.requires_grad_(), rms=torch.ones(v.shape[:2])) for v in vectors]


def edge_rows(context: ContextConfig, spans: SpanMetadata, level: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield context, row, the row's own level and the number of the gist that is its target, of every row with one."""
    width = context.block_size**level
    for b, (starts, levels) in enumerate(zip(spans.start.tolist(), spans.level.tolist(), strict=True)):
        for s, (start, own_level) in enumerate(zip(starts, levels, strict=True)):
            end = start + context.block_size**own_level
            if end % width == 0 and end + width <= context.source_length:
                yield b, s, own_level, end // width


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def embedded(states: Tensor, output: Tensor, table: Tensor) -> Tensor:
    """Return the expected embedding of one state, token by token."""
    powers = [(state @ states).exp() for state in output]
    return sum((p * e for p, e in zip(powers, table, strict=True)), torch.zeros(HIDDEN)) / sum(powers)


def total(terms: dict[str, tuple[float, Tensor]]) -> Tensor:
    """Return what the terms add to the objective."""
    return torch.stack([weight * value for weight, value in terms.values()]).sum()


class Case:
    """Random states, gists and weights of a micro-batch, what the package says of them, and what loops say."""

    def __init__(self, variants: int, raw: int, seed: int, readout: Any) -> None:
        self.context, self.readout, self.raw = small(variants), readout, raw
        self.spans = planned(self.context, raw, seed)
        generator = torch.Generator().manual_seed(seed)
        self.levels = gists(self.context, raw, generator)
        shape = (self.context.window, raw * variants, HIDDEN)
        self.hidden = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        self.output = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()
        self.table = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()
        self.settings = PredictionConfig(level1=0.7, level2=0.4, readout=readout)

    def predicted(self, spans: SpanMetadata | None = None, hidden: Tensor | None = None) -> Predicted:
        predictor = GistPredictor(
            context=self.context,
            settings=self.settings,
            embed=lambda states: expected_embedding(states @ self.output.t(), self.table, None),
        )
        return predictor(self.hidden if hidden is None else hidden, self.levels, self.spans if spans is None else spans)

    def by_loops(self) -> tuple[dict[str, Tensor], dict[str, list[list[float]]]]:
        """Return mean losses by term, and the sums that telemetry gets."""
        means: dict[str, Tensor] = {}
        names = {"loss": 2, "agreement": 2, "accept": 2, "by_width": 6}
        sums = {f"predict/{name}": [[0.0, 0.0] for _ in range(size)] for name, size in names.items()}
        for level in (1, 2):
            losses = []
            for b, s, own_level, node in edge_rows(self.context, self.spans, level):
                loss, agreement, accepted = self.row(b, s, (level, node))
                losses.append(loss)
                values = {"loss": loss.item(), "agreement": agreement, "accept": accepted}
                for name, value in values.items():
                    sums[f"predict/{name}"][level - 1][0] += value
                    sums[f"predict/{name}"][level - 1][1] += 1
                sums["predict/by_width"][(level - 1) * 3 + own_level][0] += agreement
                sums["predict/by_width"][(level - 1) * 3 + own_level][1] += 1
            means[f"predict_level{level}"] = torch.stack(losses).mean()
        return means, sums

    def row(self, b: int, s: int, target: tuple[int, int]) -> tuple[Tensor, float, float]:
        """Return a row's loss, agreement, and whether it is accepted."""
        level, node = target
        state, sample = self.hidden[s, b], b // self.context.variants
        answer = embedded(state, self.output, self.table.detach()) if self.readout == "soft-embed" else state
        vectors = self.levels[level - 1].vectors.detach()
        cosines = {
            (n, r): cosine(answer, vectors[n, r]) for n in range(vectors.shape[0]) for r in range(vectors.shape[1])
        }
        own = cosines.pop((node, sample))
        accepted = float(all(own > other for other in cosines.values()))
        if self.readout != "infonce":
            return 1 - own, own.item(), accepted
        powers = [(c / TEMPERATURE).exp() for c in (own, *cosines.values())]
        return (sum(powers) / powers[0]).log(), own.item(), accepted  # type: ignore[union-attr]


@given(variants=st.integers(1, 3), raw=st.integers(1, 2), seed=SEEDS, readout=st.sampled_from(READOUTS))
def test_losses_and_sums_are_those_of_loops_over_rows(variants: int, raw: int, seed: int, readout: str) -> None:
    case = Case(variants, raw, seed, readout)
    predicted = case.predicted()
    means, sums = case.by_loops()
    terms = prediction_terms(predicted, case.settings, lambda value: value)
    assert {name: weight for name, (weight, _) in terms.items()} == {"predict_level1": 0.7, "predict_level2": 0.4}
    for name, mean in means.items():
        torch.testing.assert_close(terms[name][1], mean, rtol=1e-12, atol=1e-12)
    for name, expected in sums.items():
        assert predicted.sums[name].dtype == torch.float32
        assert not predicted.sums[name].requires_grad
        torch.testing.assert_close(predicted.sums[name], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert predicted.sums.keys() == sums.keys()


@pytest.mark.parametrize("readout", READOUTS)
def test_gradients_are_those_of_loops_over_rows(readout: str) -> None:
    case = Case(2, 2, 5, readout)
    leaves = [case.hidden, case.output] if readout == "soft-embed" else [case.hidden]
    terms = prediction_terms(case.predicted(), case.settings, lambda value: value)
    found = torch.autograd.grad(total(terms), leaves)
    means, _ = case.by_loops()
    expected = torch.autograd.grad(0.7 * means["predict_level1"] + 0.4 * means["predict_level2"], leaves)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("readout", READOUTS)
def test_targets_and_the_table_of_embeddings_are_held_fixed(readout: str) -> None:
    case = Case(2, 2, 5, readout)
    terms = prediction_terms(case.predicted(), case.settings, lambda value: value)
    total(terms).backward()
    assert case.hidden.grad is not None
    assert [case.table.grad, *(level.vectors.grad for level in case.levels)] == [None] * 3


def turned(angle: Tensor) -> Tensor:
    """Return unit vectors [..., 2] that turn by a twentieth of a circle for each 1."""
    return torch.stack([(math.tau / 20 * angle).cos(), (math.tau / 20 * angle).sin()], dim=-1)


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("shift", [-1, 0, 1], ids="shifted by {}".format)
def test_the_row_that_ends_at_token_e_is_compared_with_node_e_over_width(level: int, shift: int) -> None:
    """Gist n of sample r points to n + r / 2, and so does the state of a row of which it is the next."""
    context = small(2)
    spans = planned(context, 2, seed=3)
    width = context.block_size**level
    sample = torch.arange(2).double() / 2
    levels = [
        Gists(
            vectors=turned(torch.arange(42 // context.block_size**n).double().unsqueeze(1) + shift + sample),
            rms=torch.ones(42 // context.block_size**n, 2),
        )
        for n in (1, 2)
    ]
    hidden = turned((spans.end / width + sample.repeat_interleave(2).unsqueeze(1)).t())
    settings = PredictionConfig(level1=float(level == 1), level2=float(level == 2))
    predicted = GistPredictor(context=context, settings=settings, embed=lambda x: x)(hidden, levels, spans)
    count = len(list(edge_rows(context, spans, level)))
    assert count > 4
    expected = math.cos(math.tau / 20 * shift)
    torch.testing.assert_close(predicted.sums["predict/agreement"][level - 1], torch.tensor([expected * count, count]))
    accepted = predicted.sums["predict/accept"][level - 1].tolist()
    # Behind the last gist of the last sample there is none that is nearer.
    assert accepted[0] == count if shift == 0 else accepted[0] <= 2
    other = predicted.sums["predict/agreement"][2 - level].tolist()
    assert other == [0.0, 0.0], "a level without a weight is not looked at"


def test_only_rows_at_block_edges_with_a_whole_block_behind_get_gradients() -> None:
    case = Case(2, 1, 8, "hidden")
    terms = prediction_terms(case.predicted(), case.settings, lambda value: value)
    total(terms).backward()
    assert case.hidden.grad is not None
    found = {(b, s) for s, b in case.hidden.grad.abs().sum(dim=-1).nonzero().tolist()}
    assert found == {(b, s) for b, s, _, _ in edge_rows(case.context, case.spans, 1)}
    assert 5 < len(found) < case.spans.start.numel()


@pytest.mark.parametrize("readout", READOUTS)
def test_slices_of_context_parallel_ranks_add_up(readout: str) -> None:
    case = Case(2, 2, 11, readout)
    whole = case.predicted()
    parts = []
    for rank in range(2):
        spans = SpanMetadata.of_nodes(
            slice_rows(case.spans.start, 2, rank), slice_rows(case.spans.level, 2, rank), case.context.block_size
        )
        parts.append(case.predicted(spans, slice_rows(case.hidden.transpose(0, 1), 2, rank).transpose(0, 1)))
    assert min(float(part.sums["predict/loss"][:, 1].min()) for part in parts) > 0
    for level, loss in whole.losses.items():
        torch.testing.assert_close(sum(part.losses[level] for part in parts), loss)
    for name, value in whole.sums.items():
        torch.testing.assert_close(sum(part.sums[name] for part in parts), value)


def test_a_gist_that_two_blocks_share_accepts_nobody() -> None:
    case = Case(1, 2, 4, "hidden")
    for level in case.levels:
        level.vectors.data[:, 1] = level.vectors.data[:, 0]
    accepted = case.predicted().sums["predict/accept"]
    assert accepted[:, 0].tolist() == [0.0, 0.0]
    assert accepted[:, 1].min() > 0


def test_a_level_that_no_row_predicts_has_no_loss_and_no_gradient() -> None:
    """The newest rows of a recency context alone: none of them ends at an edge with a level-2 block behind it."""
    case = Case(1, 1, 2, "hidden")
    start = torch.arange(42 - case.context.window, 42).unsqueeze(0)
    spans = SpanMetadata.of_nodes(start + 8, torch.zeros_like(start), case.context.block_size)
    predicted = case.predicted(spans)
    terms = prediction_terms(predicted, case.settings, lambda value: value)
    assert predicted.sums["predict/loss"][1].tolist() == [0.0, 0.0]
    assert terms["predict_level2"][1].item() == 0.0
    terms["predict_level2"][1].backward()
    assert case.hidden.grad is not None
    assert not case.hidden.grad.any()


def test_half_precision_is_compared_in_single() -> None:
    case = Case(2, 1, 6, "infonce")
    case.levels = [Gists(vectors=level.vectors.detach().bfloat16(), rms=level.rms) for level in case.levels]
    losses = case.predicted(hidden=case.hidden.detach().bfloat16()).losses
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


def in_rank(scattered: bool) -> list[float]:
    """Return the largest differences of value and gradients from one process, in a tensor-parallel rank."""
    dist.init_process_group("gloo")
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    generator = torch.Generator().manual_seed(1)
    hidden, output, table = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((8, 3, HIDDEN), (6, HIDDEN), (6, HIDDEN))
    )
    number = torch.randint(8, (4, 3), generator=generator)
    wanted = torch.randn(4, 3, HIDDEN, generator=generator, dtype=torch.float64)
    alone = expected_embedding(states_at(hidden, number, None) @ output.t(), table, None)
    expected = torch.autograd.grad((alone * wanted).sum(), [hidden, output])

    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    own = hidden.chunk(size)[rank] if scattered else hidden
    states = copy_to_tensor_model_parallel_region(states_at(own, number, group if scattered else None), group=group)
    split = expected_embedding(states @ output.chunk(size)[rank].t(), table.chunk(size)[rank], group)
    found = torch.autograd.grad((split * wanted).sum(), [hidden, output])
    kept = expected[0].chunk(size)[rank] if scattered else expected[0]
    ours = found[0].chunk(size)[rank] if scattered else found[0]
    differences = [split - alone, ours - kept, found[1].chunk(size)[rank] - expected[1].chunk(size)[rank]]
    dist.destroy_process_group()
    return [float(expected[1].abs().max()), *(float(d.abs().max()) for d in differences)]


@pytest.mark.parametrize("scattered", [False, True], ids=["TP2", "TP2+SP"])
def test_split_vocabulary_and_scattered_rows_change_nothing(tmp_path: Path, scattered: bool) -> None:
    for least, *differences in call(in_rank, {"scattered": scattered}, 2, workdir=tmp_path).check().values:
        assert least > 0.1
        assert max(differences) < 1e-12
