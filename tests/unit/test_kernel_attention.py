"""Core attention on the plugin's kernels: what may be left unread, and what it refuses to compute."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megacontext_megatron.attention.biased_attention import CENTRE
from megacontext_megatron.attention.kernel_attention import SLOPES, LinearBiasAttention
from megacontext_megatron.kernels.linear_bias_attention import Reach
from megacontext_megatron.kernels.reach import visits
from tests.linear_bias_cases import UNITS
from tests.parity import CLEARLY

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has the kernels compiled")

ROWS, HEADS, GROUPS, WIDTH = 768, 4, 2, 64
SCALE = 1 / math.sqrt(WIDTH)
STEEPEST = 0.125


def attention(*, gain: float | None = None) -> LinearBiasAttention:
    """Return a layer's attention, with norms whose weights are 1 where a gain is given."""
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=WIDTH
    )
    alone = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    layer = LinearBiasAttention(config, 1, pg_collection=alone)
    layer.biased = True
    if gain is not None:
        norms = [torch.nn.RMSNorm(WIDTH) for _ in range(2)]
        layer.attach_norms(*norms, rotated=True, gain=gain)
    return layer


def aligned(size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of norm `size` sqrt(hn): keys oppose queries, but for one after a quarter, which agrees."""
    direction = torch.ones(WIDTH) * size
    query = direction.expand(ROWS, 1, HEADS, WIDTH).contiguous()
    key = -direction.expand(ROWS, 1, GROUPS, WIDTH).contiguous()
    key[ROWS // 4] *= -1
    return query, key, torch.randn(ROWS, 1, GROUPS, WIDTH, generator=torch.Generator().manual_seed(0))


def places() -> dict[str, Tensor]:
    """Return the bias of rows, one token each."""
    slopes = STEEPEST * 2.0 ** -torch.arange(HEADS).float()
    return {SLOPES: slopes, CENTRE: torch.arange(ROWS, dtype=torch.float64)[:, None]}


def output(layer: LinearBiasAttention, heads: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return layer(*heads, None, attention_bias=places())


def test_every_head_has_the_bound_of_the_norms():
    layer, [query, _, _] = attention(gain=1.0), aligned(1.0)
    reach = layer._reach(query)
    assert reach.score_bound.tolist() == pytest.approx([WIDTH * SCALE * (1 + 2.0**-7)] * HEADS)
    doubled = (places()[CENTRE] * 2).long()
    first = visits(reach, places()[SLOPES], doubled, (ROWS, HEADS, GROUPS), 32).first
    nats = 2 * WIDTH * SCALE * (1 + 2.0**-7) + math.log(ROWS / reach.tolerance)
    beyond = [nats / slope for slope in places()[SLOPES].tolist()]
    assert first[0, :, -1].tolist() == pytest.approx([max(0, ROWS - 32 - far) for far in beyond], abs=1)
    assert first[0, 1, -1] > 0


def test_a_reach_of_scores_that_grow_by_a_gain_changes_nothing():
    """As YaRN's factor on cosines and sines makes them: here each side is twice as long as its norm left it."""
    heads = aligned(2.0)
    expected = output(attention(), heads)

    def error(gain: float) -> float:
        return (output(attention(gain=gain), heads) - expected).abs().max().item()

    unit = torch.finfo(torch.float32).eps / 2
    bound = UNITS[torch.float32] * unit * expected.abs().max().item()
    assert error(4.0) <= bound
    assert error(1.0) > CLEARLY * bound


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 2.0**-10), (torch.float16, 2.0**-13)])
def test_what_is_left_out_cannot_be_seen_in_the_models_dtype(dtype: torch.dtype, share: float):
    assert attention(gain=1.0)._reach(aligned(1.0)[0].to(dtype)).tolerance == share


@pytest.mark.parametrize("bound", [torch.ones(()).expand(4), torch.ones(4, dtype=torch.float64), torch.ones(8)[::2]])
def test_bounds_that_a_kernel_would_misread_are_refused(bound: Tensor):
    with pytest.raises(ValueError, match="contiguous fp32"):
        Reach(score_bound=bound)


def test_a_window_longer_than_all_rows_is_no_window():
    """However much longer: rows plus windows are counted in 32 bits."""
    from megacontext_megatron.kernels.linear_bias_attention import linear_bias_attention

    generator = torch.Generator().manual_seed(1)
    heads = [torch.randn(200, 1, 1, 16, generator=generator).requires_grad_() for _ in range(3)]
    found = []
    for look_back in (None, 2**31 - 1):
        query, key, value = heads
        out = linear_bias_attention(query, key, value, 0.25, look_back=look_back)
        found.append([out, *torch.autograd.grad(out.square().sum(), heads)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_rows_without_slopes_are_refused():
    with pytest.raises(RuntimeError, match="given no slopes"):
        attention()(*aligned(1.0), None)


def test_packed_samples_are_refused():
    with pytest.raises(RuntimeError, match="packed samples"):
        attention()(*aligned(1.0), None, attention_bias=places(), packed_seq_params=object())
