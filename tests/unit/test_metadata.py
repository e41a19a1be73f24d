"""Span metadata, the carrier it travels in, and the spread of a span."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megacontext_megatron.config import SIGMA_RULES
from megacontext_megatron.model.carrier import SpanCarrier
from megacontext_megatron.spans.metadata import CARRIER_COLUMNS, Modality, SpanMetadata, base_sigma, carried_places
from tests import oracles

FARTHEST = 2**51
BLOCK = 32
STORED = ("start", "width", "level", "modality")
ALL_WIDTHS = torch.tensor([1, 2, 3, 31, 32, 33, 1024, 32768, 2**30], dtype=torch.int32)


@st.composite
def metadata(draw):
    """Draw metadata [b, s] of any spans, of tokens and of several levels, up to 2^51 tokens from the start."""
    batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, 5))

    def column(low, high, dtype):
        values = draw(st.lists(st.integers(low, high), min_size=batch * rows, max_size=batch * rows))
        return torch.tensor(values, dtype=dtype).view(batch, rows)

    return SpanMetadata(
        start=column(0, FARTHEST, torch.int64),
        width=column(1, 2**31 - 1, torch.int32),
        level=column(0, 127, torch.int8),
        modality=column(0, 127, torch.int8),
    )


def one_rank(value):
    """Sum a gradient over one tensor-parallel rank."""
    return value


def farthest():
    return SpanMetadata.of_nodes(torch.tensor([[FARTHEST, FARTHEST - 1]]), torch.tensor([[2, 0]]), BLOCK)


@given(metadata())
@example(farthest())
def test_carrier_round_trip_is_exact(spans):
    carrier = spans.pack("uniform")
    batch, rows = spans.start.shape
    assert (carrier.shape, carrier.dtype) == ((rows, batch, 1, len(CARRIER_COLUMNS)), torch.float64)
    assert carrier.is_contiguous()
    unpacked = SpanMetadata.unpack(carrier)
    for name in STORED:
        sent, received = getattr(spans, name), getattr(unpacked, name)
        assert received.dtype == sent.dtype
        assert torch.equal(received, sent.T)


@given(metadata(), st.sampled_from(SIGMA_RULES))
@example(farthest(), "uniform")
def test_carried_places_are_those_of_the_metadata(spans, rule):
    centre, sigma, offset = carried_places(spans.pack(rule))
    assert offset is None
    assert torch.equal(centre.long(), spans.doubled_centre.T)
    assert torch.equal(sigma.float(), base_sigma(spans.width, rule).T)
    with pytest.raises(RuntimeError, match="float64"):
        carried_places(spans.pack(rule).float())


@given(metadata())
@example(farthest())
def test_centre_and_end_are_exact_integers(spans):
    starts, widths = spans.start.flatten().tolist(), spans.width.flatten().tolist()
    assert spans.end.dtype == spans.doubled_centre.dtype == torch.int64
    assert spans.end.flatten().tolist() == [start + width for start, width in zip(starts, widths, strict=True)]
    covered = [(start, start + width - 1) for start, width in zip(starts, widths, strict=True)]
    assert spans.doubled_centre.flatten().tolist() == [first + last for first, last in covered]


def test_metadata_of_nodes_by_level():
    spans = SpanMetadata.of_nodes(torch.tensor([0, 1024, 1056, 1057]), torch.tensor([2, 1, 0, 0]), BLOCK)
    assert spans.width.tolist() == [1024, 32, 1, 1]
    assert spans.end.tolist() == [1024, 1056, 1057, 1058]
    assert spans.modality.tolist() == [Modality.TEXT] * 4
    dtypes = [getattr(spans, name).dtype for name in STORED]
    assert dtypes == [torch.int64, torch.int32, torch.int8, torch.int8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_carrier_is_refused(dtype):
    with pytest.raises(RuntimeError, match="float64"):
        SpanMetadata.unpack(farthest().pack("uniform").to(dtype))


def test_uniform_spread_is_that_of_the_tokens():
    widths = torch.tensor([1, 2, 3, 7, 31, 32, 100, 999, 1024, 4097, 32768], dtype=torch.int32)
    expected = torch.tensor([oracles.uniform_spread(width) for width in widths.tolist()], dtype=torch.float64)
    assert torch.equal(base_sigma(widths, "uniform"), expected.float())


def test_spread_of_the_widest_spans_keeps_fp32_accuracy():
    widths = torch.tensor([2**24 + 1, 2**31 - 1], dtype=torch.int32)
    expected = np.array(widths.tolist(), dtype=np.float64) / np.sqrt(12)
    np.testing.assert_allclose(base_sigma(widths, "uniform").numpy(), expected, rtol=2**-23)


def test_other_spread_rules():
    wide = ALL_WIDTHS[1:]
    assert torch.equal(base_sigma(wide, "width"), wide.float())
    assert torch.equal(base_sigma(wide, "half-width"), wide.float() / 2)
    assert torch.equal(base_sigma(wide, "none"), torch.zeros(len(wide)))


@pytest.mark.parametrize("rule", SIGMA_RULES)
def test_token_has_no_spread_and_gists_have_more_the_wider(rule):
    sigma = base_sigma(ALL_WIDTHS, rule)
    assert (sigma.dtype, sigma.shape) == (torch.float32, ALL_WIDTHS.shape)
    assert sigma[0] == 0.0
    if rule != "none":
        assert all(narrow < wide for narrow, wide in itertools.pairwise(sigma.tolist()))


def test_carrier_module_hands_over_the_spans_of_this_forward_only():
    carrier = SpanCarrier("uniform", one_rank)
    spans = farthest()
    with pytest.raises(RuntimeError, match="without span metadata"):
        carrier(0)
    with carrier.carrying(spans):
        handed = carrier(carrier.get_rotary_seq_len(None, None, None, None), packed_seq=False)
    assert torch.equal(handed, spans.pack("uniform"))
    with pytest.raises(RuntimeError, match="without span metadata"):
        carrier(0)


def test_carrier_module_is_empty_after_a_failed_forward():
    carrier = SpanCarrier("uniform", one_rank)
    with pytest.raises(ZeroDivisionError), carrier.carrying(farthest()):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="without span metadata"):
        carrier(0)


def test_carrier_module_adds_nothing_to_a_checkpoint():
    carrier = SpanCarrier("uniform", one_rank)
    with carrier.carrying(farthest()):
        assert not carrier.state_dict()
