"""The kernels of attention with a linear bias as compiled for the GPU, at the head sizes of a training."""

import dataclasses

import pytest
import torch

from megacontext_megatron.kernels.linear_bias_attention import LinearBias, Reach, linear_bias_attention
from megacontext_megatron.kernels.reach import visits
from tests.linear_bias_cases import (
    GISTS,
    Case,
    check,
    doubled_centres,
    expected_of,
    found_of,
    given_of,
    reach_of,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
REAL = Case(sq=1024, sk=1024, b=2, np=8, ng=2, hn=128, dtype=torch.bfloat16)
RAGGED = dataclasses.replace(REAL, sq=517, sk=1103, widths=GISTS)
CASES = [
    REAL,
    RAGGED,
    dataclasses.replace(RAGGED, bias="row"),
    dataclasses.replace(RAGGED, bias="none"),
    dataclasses.replace(RAGGED, look_back=300),
    dataclasses.replace(REAL, look_back=127, bias="none"),
    dataclasses.replace(RAGGED, hn=64, dtype=torch.float16, ng=8),
    dataclasses.replace(RAGGED, sq=1, sk=300),
]


@pytest.mark.parametrize("reaching", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_attention(case, reaching):
    given = given_of(case, DEVICE)
    reach = reach_of(case, DEVICE) if reaching and case.bias != "none" else None
    left_out = 0.0 if reach is None else reach.tolerance
    check(case, found_of(case, given, reach), expected_of(case, given), left_out)


def test_backward_is_deterministic():
    given = given_of(REAL, DEVICE)
    first, second = (found_of(REAL, given, reach_of(REAL, DEVICE)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def alibi(heads):
    return torch.tensor([2.0 ** (-8 * (i + 1) / heads) for i in range(heads)], device=DEVICE)


@pytest.mark.parametrize("widths", [(1,), GISTS])
def test_skipping_cannot_be_seen_in_bf16(widths):
    """Standard slopes of 32 heads over 16384 rows: with and without reach, one unit of a row's largest value apart."""
    case = Case(sq=16_384, sk=16_384, np=32, ng=8, hn=128, dtype=torch.bfloat16, widths=widths)
    given = given_of(case, DEVICE)
    given.slopes = alibi(case.np).requires_grad_()
    full, skipped = (found_of(case, given, x) for x in (None, reach_of(case, DEVICE)))
    largest = given.value.detach().abs().amax().float()
    unit = 2.0 ** (torch.floor(torch.log2(largest)) - 7)
    assert (full["out"].float() - skipped["out"].float()).abs().max() <= unit
    for name in ("query", "key", "value", "slopes"):
        right, found = full[name].double(), skipped[name].double()
        assert (right - found).norm() <= 2.0**-9 * right.norm(), name


def test_reach_needs_no_host():
    case = Case(sq=4096, sk=4096, np=8, ng=2, hn=128, dtype=torch.bfloat16)
    given, reach = given_of(case, DEVICE), reach_of(case, DEVICE)
    found_of(case, given, reach)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found_of(case, given, reach)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_far_apart_in_memory():
    """Queries of more than 2^31 elements: the last rows are those of a short call that holds all within reach."""
    rows, few = 131_072, 512
    case = Case(sq=few, sk=few, b=4, np=32, ng=8, hn=128, dtype=torch.bfloat16)
    short = given_of(case, DEVICE)
    slopes = torch.full((case.np,), 2.0, device=DEVICE, requires_grad=True)
    reach = Reach(score_bound=reach_of(case, DEVICE).score_bound)
    whole = []
    for x in (short.query, short.key, short.value, short.gradient):
        padded = torch.zeros(rows, *x.shape[1:], device=DEVICE, dtype=x.dtype)
        padded[-few:] = x.detach()
        whole.append(padded)
    query, key, value, gradient = whole
    assert query.numel() >= 2**31
    centre = doubled_centres((1,), rows, 0)[:, None].expand(rows, case.b).to(DEVICE)
    assert (visits(reach, slopes.detach(), centre, (rows, case.np, case.ng), 128).first[..., -1] > rows - 256).all()
    query.requires_grad_()
    out = linear_bias_attention(
        query, key, value, case.scale, LinearBias(slopes=slopes, doubled_centre=centre), reach=reach
    )
    (found,) = torch.autograd.grad(out, query, gradient)
    short.slopes, short.doubled_centre = slopes, centre[-few:]
    right = found_of(case, short, reach)
    assert torch.equal(out[-256:], right["out"][-256:])
    assert torch.equal(found[-256:], right["query"][-256:])
