"""The attention groups' own logic: oracles, gates that catch wrong kernels, peers' layouts, targets, floors."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megacontext_megatron.kernels.attention_reference import reference_attention
from megacontext_megatron.position.linear_biases import alibi_slopes
from scripts.benchmarks import (
    attention_inputs,
    attention_oracle,
    attention_ours,
    attention_peers,
    attention_race,
    global_bias,
    peers,
    reach_skip,
    results,
    sliding_window,
)
from scripts.benchmarks.attention_inputs import LOOK_BACK, AttentionInputs
from scripts.benchmarks.attention_ours import SPARE
from scripts.benchmarks.attention_peers import Peer
from scripts.benchmarks.attention_race import PASSES, Race
from scripts.benchmarks.gate import GateFailed, require
from scripts.benchmarks.inputs import Shape
from scripts.benchmarks.results import Comparison, Reading, Row, at_most
from tests.unit.attention_cases import (
    CPU,
    HEADS,
    INPUTS,
    NOBODY,
    REFERENCE,
    ROWS,
    RULE,
    SHAPE,
    WINDOW,
    plain_attention,
    reached,
    task,
)

# the oracle


def test_the_oracle_is_attention_as_pytorch_defines_it():
    heads = [x.double().permute(1, 2, 0, 3) for x in HEADS.values()]
    apart = torch.arange(SHAPE.rows)[:, None] - torch.arange(SHAPE.rows)
    seen = (apart >= 0) & (apart <= LOOK_BACK)
    expected = scaled_dot_product_attention(*heads, attn_mask=seen, scale=INPUTS.scale, enable_gqa=True)
    found = attention_oracle.windowed(HEADS, INPUTS.of_output, WINDOW)["output"]
    torch.testing.assert_close(found, expected.permute(2, 0, 1, 3), rtol=1e-12, atol=1e-12)


def test_the_window_does_not_depend_on_its_chunks(monkeypatch):
    given = {**HEADS, **attention_ours.rotary_places(INPUTS), "omega": INPUTS.omega(per_group=False)}
    whole = attention_oracle.windowed(given, INPUTS.of_output, WINDOW)
    monkeypatch.setattr(attention_oracle, "CHUNK", 50)
    for name, part in attention_oracle.windowed(given, INPUTS.of_output, WINDOW).items():
        torch.testing.assert_close(part, whole[name], rtol=1e-9, atol=1e-9)


def test_a_sample_of_rows_is_part_of_the_whole():
    whole = attention_oracle.windowed(HEADS, INPUTS.of_output, WINDOW)
    everything = torch.arange(SHAPE.rows)
    found = attention_oracle.sampled(HEADS, everything, INPUTS.of_output, WINDOW, attention_oracle.HEADS)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    part = attention_oracle.sampled(HEADS, ROWS, INPUTS.of_output[ROWS], WINDOW)["output"]
    torch.testing.assert_close(part, whole["output"][ROWS])
    assert ROWS[0] == 0
    assert ROWS[-1] == SHAPE.rows - 1


def test_a_linear_bias_takes_the_slope_off_for_each_token():
    given = {**HEADS, "slopes": torch.tensor([0.5, 0.0, 0.01, 3.0]), "doubled_centre": INPUTS.doubled_centre}
    centre = INPUTS.doubled_centre.double() / 2
    apart = (centre[:, None] - centre[None]).permute(2, 0, 1).unsqueeze(1)
    bias = -given["slopes"].double()[:, None, None] * apart
    bias = bias.masked_fill(torch.ones(SHAPE.rows, SHAPE.rows).triu(1).bool(), float("-inf"))
    heads = [x.double().permute(1, 2, 0, 3) for x in HEADS.values()]
    expected = scaled_dot_product_attention(*heads, attn_mask=bias, scale=INPUTS.scale, enable_gqa=True)
    found = attention_oracle.sampled(given, ROWS, INPUTS.of_output[ROWS], RULE)["output"]
    torch.testing.assert_close(found, expected.permute(2, 0, 1, 3)[ROWS], rtol=1e-9, atol=1e-12)


def test_gradients_of_heads_make_that_of_the_projection():
    mixed = INPUTS.mixed.double().requires_grad_()
    split = dict(zip(attention_oracle.HEADS, peers.split(mixed, SHAPE.head_dim), strict=True))
    weights = {f"d {name}": torch.randn_like(part) for name, part in split.items()}
    upstream = [weights[f"d {name}"] for name in split]
    (expected,) = torch.autograd.grad(list(split.values()), [mixed], upstream)
    torch.testing.assert_close(attention_oracle.mixed_of(weights), expected)


# what is counted, and where rows are


def test_floors_are_those_of_the_design():
    large = attention_inputs.SHAPES[1:]
    assert [shape.name for shape in large] == ["4096x4", "32768x1"]
    for shape, forward, backward in zip(large, (78, 157), (157, 314), strict=True):
        counts = [attention_inputs.window_bytes(shape, forward=f, backward=not f) for f in (True, False)]
        assert counts[0] / shape.tokens == pytest.approx(20.6e3, rel=1e-3)
        floors = [results.floor_microseconds(count) for count in counts]
        assert floors == pytest.approx([forward, backward], rel=0.01)
    flops = attention_inputs.causal_flops(large[1], forward=True, backward=False)
    assert flops / 790e12 == pytest.approx(11.134e-3, rel=1e-3)
    both = attention_inputs.causal_flops(large[1], forward=True, backward=True)
    assert both == 3.5 * flops


def test_contexts_are_planned_as_training_plans_them():
    shape = Shape(rows=1024, batch=1)
    centres = attention_inputs.planned_centres(shape, seed=1)[:, 0]
    steps = centres.diff()
    assert len(centres) == shape.rows
    assert (steps > 0).all()
    assert set(steps.tolist()) > {2}, "no gists"
    assert int(centres[-1] - centres[0]) // 2 > 7 * shape.rows
    planned = AttentionInputs(shape=shape, device=CPU, centres="context")
    assert torch.equal(planned.doubled_centre, centres[:, None])


def test_slopes_are_flattened_over_the_sequence():
    gentlest = INPUTS.slopes(INPUTS.flattened()).min()
    span = (INPUTS.doubled_centre[-1] - INPUTS.doubled_centre[0]).max() / 2
    assert float(gentlest * span) == pytest.approx(1.0)
    tokens = AttentionInputs(shape=SHAPE, device=CPU, centres="tokens")
    assert tokens.doubled_centre.diff(dim=0).unique().tolist() == [2]


def test_heads_are_normed_on_request():
    normed = AttentionInputs(shape=SHAPE, device=CPU, qk_norm=True)
    for heads in (normed.query, normed.key):
        lengths = heads.float().square().mean(-1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-2, atol=0)
    assert torch.equal(normed.value, INPUTS.value)


# gates


def window_checks(ours=REFERENCE):
    return {check.name.partition(", ")[2]: check for check in sliding_window.gate(ours, INPUTS)}


def other_windows(change=lambda out: out, *, look_back=0, rotated=True):
    """Return the reference with another window, without its rotation, or with its output changed."""
    inner = REFERENCE.windows

    def attention(query, key, value, seen, scale, *, rotation=None):
        kept = rotation if rotated else None
        return change(inner.window_attention(query, key, value, seen + look_back, scale, rotation=kept))

    def of_mixed(mixed, head_dim, seen, scale, *, rotation=None):
        return attention(*peers.split(mixed, head_dim), seen, scale, rotation=rotation)

    module = SimpleNamespace(window_attention=attention, split_window_attention=of_mixed)
    return dataclasses.replace(REFERENCE, windows=module)


def test_the_window_gate_passes_the_reference():
    checks = window_checks()
    require(list(checks.values()))
    assert len(checks) == 10
    assert "from the projection: d mixed" in checks


@pytest.mark.parametrize(
    ("ours", "where"),
    [
        (other_windows(look_back=1), "plain: output"),
        (other_windows(look_back=-1), "plain: output"),
        (other_windows(rotated=False), "rotary inside: output"),
        (other_windows(lambda out: out.flip(2)), "from the projection: output"),
        (other_windows(lambda out: 0.5 * (out + out.detach())), "plain: d value"),
    ],
)
def test_the_window_gate_catches(ours, where):
    checks = window_checks(ours)
    assert not checks[where].passed
    with pytest.raises(GateFailed):
        require(list(checks.values()))


def biased_contest(ours=REFERENCE, backend=plain_attention):
    plain = {
        attention_peers.CUDNN: Peer(attend=backend),
        attention_peers.FLASH4: Peer(attend=backend, layout="sequences first"),
        attention_peers.ENGINE: Peer(absent="gone"),
    }
    biased = {global_bias.FIXED: Peer(absent="gone"), global_bias.DENSE: Peer(absent="gone")}
    return global_bias.Contest(ours, task(), plain, biased, [])


def test_the_bias_gate_passes_the_reference():
    checks = biased_contest().gate()
    require(checks)
    assert len(checks) == 3 * 5
    assert {check.name.rpartition(": ")[2] for check in checks} == {
        "output", "d query", "d key", "d value", "d slopes",
    }  # fmt: skip


def test_the_bias_gate_catches_a_backend_without_the_last_channels():
    def blind(query, key, value):
        return plain_attention(torch.nn.functional.pad(query[..., :-SPARE], (0, SPARE)), key, value)

    failed = {check.name for check in biased_contest(backend=blind).gate() if not check.passed}
    assert any(f"{global_bias.FOLDED[attention_peers.CUDNN]}: output" in name for name in failed)


@pytest.mark.parametrize(("factor", "where"), [(1.1, "output"), (-1.0, "output"), (None, "d slopes")])
def test_the_bias_gate_catches_wrong_slopes(factor, where):
    inner = REFERENCE.biased.linear_bias_attention

    def attention(query, key, value, scale, bias, *, reach=None):
        slopes = bias.slopes
        slopes = (slopes + slopes.detach()) / 2 if factor is None else slopes * factor
        return inner(query, key, value, scale, dataclasses.replace(bias, slopes=slopes), reach=reach)

    wrong = dataclasses.replace(REFERENCE, biased=SimpleNamespace(linear_bias_attention=attention))
    failed = {check.name for check in biased_contest(wrong).gate() if not check.passed}
    assert failed
    assert all(global_bias.KERNEL in name for name in failed)
    assert f"{SHAPE.name}, {global_bias.KERNEL}: {where}" in failed


def skipping(look_back):
    """Return the reference that with a reach sees `look_back` rows."""

    def attention(query, key, value, scale, bias, *, reach=None):
        seen = None if reach is None else look_back
        centre = (bias.doubled_centre - bias.doubled_centre[:1]).double() / 2
        return reference_attention(query, key, value, scale, look_back=seen, slopes=bias.slopes, centre=centre)

    return dataclasses.replace(REFERENCE, biased=SimpleNamespace(linear_bias_attention=attention))


def test_the_reach_gate_passes_what_sees_all_and_catches_what_sees_too_little():
    given = reached(flatter=0.01)
    require(reach_skip.gate(skipping(None), given, object()))
    failed = {c.name.rpartition(": ")[2] for c in reach_skip.gate(skipping(200), given, object()) if not c.passed}
    assert reach_skip.ULPS in failed
    steep = reached(flatter=100.0)
    require(reach_skip.gate(skipping(200), steep, object()))


def test_last_places_are_those_of_the_greatest_number():
    full = torch.tensor([[1.0, -3.0, 0.001]])
    assert reach_skip.last_places(full, full) == 0
    assert reach_skip.last_places(full + torch.tensor([0, 0, 2.0**-6]), full) == 1.0
    assert reach_skip.last_places(full + torch.tensor([0, 2.0**-5, 0]), full) == 2.0


def test_tiles_out_of_reach_are_all_that_cannot_matter():
    rows, bound, tolerance = 512, 11.3, 2.0**-10
    slopes = torch.tensor([0.84, 0.2, 0.1, 1e-4])
    first = reach_skip.first_tiles(slopes, rows, bound, tolerance)
    limit = 2 * bound + torch.log(torch.tensor(rows / tolerance))
    place = torch.arange(rows)
    for head, slope in enumerate(slopes):
        matters = (slope * (place[:, None] - place) <= limit) & (place[:, None] >= place)
        tiles = matters.view(4, 128, 4, 128).any(3).any(1)
        assert tiles.int().argmax(1).tolist() == first[head].tolist()
    assert (first[0] > 0).any()
    assert (first[3] == 0).all()


def test_folds_are_compared_without_what_they_overwrite():
    given = {**HEADS, "slopes": torch.tensor([0.3, 0.2, 0.1, 0.05]), "doubled_centre": INPUTS.doubled_centre}
    changed = attention_ours.as_folded(given, INPUTS.scale)
    assert (changed["query"][..., -SPARE:] == 0).all()
    assert torch.equal(changed["key"][..., :-SPARE], INPUTS.key[..., :-SPARE])
    assert (given["query"][..., -SPARE:] != 0).any()
    assert torch.equal((changed["slopes"] / INPUTS.scale).bfloat16().float() * INPUTS.scale, changed["slopes"])
    torch.testing.assert_close(changed["slopes"], given["slopes"], rtol=2**-8, atol=0)


# what is compared


def timed(case, microseconds=None):
    """Return a row as if every contender that is there had taken the same time."""
    readings = tuple(
        Reading(name=c.name, absent=c.absent)
        if c.call is None
        else Reading(name=c.name, rounds=((microseconds or {}).get(c.name, 100.0),) * 3)
        for c in case.contenders
    )
    return Row(case=case.name, readings=readings, comparisons=tuple(case.comparisons), floor_bytes=case.floor_bytes)


def assert_all_named(row):
    known = {reading.name for reading in row.readings} | {results.FLOOR}
    for comparison in row.comparisons:
        assert {comparison.over, comparison.under} <= known, comparison.name


@pytest.mark.parametrize("how", PASSES)
def test_windows_are_compared_with_all_peers(how):
    windows = {name: Peer(attend=plain_attention) for name in sliding_window.WINDOWS}
    contest = sliding_window.Contest(REFERENCE, Race(inputs=INPUTS, how=how), windows, NOBODY)
    case = contest.case()
    times = {"ours": 50.0, attention_peers.BAND: 90.0, sliding_window.SEPARATE: 20.0}
    row = sliding_window.derived(timed(case, times))
    assert_all_named(row)
    assert row.reading(sliding_window.FASTEST).value == 90.0
    assert row.reading(sliding_window.OWN_PAIR).value == 110.0
    assert row.reading(sliding_window.PAIR).absent
    for contender in case.contenders:
        if contender.name.startswith("ours"):
            assert contender.call is not None
            contender.call()
    judged = {c.name: c.target for c in judged_comparisons(how) if c.target}
    ahead = "fastest peer's rope + fastest peer / ours, rotary inside"
    expected = {ahead: 1.7} if how == "forward + backward" else {"ours / fastest peer": 0.6}
    assert {name: target.bound for name, target in judged.items()} == expected


def judged_comparisons(how):
    """Return what is compared at a shape with targets."""
    race = Race(inputs=AttentionInputs(shape=attention_inputs.SHAPES[1], device=CPU), how=how)
    return list(sliding_window.comparisons(race))


def test_the_best_pair_takes_the_fastest_rope():
    names = {sliding_window.ROPES[peers.FUSED]: 30.0, sliding_window.ROPES[peers.LIGER]: 20.0}
    readings = [Reading(name=name, rounds=(value,) * 3) for name, value in names.items()]
    readings += [Reading(name=attention_peers.VARLEN, rounds=(70.0, 80.0, 90.0))]
    row = sliding_window.derived(Row(case="", readings=tuple(readings)))
    assert row.reading(sliding_window.PAIR).rounds == (90.0, 100.0, 110.0)
    assert row.reading(sliding_window.ENGINE_PAIR).value == 110.0


def test_the_fastest_of_none_is_absent():
    row = Row(case="", readings=(), comparisons=(Comparison(over="ours", under="best", target=at_most(1)),))
    row = attention_race.with_fastest(row, ("a", "b"), "best")
    assert row.reading("best").absent
    assert [ratio.verdict for ratio in row.ratios()] == ["absent"]


@pytest.mark.parametrize("how", global_bias.TIMED)
def test_biases_are_compared_with_the_same_backend_without(how):
    contest = biased_contest()
    row = global_bias.derived(timed(contest.case(how), {global_bias.FOLDED[attention_peers.FLASH4]: 99.0}))
    small = dataclasses.replace(row, comparisons=tuple(c for c in row.comparisons if c.over != global_bias.DENSE))
    assert_all_named(small)
    assert row.reading(global_bias.FASTEST_FOLDED).value == 99.0
    for contender in contest.case(how).contenders:
        if contender.call is not None:
            contender.call()
    race = Race(inputs=AttentionInputs(shape=attention_inputs.SHAPES[2], device=CPU), how=how)
    bounds = sorted(c.target.bound for c in global_bias.comparisons(race) if c.target)
    assert bounds == [0.98, 1.02, 1.02, 1.02]


def test_reach_is_compared_with_attention_to_all():
    given = reached(judged=True)
    plain = {attention_peers.CUDNN: Peer(attend=plain_attention), reach_skip.SKIPPED_TILES: Peer(absent="gone")}
    case = reach_skip.case(REFERENCE, given, plain, Race(inputs=given.inputs, how="backward"))
    row = timed(case, {"ours": 20.0})
    assert_all_named(row)
    assert [(r.value, r.verdict) for r in row.ratios()][:2] == [(5.0, "pass"), (5.0, "")]
    names = [t.name for t in reach_skip.tasks(reach_skip.SHAPES[-1])]
    assert len(names) == 2
    assert [t.judged for t in reach_skip.tasks(reach_skip.SHAPES[-1])] == [True, False]
    assert not any(t.judged for t in reach_skip.tasks(reach_skip.SHAPES[0]))


def test_a_reach_follows_from_normed_heads():
    given = reached()
    reach = attention_ours.reach_of(given.inputs)
    assert reach.score_bound.shape == (SHAPE.query_heads,)
    heads = given.inputs
    scores = torch.einsum("ibgc,jbgc->bgij", heads.query.float()[:, :, ::2], heads.key.float()) * heads.scale
    assert float(scores.abs().max()) <= float(reach.score_bound[0])
    assert float(reach.score_bound[0]) < 1.02 * SHAPE.head_dim**0.5


def test_the_visited_share_is_that_of_the_design():
    shape = Shape(rows=4096, batch=1)
    given = reached(shape=shape)
    reach = SimpleNamespace(score_bound=torch.full((32,), 11.5), tolerance=shape.rows / math.e**17)
    shares = [
        attention_ours.visited_share(given.inputs, factor * torch.tensor(alibi_slopes(32)), reach)
        for factor in (1.0, 1e-9)
    ]
    # T = 2 bound + ln(rows / tolerance) = 40
    assert shares == pytest.approx([0.50, 1.0], abs=0.02)


def test_rates_count_the_causal_half():
    row = Row(case="32768x1, forward", readings=(Reading(name="cuDNN", rounds=(14808.0,)), Reading(name="TE")))
    inputs = AttentionInputs(shape=attention_inputs.SHAPES[2], device=CPU)
    line = attention_race.rates(row, inputs, "forward")
    assert line.endswith(": cuDNN 594")
