"""Every term beside the next-token loss: its value against loops, and the direction in which it pulls."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megacontext_megatron.config import (
    ContextConfig,
    GistConfig,
    ObjectiveConfig,
    PredictionConfig,
    RotaryConfig,
    Settings,
)
from megacontext_megatron.context.gists import Gists
from megacontext_megatron.model.gist_terms import MARGIN, GistTerms, contrast, detached_gists, pooling, spread
from megacontext_megatron.model.losses import Targets
from megacontext_megatron.model.objective import SPAN_HEAD, LastRows, TrainingObjective, advantage, imitation
from megacontext_megatron.model.requests import Lesson, RowOutputs
from megacontext_megatron.spans.metadata import SpanMetadata

CONTEXT = ContextConfig(
    window=40, source_length=96, variants=2, block_size=4, recent_tokens=8, horizon=8, level2_prob=0.5
)
BLOCKS = {1: (1, 22), 2: (1, 5)}
"""First and behind the last block of a level that may stand in rows: 2 tokens are dropped, 8 protected."""
HIDDEN = 6
TOLERANCE = 1e-6
DRAWS = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    """Return normal fp32 values."""
    return torch.randn(shape, generator=DRAWS)


def gists(samples: int, hidden: int = HIDDEN) -> list[Gists]:
    """Return gists of both levels with gradients."""
    sizes = [CONTEXT.source_length // CONTEXT.block_size**level for level in (1, 2)]
    return [Gists(drawn(n, samples, hidden).requires_grad_(), torch.ones(n, samples)) for n in sizes]


def settings(objective: ObjectiveConfig, **gist: Any) -> Settings:
    """Return settings whose gists are learned."""
    return Settings(
        encoding="gaussian_rope",
        rotary=RotaryConfig(head_dim=8),
        context=CONTEXT,
        gist=GistConfig(hidden=HIDDEN, kind="gistnet", hidden_size=8, **gist),
        objective=objective,
        prediction=PredictionConfig(),
        megacontext=True,
    )


def objective_of(objective: ObjectiveConfig, consumed: int = 0, **gist: Any) -> TrainingObjective:
    """Return a training objective in one process after so many contexts."""
    return TrainingObjective(
        settings=settings(objective, **gist), over_context=lambda value: value, consumed=lambda: consumed
    )


def planned(contexts: int) -> SpanMetadata:
    """Return the newest tokens as rows, in which the last H are where they are in every plan."""
    start = torch.arange(CONTEXT.source_length - CONTEXT.window, CONTEXT.source_length).repeat(contexts, 1)
    return SpanMetadata.of_nodes(start, torch.zeros_like(start), CONTEXT.block_size)


def stepped(value: Tensor, *inputs: Tensor, rate: float) -> list[Tensor]:
    """Return inputs after a step against the gradient of `value`."""
    gradients = torch.autograd.grad(value, inputs)
    return [(i - rate * g).detach() for i, g in zip(inputs, gradients, strict=True)]


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_contrast_is_the_mean_hinge_over_pairs_of_other_blocks(samples: int):
    levels = gists(samples)
    # Alike enough for the hinge to act.
    levels = [each._replace(vectors=each.vectors + 4.0) for each in levels]
    total, count = contrast(levels, CONTEXT)
    expected, pairs = 0.0, 0
    for level, (first, last) in BLOCKS.items():
        vectors, n = levels[level - 1].vectors.detach().double(), last - first
        for block in range(n):
            for sample in range(samples):
                place = (block * samples + sample - n // 2 * samples - (samples > 1)) % (n * samples)
                other = divmod(place, samples)
                assert other != (block, sample)
                one, two = vectors[first + block, sample], vectors[first + other[0], other[1]]
                expected += max(0.0, MARGIN - (1.0 - float(functional.cosine_similarity(one, two, dim=0))))
                pairs += 1
    assert count == pairs
    assert math.isclose(float(total), expected, rel_tol=1e-4)
    assert expected > 0


def test_contrast_pushes_gists_apart():
    """Parallel gists cost the margin, orthogonal ones nothing, and a step lowers their cosine."""
    apart = [Gists(torch.eye(24).unsqueeze(1), torch.ones(24, 1))]
    same = [Gists(torch.ones(24, 1, 24), torch.ones(24, 1))]
    (worst, pairs), (best, _) = contrast(same, CONTEXT), contrast(apart, CONTEXT)
    assert math.isclose(float(worst) / pairs, MARGIN, rel_tol=1e-5)
    assert best == 0
    vectors = (torch.ones(24, 1, HIDDEN) + 0.1 * drawn(24, 1, HIDDEN)).requires_grad_()
    total, _ = contrast([Gists(vectors, torch.ones(24, 1))], CONTEXT)
    (moved,) = stepped(total, vectors, rate=0.1)
    after, _ = contrast([Gists(moved, torch.ones(24, 1))], CONTEXT)
    assert 0 < after < total
    inside = slice(*BLOCKS[1])
    assert mean_cosine(moved[inside]) < mean_cosine(vectors[inside])
    assert torch.equal(moved[: inside.start], vectors[: inside.start])
    assert torch.equal(moved[inside.stop :], vectors[inside.stop :])


def mean_cosine(vectors: Tensor) -> float:
    """Return the mean cosine over all pairs."""
    unit = functional.normalize(vectors.detach().flatten(0, 1), dim=-1)
    return float((unit @ unit.t()).mean())


def test_a_single_block_has_nobody_to_differ_from():
    context = dataclasses.replace(CONTEXT, source_length=44, window=41, block_size=4, max_level=1, recent_tokens=8)
    lonely = [Gists(drawn(11, 1, HIDDEN), torch.ones(11, 1))]
    lonely_context = dataclasses.replace(context, recent_tokens=40)
    assert (lonely_context.source_length - lonely_context.protected_tokens) // 4 == 1
    total, pairs = contrast(lonely, lonely_context)
    assert (float(total), pairs) == (0.0, 0)
    loss = GistTerms(context=lonely_context, weights={"contrast": 1.0}, scale=torch.ones(()))(lonely)
    assert loss == 0


def test_pooling_is_the_mean_squared_distance_at_unit_size():
    level, states = gists(2)[0], drawn(2, 24, HIDDEN).to(torch.bfloat16)
    total, count = pooling(level, states)
    expected = 0.0
    for block in range(24):
        for sample in range(2):
            pair = (level.vectors.detach()[block, sample].double(), states[sample, block].double())
            one, two = (each / each.square().mean().sqrt() for each in pair)
            expected += float((one - two).square().mean())
    assert count == 48
    assert math.isclose(float(total.detach()), expected, rel_tol=1e-5)


def test_pooling_pulls_gists_to_the_states_of_their_own_blocks():
    states = drawn(2, 24, HIDDEN)
    right = Gists(3.0 * states.transpose(0, 1), torch.ones(24, 2))
    neighbour = Gists(right.vectors.roll(1, dims=0), torch.ones(24, 2))
    assert pooling(right, states)[0] < TOLERANCE < pooling(neighbour, states)[0]
    level = gists(2)[0]
    before, _ = pooling(level, states)
    (moved,) = stepped(before, level.vectors, rate=0.1)
    assert pooling(Gists(moved, level.rms), states)[0] < before


def test_spread_tells_gists_that_are_all_the_same():
    vector = drawn(HIDDEN)
    same = spread(Gists(vector.expand(24, 3, HIDDEN), torch.ones(24, 3)))
    assert same[0, 0] == 0
    assert same[0, 1] > 0
    level = gists(3)[0]
    found = spread(level)
    unit = functional.normalize(level.vectors.detach().double().flatten(0, 1), dim=-1)
    expected = unit.var(dim=0, correction=0).sum().item()
    assert found.shape == (1, 2)
    assert math.isclose(float(found[0, 0] / found[0, 1]), expected, rel_tol=1e-5)
    assert not found.requires_grad


def test_gist_terms_are_weighted_means_at_their_scale():
    levels, states = gists(2), drawn(2, 24, HIDDEN)
    levels = [each._replace(vectors=each.vectors + 4.0) for each in levels]
    heard: list[dict[str, Tensor]] = []
    scale = torch.tensor(0.125)
    terms = GistTerms(
        context=CONTEXT, weights={"contrast": 0.3, "pooling": 2.0}, scale=scale, states=states, observe=heard.append
    )
    (apart, pairs), (distance, blocks) = contrast(levels, CONTEXT), pooling(levels[0], states)
    loss = terms(levels)
    torch.testing.assert_close(loss, scale * (0.3 * apart / pairs + 2.0 * distance / blocks))
    [sums] = heard
    assert {name: (each.shape, each.dtype, each.requires_grad) for name, each in sums.items()} == {
        name: (torch.Size([1, 2]), torch.float32, False) for name in ("contrast", "pooling", "spread")
    }
    torch.testing.assert_close(sums["contrast"], torch.tensor([[float(apart), pairs]]))
    torch.testing.assert_close(sums["pooling"], torch.tensor([[float(distance), blocks]]))


def test_a_term_without_weight_is_seen_and_not_felt():
    levels, heard = gists(2), []
    loss = GistTerms(context=CONTEXT, weights={}, scale=torch.ones(()), observe=heard.append)(levels)
    assert loss == 0
    assert not loss.requires_grad
    assert heard[0].keys() == {"contrast", "spread"}


def last_rows_of(losses: Tensor) -> LastRows:
    """Return the sums of the last rows of two variants of samples, where every row counts."""
    spans = planned(losses.shape[0])
    targets = Targets(labels=torch.zeros_like(spans.start), mask=torch.ones_like(losses))
    return LastRows.of(losses, targets, spans, CONTEXT, lambda value: value)


def test_advantage_counts_only_where_the_mixed_context_is_worse():
    losses = torch.ones(4, CONTEXT.window)
    losses[1, -CONTEXT.horizon :] = 3.0
    losses[3, -CONTEXT.horizon :] = 0.5
    # Outside the last H nothing is compared.
    losses[2, : -CONTEXT.horizon] = 100.0
    losses.requires_grad_()
    value = advantage(last_rows_of(losses))
    assert math.isclose(float(value), (3.0 - 1.0) / 2)
    value.backward()
    assert losses.grad is not None
    assert (losses.grad[1, -CONTEXT.horizon :] > 0).all()
    # Neither is the recency loss pushed up, nor a mixed one that is better.
    assert losses.grad[[0, 2, 3]].abs().max() == 0
    assert losses.grad[1, : -CONTEXT.horizon].abs().max() == 0


VOCABULARY, PADDED = 5, 8


def taught(variants: int = 2, rows: int = 8) -> tuple[Tensor, Lesson, Tensor]:
    """Return a student's logits, a lesson for two samples, and a mask in which some last rows do not count."""
    lesson = Lesson(rows=torch.arange(CONTEXT.window - rows, CONTEXT.window), logits=drawn(rows, 2, VOCABULARY))
    mask = torch.ones(2 * variants, CONTEXT.window)
    mask[-1, -3:] = 0.0
    mask[:, : -CONTEXT.horizon] = 0.0
    return drawn(rows, 2 * variants, PADDED).requires_grad_(), lesson, mask


