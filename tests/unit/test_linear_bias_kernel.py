"""The kernels of attention with a linear bias, run by Triton's interpreter, and the plain reference beside them."""

import dataclasses
import itertools
import math

import pytest
import torch

from megacontext_megatron.kernels import linear_bias_attention as attention
from megacontext_megatron.kernels.attention_reference import reference_attention
from megacontext_megatron.kernels.linear_bias_attention import (
    Launch,
    LinearBias,
    Reach,
    Tiles,
    linear_bias_attention,
    score_bound,
    why_unsupported,
)
from megacontext_megatron.kernels.reach import visits
from tests.linear_bias_cases import (
    FAR,
    GISTS,
    Case,
    Given,
    check,
    definition,
    expected_of,
    found_of,
    given_of,
    reach_of,
)

SMALL = Tiles(Launch(32, 16, 4, 1), Launch(32, 16, 4, 1), Launch(16, 32, 4, 1))
GROUPED = Case(sq=37, sk=75, b=2, np=4, ng=2)
MIXED = dataclasses.replace(GROUPED, widths=GISTS)
CASES = [
    Case(),
    Case(sq=1, sk=1),
    Case(sq=1, sk=50, b=2),
    Case(sq=64, sk=64, np=1),
    Case(sq=33, sk=65, np=3, ng=3, hn=32),
    GROUPED,
    MIXED,
    dataclasses.replace(MIXED, bias="row"),
    dataclasses.replace(GROUPED, bias="row", first=0),
    dataclasses.replace(GROUPED, bias="none"),
    dataclasses.replace(GROUPED, look_back=20),
    dataclasses.replace(GROUPED, look_back=0),
    dataclasses.replace(MIXED, look_back=31, bias="row"),
    Case(sq=90, sk=90, look_back=40, bias="none"),
    dataclasses.replace(MIXED, dtype=torch.bfloat16),
    dataclasses.replace(GROUPED, dtype=torch.float16, look_back=17),
]
REACHING = Case(sq=128, sk=160, b=2, np=4, ng=2, steepest=4.0)
SKIPPING = [
    REACHING,
    dataclasses.replace(REACHING, bias="row", steepest=8.0),
    dataclasses.replace(REACHING, widths=GISTS),
    dataclasses.replace(REACHING, look_back=50),
    Case(sq=100, sk=100, np=2, steepest=8.0, dtype=torch.bfloat16),
]


@pytest.mark.full
def test_copies_by_each_thread_are_attention(monkeypatch):
    """Where tiles are not brought by bulk copies."""
    plain = Tiles._make(launch._replace(bulk=False) for launch in SMALL)
    monkeypatch.setattr(attention, "choose_tiles", lambda head_dim: plain)
    for case in (MIXED, dataclasses.replace(GROUPED, dtype=torch.bfloat16, bias="row", look_back=20)):
        given = given_of(case)
        check(case, found_of(case, given), expected_of(case, given))


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(attention, "choose_tiles", lambda head_dim: SMALL)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_attention(case):
    given = given_of(case)
    check(case, found_of(case, given), expected_of(case, given))


@pytest.mark.parametrize("case", SKIPPING, ids=str)
def test_what_is_skipped_cannot_be_seen(case):
    given = given_of(case)
    reach = reach_of(case)
    found = found_of(case, given, reach)
    check(case, found, expected_of(case, given), reach.tolerance)


def test_tiles_of_the_gpu_are_attention(monkeypatch):
    monkeypatch.undo()
    case = Case(sq=130, sk=200, hn=64, np=2)
    given = given_of(case)
    check(case, found_of(case, given), expected_of(case, given))


@pytest.mark.parametrize("fault", ["slopes", "centre", "scale", "look_back"])
def test_the_comparison_would_tell(fault):
    case = dataclasses.replace(GROUPED, look_back=30)
    given = given_of(case)
    expected = expected_of(case, given)
    if fault == "slopes":
        assert given.slopes is not None
        given.slopes = (given.slopes * (1 + 1e-3)).detach().requires_grad_()
    elif fault == "centre":
        given.doubled_centre[40:] += 1
    with pytest.raises(AssertionError, match="times the bound"):
        check(case, found_of(dataclasses.replace(case, **_changed(fault)), given), expected)


def _changed(fault: str) -> dict[str, int]:
    # The scale follows the channels a case names, which the tensors need not have.
    return {"scale": {"hn": 17}, "look_back": {"look_back": 31}}.get(fault, {})


