"""The strips of windows of 128 rows: their kernels' source on the CPU, and compiled for Hopper without a GPU."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton import knobs

from megacontext_megatron.kernels import window_attention as kernels
from megacontext_megatron.kernels import window_strips as strips
from megacontext_megatron.kernels.window_layout import WindowLayout
from tests import window_checks
from tests.gluon_emulator import Descriptor, Machine, Pointer
from tests.window_cases import Case, check_against_float64, found, given_of

ALL = Case(sq=130, sk=130, b=1, np=4, ng=1, hn=128, look_back=127, dtype=torch.bfloat16)
FEW = replace(ALL, sq=17, sk=144)
LATE = replace(ALL, sq=150, sk=277, b=2)
LONG = replace(ALL, sq=448, sk=448, np=8, ng=2)
TURNED = replace(ALL, rotary="halves", sigma=1, offset=True, mixed=True)


class OnTheCPU:
    """A Gluon kernel that is launched on the stand-in machine."""

    def __init__(self, kernel, *, fences=True):
        self._kernel, self._fences, self.launches = kernel, fences, 0

    def __getitem__(self, grid):
        def launch(*, num_warps, **arguments):
            self.launches += 1
            as_pointers = {name: Pointer(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
            Machine(self.launches, fences=self._fences).run(self._kernel, grid, as_pointers)

        return launch


@pytest.fixture
def emulated(monkeypatch):
    """Strips on the CPU, two programs to a query group; returns the two kernels."""

    def emulate(*, fences=True):
        launched = [
            OnTheCPU(kernel, fences=fences) for kernel in (strips.strip_forward_kernel, strips.strip_query_kernel)
        ]
        monkeypatch.setattr(strips, "strip_forward_kernel", launched[0])
        monkeypatch.setattr(strips, "strip_query_kernel", launched[1])
        return launched

    monkeypatch.setattr(
        strips, "TensorDescriptor", lambda x, shape, strides, block, _: Descriptor(x, shape, strides, block)
    )
    monkeypatch.setattr(strips, "_processors", lambda device: 4)
    monkeypatch.setattr(strips, "_why_not_here", lambda device: None)
    return emulate


@pytest.mark.parametrize(
    "case",
    [
        ALL,
        FEW,
        LATE,
        LONG,
        TURNED,
        replace(ALL, mixed=True, dtype=torch.float16),
        replace(TURNED, rotary="interleaved", damp_query=False, mixed=False, np=8, ng=2),
        replace(TURNED, sq=40, sk=167, mixed=False, percent=0.5, b=2),
        replace(TURNED, np=8, ng=2, sigma=2, grouped_frequencies=True),
    ],
    ids=str,
)
def test_strips_are_the_float64_definition(case, emulated):
    launched = emulated()
    check_against_float64(case)
    assert [kernel.launches for kernel in launched] == [1, 1]


@pytest.mark.parametrize("before", [0, 127])
def test_what_lies_in_the_ring_is_waited_for_time_and_again(before, emulated, monkeypatch):
    """A strip so long that each place in the ring is used four times."""
    emulated()
    monkeypatch.setattr(strips, "_processors", lambda device: 1)
    check_against_float64(replace(ALL, sq=832, sk=832 + before))


def test_gradients_that_lie_elsewhere_are_made_dense(emulated):
    launched, case = emulated(), ALL
    given = given_of(case)
    right = found(case, given)[1]
    wide = torch.zeros(case.b, case.sq, case.np, case.hn + 1, dtype=case.dtype)
    wide[..., 1:] = given.incoming.transpose(0, 1)
    given.incoming = wide[..., 1:].transpose(0, 1)
    assert all(map(torch.equal, found(case, given)[1], right))
    assert launched[1].launches == 2


def test_rows_out_of_sight_change_no_bit(emulated):
    launched = emulated()
    window_checks.check_rows_out_of_sight(replace(ALL, sq=300, sk=300))
    assert launched[0].launches == 9


@pytest.mark.parametrize(("pairs", "interleaved"), [(2, False), (4, False), (2, True), (8, False)])
def test_few_pairs_of_halves_are_turned_in_tiles(pairs, interleaved, emulated):
    launched = emulated()
    rotary = "interleaved" if interleaved else "halves"
    check_against_float64(replace(ALL, rotary=rotary, percent=2 * pairs / 128))
    assert launched[1].launches == (interleaved or pairs == 8)


def test_a_load_that_no_fence_follows_shows(emulated):
    emulated(fences=False)
    with pytest.raises(AssertionError, match="times the bound"):
        check_against_float64(LONG)


@pytest.mark.parametrize("case", [ALL, replace(TURNED, mixed=False)], ids=str)
def test_strides_make_no_difference(case, emulated):
    launched = emulated()
    window_checks.check_strides(case)
    assert launched[0].launches == 2


@pytest.mark.parametrize("case", [ALL, LATE], ids=str)
def test_rows_of_larger_tensors_are_written_where_they_lie(case, emulated):
    launched = emulated()
    window_checks.check_rows_of_larger_tensors(case)
    assert [kernel.launches for kernel in launched] == [2, 2]


def test_a_mixed_projection_is_its_parts_bit_for_bit(emulated):
    launched = emulated()
    window_checks.check_mixed_is_its_parts(TURNED)
    assert launched[1].launches == 2


def test_tiles_that_are_asked_for_rule_strips_out(emulated):
    launched = emulated()
    case = replace(ALL, tiles=kernels.choose_tiles(128, 4, 127))
    found(case, given_of(case))
    assert not launched[0].launches


# What strips serve


def test_what_strips_do_not_serve_is_named(emulated):
    def why(case=ALL, look_back=127, *, offset=0, layout=None):
        query, key, value = (x.detach() for x in given_of(case).heads)
        if offset:
            key = torch.empty(key.numel() + offset, dtype=key.dtype)[offset:].view(key.shape)
        layout = layout or WindowLayout.of_heads(query, key, value)
        return strips.why_no_strips(layout, look_back, (query, key, value))

    assert why() is None
    assert why(LATE) is None
    wide = torch.empty(130, 1, 4, 129, dtype=torch.bfloat16)[..., :128]
    narrow = torch.empty(130, 1, 1, 128, dtype=torch.bfloat16)
    for message, answer in {
        "no queries": why(replace(ALL, sq=0)),
        "4 heads of 128 channels": why(replace(ALL, hn=64)),
        "heads of 128 channels to a query group, bf": why(replace(ALL, np=8)),
        "bfloat16": why(replace(ALL, dtype=torch.float32)),
        "windows of 128 rows": why(look_back=126),
        "all or none": why(replace(ALL, sk=200)),
        "have all or none": why(replace(ALL, sk=ALL.sq + 126)),
        "do not begin at multiples of 16 bytes": why(layout=WindowLayout.of_heads(wide, narrow, narrow)),
        "tensors do not begin": why(offset=1),
        "on top of one another": why(
            layout=WindowLayout.of_heads(wide[:1, :, :, :128].expand(130, -1, -1, -1), narrow, narrow)
        ),
    }.items():
        assert answer is not None
        assert message in answer


def test_far_away_groups_are_named(emulated):
    """Of one sequence, groups of which lie 2^31 elements apart."""
    emulated()
    query, key, value = (x.detach() for x in given_of(ALL).heads)
    layout = WindowLayout.of_heads(query, key, value)
    far = replace(layout, key=(128, 128, 2**31))
    assert "32 bits" in (strips.why_no_strips(far, 127, (query, key, value)) or "")


def test_a_cpu_is_served_in_tiles():
    query, key, value = (x.detach() for x in given_of(ALL).heads)
    layout = WindowLayout.of_heads(query, key, value)
    assert strips.why_no_strips(layout, 127, (query, key, value)) == "strips run on a GPU"


@given(blocks=st.integers(1, 5000), parts=st.integers(1, 64), programs=st.integers(1, 200))
@settings(deadline=None)
def test_strips_are_as_short_as_all_programs_at_once_allow(blocks, parts, programs):
    strip = strips.blocks_of_strip(blocks, parts, programs)
    assert 1 <= strip <= blocks

    def all_at_once(length):
        return -(-blocks // length) * parts <= programs

    assert all_at_once(strip) or strip == blocks
    assert strip == 1 or not all_at_once(strip - 1)


def test_an_unaligned_gradient_is_copied():
    odd = torch.randn(9, dtype=torch.bfloat16)[1:]
    assert odd.data_ptr() % 16
    assert torch.equal(strips.aligned(odd), odd)
    assert strips.aligned(odd).data_ptr() % 16 == 0


# Compiled for Hopper


@pytest.mark.parametrize(
    "which",
    [
        *("forward bf16", "forward fp16", "plain bf16", "halves bf16", "halves fp16", "interleaved bf16"),
        *("neighbours bf16", "eight bf16"),
    ],
)
def test_registers_suffice_on_hopper(which, tmp_path):
    """What does not fit into them would be written to memory at every tile."""
    # Where kernels are interpreted, Triton compiles nothing.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    source = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.strip_compiler", *which.split()],
        capture_output=True, text=True, check=True, env=environment, cwd=Path(__file__).parents[2],
    ).stdout  # fmt: skip
    (tmp_path / "kernel.ptx").write_text(source)
    told = subprocess.run(
        [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    ).stderr  # fmt: skip
    assert re.findall(r"(\d+) bytes spill", told) == ["0", "0"], told
    assert "serialized" not in told