@pytest.mark.parametrize("variants", [1, 2, 3])
def test_imitation_is_the_mean_over_counted_last_rows_of_mixed_contexts(variants: int):
    student, lesson, mask = taught(variants)
    assert lesson.logits is not None
    found = imitation(student, lesson, mask, variants, lambda value: value)
    values = []
    for context in range(2 * variants):
        for row in range(8):
            if (context % variants or variants == 1) and mask[context, CONTEXT.window - 8 + row]:
                one = student[row, context, :VOCABULARY].detach().double().log_softmax(dim=0)
                teacher = lesson.logits[row, context // variants].double().log_softmax(dim=0)
                values.append(float((teacher.exp() * (teacher - one)).sum()))
    assert len(values) == 2 * max(1, variants - 1) * 8 - 3
    assert math.isclose(float(found), sum(values) / len(values), rel_tol=1e-5)
    found.backward()
    assert student.grad is not None
    # Padding of the vocabulary is neither taught nor pushed down.
    assert student.grad[..., VOCABULARY:].abs().max() == 0
    recency = student.grad[:, ::variants].abs().max()
    assert (recency == 0) == (variants > 1)


def test_imitation_is_smaller_for_who_says_what_the_teacher_says():
    student, lesson, mask = taught()
    assert lesson.logits is not None
    said = torch.cat([lesson.logits.repeat_interleave(2, dim=1), student.detach()[..., VOCABULARY:]], dim=-1)
    worse = imitation(student, lesson, mask, 2, lambda value: value)
    assert imitation(said, lesson, mask, 2, lambda value: value) < TOLERANCE < worse
    (moved,) = stepped(worse, student, rate=1.0)
    assert imitation(moved, lesson, mask, 2, lambda value: value) < worse


def test_imitation_of_no_row_that_counts_is_nothing():
    student, lesson, mask = taught()
    value = imitation(student, lesson, mask * 0, 2, lambda value: value)
    value.backward()
    assert value == 0
    assert student.grad is not None
    assert student.grad.abs().max() == 0


POOLING = ObjectiveConfig(
    pooling=1.0, contrast=0.5, phase="pooling-then-substitution", pooling_samples=100, teacher="cache"
)


@pytest.mark.parametrize(("consumed", "pools"), [(0, True), (99, True), (100, False)])
def test_phases_follow_consumed_contexts(consumed: int, pools: bool):
    objective = objective_of(POOLING, consumed, span_head=True)
    request = objective.request(Lesson(), torch.ones(()))
    assert objective.pools_only == pools
    assert objective.gist_weights == {"contrast": 0.0 if pools else 0.5, "pooling": 1.0}
    assert (request.control is detached_gists) == pools
    assert objective.idle_parameters == ((SPAN_HEAD,) if pools else ())
    assert isinstance(request.gist_loss, GistTerms)


def test_only_the_span_head_idles():
    assert objective_of(POOLING).idle_parameters == ()
    other = dataclasses.replace(POOLING, phase="substitution", pooling_samples=0)
    assert objective_of(other, span_head=True).idle_parameters == ()


def test_detached_gists_are_the_same_without_gradients():
    level = Gists(drawn(3, 1, 2).requires_grad_(), torch.ones(3, 1), drawn(3, 1, 2).requires_grad_())
    [found] = detached_gists([level])
    assert found.shift is not None
    assert level.shift is not None
    assert torch.equal(found.vectors, level.vectors)
    assert torch.equal(found.shift, level.shift)
    assert not found.vectors.requires_grad
    assert not found.shift.requires_grad


def test_nothing_is_asked_for_that_nobody_wants():
    plain = objective_of(ObjectiveConfig())
    assert plain.request(Lesson(), torch.ones(())).gist_loss is None
    assert plain.request(Lesson(), torch.ones(()), lambda sums: None).gist_loss is not None
    assert objective_of(POOLING).request(Lesson(), None).gist_loss is None


def test_terms_join_with_their_weights():
    """Of a micro-batch, each term by its name and with its flag's weight."""
    losses = torch.rand(4, CONTEXT.window, generator=DRAWS)
    spans = planned(4)
    targets = Targets(labels=torch.zeros_like(spans.start), mask=torch.ones_like(losses))
    outputs = RowOutputs(losses=losses)
    terms = objective_of(ObjectiveConfig(advantage=0.7)).terms(outputs, targets, spans, Lesson())
    assert terms.keys() == {"advantage"}
    assert terms["advantage"][0] == 0.7
    assert objective_of(ObjectiveConfig()).terms(outputs, targets, spans, Lesson()) == {}
