"""The sliding-window attention kernels as compiled for the GPU, at the shapes of a training."""

import dataclasses

import pytest
import torch

from megacontext_megatron.kernels.window_attention import choose_tiles, window_attention
from tests import window_checks
from tests.window_cases import Case, check_against_float64, found, given_of

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
REAL = Case(sq=4096, sk=4096, b=1, np=32, ng=8, hn=128, look_back=127, dtype=torch.bfloat16)
LONG = dataclasses.replace(REAL, b=32, np=4, ng=1)
"""So many groups that a program marches along 16 blocks of 64 rows, and uses each place of its ring four times."""

RAGGED = dataclasses.replace(REAL, sq=333, sk=701, b=2, np=8, ng=2)
TURNED = dataclasses.replace(RAGGED, rotary="halves", sigma=1, offset=True)
MIXED = dataclasses.replace(TURNED, sq=701, mixed=True)
HALO = dataclasses.replace(RAGGED, sq=256, sk=383, dtype=torch.float16)
TILES = choose_tiles(128, 4, 127)
CASES = [
    REAL,
    LONG,
    HALO,
    *(dataclasses.replace(case, tiles=TILES) for case in (REAL, RAGGED, TURNED, MIXED)),
    dataclasses.replace(REAL, rotary="halves", sigma=1, mixed=True),
    *(dataclasses.replace(RAGGED, look_back=look_back) for look_back in (0, 1, 31, 127, 1000)),
    dataclasses.replace(RAGGED, np=4, ng=4, dtype=torch.float16),
    dataclasses.replace(RAGGED, np=4, ng=2, hn=64),
    dataclasses.replace(RAGGED, np=6, ng=2, hn=64, look_back=31, rotary="interleaved", sigma=2, percent=0.5),
    dataclasses.replace(RAGGED, np=16, ng=1, sq=1, b=3),
    TURNED,
    dataclasses.replace(TURNED, rotary="interleaved", damp_query=False),
    dataclasses.replace(TURNED, sigma=2, grouped_frequencies=True, percent=0.5),
    MIXED,
    dataclasses.replace(MIXED, rotary="", hn=64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_the_float64_definition(case):
    check_against_float64(case, DEVICE)


@pytest.mark.parametrize("case", [RAGGED, TURNED], ids=str)
def test_rows_out_of_sight_change_no_bit(case):
    window_checks.check_rows_out_of_sight(case, DEVICE)


@pytest.mark.parametrize("case", [MIXED, dataclasses.replace(MIXED, rotary="")], ids=str)
def test_a_mixed_projection_is_its_parts_bit_for_bit(case):
    window_checks.check_mixed_is_its_parts(case, DEVICE)


def test_strides_make_no_difference():
    window_checks.check_strides(TURNED, DEVICE)


@pytest.mark.parametrize("case", [RAGGED, HALO, dataclasses.replace(HALO, hn=64)], ids=str)
def test_rows_of_larger_tensors_are_written_where_they_lie(case):
    window_checks.check_rows_of_larger_tensors(case, DEVICE)


def test_masking_all_tiles_or_those_at_an_edge_is_the_same():
    window_checks.check_masks(RAGGED, DEVICE)


@pytest.mark.parametrize("rotary", ["halves", "interleaved"])
def test_rotation_inside_is_the_separate_one(rotary):
    case = dataclasses.replace(TURNED, rotary=rotary, first=2**40)
    window_checks.check_rotation_is_the_separate_one(case, DEVICE)


@pytest.mark.parametrize("case", [REAL, dataclasses.replace(REAL, tiles=TILES), MIXED], ids=str)
def test_backward_is_deterministic(case):
    window_checks.check_backward_is_deterministic(case, DEVICE)


@pytest.mark.parametrize("case", [RAGGED, HALO, MIXED, LONG, dataclasses.replace(REAL, sk=1024, sq=1024)], ids=str)
def test_calls_one_after_another_give_the_same_bits(case):
    """What is copied too early or too late into a tile shows only now and then."""
    given = given_of(case, DEVICE)
    out, gradients = found(case, given)
    for _ in range(100):
        same_out, same = found(case, given)
        assert torch.equal(out, same_out)
        assert all(map(torch.equal, gradients, same))


def test_more_channels_than_32_bits_count():
    """Rows at the end of four sequences of 131072 are those of a short call, forward and backward."""
    short = dataclasses.replace(REAL, sq=256, sk=256, b=4)
    given = given_of(short, DEVICE)
    out, gradients = found(short, given)
    heads = []
    for x in given.heads:
        whole = torch.zeros(131_072, *x.shape[1:], device=DEVICE, dtype=x.dtype)
        whole[-256:] = x.detach()
        heads.append(whole.requires_grad_())
    assert heads[0].numel() >= 2**31
    query, key, value = heads
    found_out = window_attention(query, key, value, short.look_back, short.scale)
    incoming = torch.zeros_like(found_out)
    incoming[-128:] = given.incoming[-128:]
    alone = torch.zeros_like(out)
    alone[-128:] = given.incoming[-128:]
    gradients = found(short, dataclasses.replace(given, incoming=alone))[1]
    # The last 128 rows see nothing of what lies before the short call's rows.
    assert torch.equal(found_out[-128:], out[-128:])
    for x, y in zip(torch.autograd.grad(found_out, heads, incoming), gradients, strict=True):
        assert torch.equal(x[-256:], y)
        assert not x[:-256].any()