@pytest.mark.parametrize("widths", [(1,), GISTS])
def test_attention_does_not_know_where_a_sequence_begins(widths):
    near, far = (Case(sq=48, sk=64, widths=widths, first=first) for first in (0, 2**46 // 2))
    found = [found_of(case, given_of(case)) for case in (near, far)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_steep_slopes_over_wide_spans_keep_digits():
    """Neighbours a nat apart, at the end of tiles that span a million."""
    case = Case(sq=64, sk=64, widths=(30_000,) * 48 + (1,) * 16, steepest=1.0, np=1)
    given = given_of(case)
    check(case, found_of(case, given), expected_of(case, given))


def test_whole_float64_centres_are_int64_ones():
    given = given_of(MIXED)
    right = found_of(MIXED, given)
    given.doubled_centre = given.doubled_centre.double()
    found = found_of(MIXED, given)
    assert all(torch.equal(found[name], right[name]) for name in right)


@pytest.mark.full
def test_strides_make_no_difference():
    given = given_of(REACHING)
    right = found_of(REACHING, given, reach_of(REACHING))
    wide = {name: x.detach().repeat_interleave(2, 0)[::2] for name, x in given.leaves().items() if name != "slopes"}
    moved = {name: x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for name, x in wide.items()}
    assert given.slopes is not None
    slopes = given.slopes.detach().repeat_interleave(3)[::3].requires_grad_()
    other = Given(
        **{name: x.requires_grad_() for name, x in moved.items()},
        slopes=slopes,
        doubled_centre=given.doubled_centre.mT.contiguous().mT,
        gradient=given.gradient.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    )
    found = found_of(REACHING, other, reach_of(REACHING))
    assert all(torch.equal(found[name], right[name]) for name in right)


@pytest.mark.full
def test_frozen_slopes_get_no_gradient():
    given = given_of(GROUPED)
    right = found_of(GROUPED, given)
    assert given.slopes is not None
    given.slopes.requires_grad_(False)
    out = linear_bias_attention(given.query, given.key, given.value, GROUPED.scale, given.bias())
    leaves = {name: x for name, x in given.leaves().items() if name != "slopes"}
    found = torch.autograd.grad(out, list(leaves.values()), given.gradient)
    assert all(torch.equal(x, right[name]) for name, x in zip(leaves, found, strict=True))


@pytest.mark.full
def test_backward_is_deterministic():
    given = given_of(REACHING)
    first, second = (found_of(REACHING, given, reach_of(REACHING)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_second_derivatives_are_refused():
    given = given_of(Case())
    out = linear_bias_attention(given.query, given.key, given.value, 1.0, given.bias())
    (slope,) = torch.autograd.grad(out.square().sum(), given.query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


# Reach


def first_row_that_matters(case, given, slopes, threshold, rows):
    """Return what `visits` should find for sequence 0, head by head and tile by tile, counted row by row."""
    centre = given.doubled_centre[:, 0].tolist()
    offset = case.sk - case.sq
    for head, start in itertools.product(range(case.np), range(0, case.sq, rows)):
        steepness = slopes[:, 0, head] if slopes.dim() == 3 else slopes[head : head + 1].expand(case.sq)
        slope = steepness[start : start + rows].min().item()
        here = centre[offset + start]
        alive = [j for j in range(offset + start + 1) if slope * (here - centre[j]) / 2 <= threshold]
        yield head, start // rows, alive[0]


@pytest.mark.parametrize("case", SKIPPING[:3], ids=str)
def test_first_rows_are_those_within_reach(case):
    given, reach = given_of(case), reach_of(case)
    assert given.slopes is not None
    slopes = given.slopes.detach()
    rows = SMALL.frame
    seen = visits(reach, slopes, given.doubled_centre, (case.sq, case.np, case.ng), rows)
    threshold = 2 * reach.score_bound[0].item() + math.log(case.sk / reach.tolerance)
    expected = list(first_row_that_matters(case, given, slopes, threshold, rows))
    assert [seen.first[0, head, tile] for head, tile, _ in expected] == [first for *_, first in expected]
    assert seen.first.max() > 32
    work = (torch.arange(0, case.sq, rows) + case.sk - case.sq + rows - seen.first).sum(2).flatten()
    assert work[seen.heads].tolist() == sorted(work.tolist(), reverse=True)
    of_groups = work.view(case.b * case.ng, -1).sum(1)
    assert of_groups[seen.groups].tolist() == sorted(of_groups.tolist(), reverse=True)


def test_what_is_out_of_reach_is_not_read():
    case = Case(sq=160, sk=160, np=1, steepest=0.0)
    given = given_of(case)
    given.slopes = torch.tensor([2.0], requires_grad=True)
    with torch.no_grad():
        given.value[:64] = float("nan")
        given.key[:64] = float("nan")
    reach = reach_of(case)
    # 2 L + ln(S / eps) is 20 nats, 10 tokens, so tiles of 32 queries read at most one tile of keys before their own.
    near, far = (
        linear_bias_attention(given.query, given.key, given.value, case.scale, given.bias(), reach=x)[96:]
        for x in (reach, None)
    )
    assert near.isfinite().all()
    assert far.isnan().all()
    gradient = torch.zeros_like(given.gradient)
    gradient[96:] = given.gradient[96:]
    with torch.no_grad():
        given.value[:64] = 1.0e30
        given.key[:64] = 0.0
    out = linear_bias_attention(given.query, given.key, given.value, case.scale, given.bias(), reach=reach)
    found = torch.autograd.grad(out, [given.query, given.key, given.value, given.slopes], gradient)
    assert not any(x[:64].any() for x in found[1:3])
    assert max(x[96:].abs().max().item() for x in found[:3]) < 1e3


@pytest.mark.parametrize("slope", [0.0, -1.0, float("nan"), 1e-30])
def test_a_slope_that_does_not_fall_skips_nothing(slope):
    case = Case(sq=96, sk=128, np=2, b=2)
    given = given_of(case)
    for slopes in (torch.full((2,), slope), torch.full((96, 2, 2), slope)):
        seen = visits(reach_of(case), slopes, given.doubled_centre, (96, 2, 1), 32)
        assert not seen.first.any()


@pytest.mark.parametrize("limit", [float("inf"), float("nan"), 1e30])
def test_scores_without_a_bound_skip_nothing(limit):
    given = given_of(REACHING)
    reach = Reach(score_bound=torch.full((4,), limit))
    assert given.slopes is not None
    seen = visits(reach, given.slopes.detach(), given.doubled_centre, (128, 4, 2), 32)
    assert not seen.first.any()


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_no_score_of_normed_heads_exceeds_its_bound(rotated, centred):
    generator = torch.Generator().manual_seed(3)
    query_weight, key_weight = torch.randn(2, 8, generator=generator)
    bound = score_bound(query_weight, key_weight, 0.25, rotated=rotated, zero_centred=centred)
    weights = [w + centred for w in (query_weight, key_weight)]
    largest = [w.abs().argmax() if rotated else (weights[0] * weights[1]).abs().argmax() for w in weights]
    worst = [torch.nn.functional.one_hot(at, 8).float() for at in largest]
    heads = torch.cat([torch.randn(500, 8, generator=generator), torch.stack(worst)])
    query, key = (torch.nn.functional.rms_norm(heads, (8,), w).bfloat16().double() for w in weights)
    lengths = 0.25 * torch.outer(query.norm(dim=1), key.norm(dim=1))
    scores = lengths if rotated else 0.25 * (query @ key.T).abs()
    assert scores.max() <= bound <= 1.02 * scores.max()


# The reference


@pytest.mark.parametrize(
    "case", [GROUPED, dataclasses.replace(MIXED, bias="row", look_back=9), Case(bias="none")], ids=str
)
def test_reference_is_the_definition(case):
    given = given_of(case)
    wide = {name: x.detach().double() for name, x in given.leaves().items()}
    heads = wide["query"], wide["key"], wide["value"]
    centre = given.doubled_centre.double() / 2
    found = reference_attention(*heads, case.scale, look_back=case.look_back, slopes=wide.get("slopes"), centre=centre)
    assert torch.allclose(found, definition(case, wide, given.doubled_centre), rtol=1e-12, atol=1e-12)


def test_reference_refuses_slopes_alone():
    given = given_of(GROUPED)
    with pytest.raises(ValueError, match="centres"):
        reference_attention(given.query, given.key, given.value, 1.0, slopes=given.slopes)


# Refusals


def test_what_cannot_be_served_is_said():
    served = {"heads": 8, "groups": 2, "head_dim": 128, "dtype": torch.bfloat16, "interpreted": False}
    assert why_unsupported(**served) is None
    for name, value, words in (
        ("groups", 3, "not a multiple"),
        ("head_dim", 96, "64 or 128"),
        ("dtype", torch.float32, "float32"),
    ):
        assert words in str(why_unsupported(**{**served, name: value}))


def test_what_does_not_fit_is_refused():
    given = given_of(GROUPED)
    bias = given.bias()
    assert bias is not None
    assert given.slopes is not None
    slopes, centre = given.slopes, given.doubled_centre

    def attend(query=given.query, key=given.key, value=given.value, bias=bias, **options):
        return linear_bias_attention(query, key, value, 1.0, bias, **options)

    wrong = {
        "keys": lambda: attend(key=given.key[:, :, :1]),
        "values": lambda: attend(value=given.value[1:]),
        "queries": lambda: attend(query=torch.zeros(80, 2, 4, 16)),
        "bfloat16": lambda: attend(query=given.query.bfloat16()),
        "channels": lambda: attend(given.query[..., :12], given.key[..., :12], given.value[..., :12]),
        "multiple": lambda: attend(query=given.query[:, :, :3]),
        "rows back": lambda: attend(look_back=-1),
        "slopes": lambda: attend(bias=LinearBias(slopes=slopes[:2], doubled_centre=centre)),
        "centres": lambda: attend(bias=LinearBias(slopes=slopes, doubled_centre=centre[1:])),
        "of torch.float64": lambda: LinearBias(slopes=slopes.double(), doubled_centre=centre),
        "of torch.int32": lambda: LinearBias(slopes=slopes, doubled_centre=centre.int()),
        "bounds": lambda: attend(reach=Reach(score_bound=torch.ones(3))),
        "between 0 and 1": lambda: Reach(score_bound=torch.ones(4), tolerance=0.0),
    }
    for message, asked in wrong.items():
        with pytest.raises(ValueError, match=message):
            asked()


def test_far_is_beyond_fp32():
    assert torch.tensor(float(FAR)).item() == torch.tensor(FAR + 64.0).item()
