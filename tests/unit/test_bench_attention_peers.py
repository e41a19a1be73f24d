"""Peers of the attention benchmarks: the layouts they get, block masks, and what makes one absent."""

import dataclasses
import importlib
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megacontext_megatron.kernels.attention_reference import reference_attention
from scripts.benchmarks import (
    attention_inputs,
    attention_oracle,
    attention_peers,
    attention_race,
    cudnn_band,
    global_bias,
    peers,
    sliding_window,
)
from scripts.benchmarks.attention_inputs import LOOK_BACK
from scripts.benchmarks.attention_peers import Layout, Peer
from scripts.benchmarks.attention_race import PASSES, Race
from scripts.benchmarks.gate import vector_error
from tests.unit.attention_cases import (
    CPU,
    HEADS,
    INPUTS,
    ROWS,
    RULE,
    SHAPE,
    WINDOW,
    plain_attention,
    task,
)


def test_what_is_wrong_or_raises_is_absent(capsys):
    def broken(*_):
        raise RuntimeError("no such kernel\nand more")

    given = {
        "right": Peer(attend=plain_attention, layout="sequences first"),
        "wrong": Peer(attend=lambda q, k, v: plain_attention(q, k, v).flip(0)),
        "broken": Peer(attend=broken),
        "gone": Peer(absent="ImportError: gone"),
    }
    expected = attention_oracle.sampled(HEADS, ROWS, INPUTS.of_output[ROWS], RULE)["output"]
    found, notes = attention_race.checked(given, INPUTS, ROWS, expected)
    assert found["right"].attend is not None
    assert found["wrong"].absent.startswith("wrong results: ")
    assert found["broken"].absent == "failed: RuntimeError: no such kernel"
    assert found["gone"].absent == "ImportError: gone"
    assert len(notes) == 1
    assert "right errs by" in notes[0]


def test_absent_peers_are_named():
    def load():
        raise peers.Absent("ModuleNotFoundError: No module named 'flash_attn'")

    found = attention_peers.present({"FA4": (load, "rows first"), "ours": (lambda: plain_attention, "rows first")})
    assert found["FA4"].attend is None
    assert "flash_attn" in found["FA4"].absent
    contender = Race(inputs=INPUTS, how="forward").contender("FA4", found["FA4"])
    assert contender.call is None
    assert contender.absent == found["FA4"].absent


def test_ours_may_not_fail_where_peers_may():
    def broken(*_):
        raise RuntimeError("no")

    race = Race(inputs=INPUTS, how="backward")
    assert race.contender("peer", Peer(attend=broken)).absent == "failed: RuntimeError: no"
    with pytest.raises(RuntimeError, match="no"):
        race.contender("ours", Peer(attend=broken))


@pytest.mark.parametrize("layout", ["rows first", "sequences first"])
@pytest.mark.parametrize("how", PASSES)
def test_passes_run_again_and_again(layout, how):
    seen = []

    def attend(query, key, value):
        seen.append(query.transpose(0, 1).is_contiguous())
        return plain_attention(query, key, value)

    contender = Race(inputs=INPUTS, how=how).contender("peer", Peer(attend=attend, layout=layout))
    assert contender.call is not None
    first, second = (cast(Any, contender.call()) for _ in range(2))
    assert seen == [layout == "sequences first"] * (1 if how == "backward" else 2)
    if how == "forward":
        assert first.requires_grad
    else:
        assert [g.shape for g in first] == [x.shape for x in HEADS.values()]
        assert all(map(torch.equal, first, second))


class Forgetful(torch.autograd.Function):
    """Drops what it keeps in its first backward pass, as Transformer Engine's attention does."""

    @staticmethod
    def forward(ctx, x):
        ctx.tensor_objects, ctx.backward_objects = [None], SimpleNamespace(factor=3.0)
        return 3.0 * x

    @staticmethod
    def backward(ctx, gradient):
        if ctx.tensor_objects is None:
            raise AttributeError("ctx must have .tensor_objects")
        factor = ctx.backward_objects.factor
        ctx.tensor_objects = ctx.backward_objects = None
        return factor * gradient


def test_nodes_that_forget_are_reminded():
    x = torch.ones(3, requires_grad=True)
    out = Forgetful.apply(x).reshape(3, 1)
    again = attention_peers.repeatable(out)
    for _ in range(3):
        again()
        (gradient,) = torch.autograd.grad(out, [x], torch.ones(3, 1), retain_graph=True)
        assert gradient.tolist() == [3.0] * 3
    with pytest.raises(AttributeError):
        torch.autograd.grad(out, [x], torch.ones(3, 1))


def fake_module(monkeypatch, name, **members):
    module = ModuleType(name)
    vars(module).update(members)
    parents = name.split(".")[:-1]
    for at in range(len(parents)):
        monkeypatch.setitem(sys.modules, ".".join(parents[: at + 1]), ModuleType(parents[at]))
    monkeypatch.setitem(sys.modules, name, module)


def batch_first(query, key, value, look_back):
    """Return reference attention of [b, s, n, hn]."""
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    return reference_attention(query, key, value, INPUTS.scale, look_back=look_back).transpose(0, 1)


def test_flash_attention_4_gets_sequences_first(monkeypatch):
    def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size):
        assert q.is_contiguous()
        assert causal
        assert softmax_scale == INPUTS.scale
        assert window_size in ((LOOK_BACK, 0), (None, None))
        return batch_first(q, k, v, window_size[0]), None

    fake_module(monkeypatch, "flash_attn.cute", flash_attn_func=flash_attn_func)
    assert_right(attention_peers.flash4(INPUTS.scale, LOOK_BACK), WINDOW, "sequences first")
    assert_right(attention_peers.flash4(INPUTS.scale), RULE, "sequences first")


def test_varlen_gets_packed_sequences(monkeypatch):
    def varlen_attn(*given, scale, window_size):
        *heads, cu_seq_q, cu_seq_k, max_q, max_k = given
        assert all(x.is_contiguous() and x.dim() == 3 for x in heads)
        assert cu_seq_q.tolist() == cu_seq_k.tolist() == [0, 256, 512]
        assert (max_q, max_k, scale, window_size) == (256, 256, INPUTS.scale, (LOOK_BACK, 0))
        heads = (x.unflatten(0, (2, 256)) for x in heads)
        return batch_first(*heads, window_size[0]).flatten(0, 1)

    module = importlib.import_module("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    assert_right(attention_peers.varlen(INPUTS.scale, LOOK_BACK), WINDOW, "sequences first")


def test_transformer_engine_returns_heads_side_by_side(monkeypatch):
    class DotProductAttention:
        def __init__(self, num_attention_heads, kv_channels, **settings):
            assert (num_attention_heads, kv_channels) == (4, 16)
            assert settings["num_gqa_groups"] == 2
            assert (settings["qkv_format"], settings["attn_mask_type"]) == ("sbhd", "causal")
            self.window, self.scale = settings["window_size"], settings["softmax_scale"]

        def __call__(self, query, key, value):
            seen = None if self.window is None else self.window[0]
            return reference_attention(query, key, value, self.scale, look_back=seen).flatten(2)

    fake_module(monkeypatch, "transformer_engine.pytorch", DotProductAttention=DotProductAttention)
    assert_right(attention_peers.engine(SHAPE, INPUTS.scale, LOOK_BACK), WINDOW)
    assert_right(attention_peers.engine(SHAPE, INPUTS.scale), RULE)


def test_pytorch_gets_heads_before_rows(monkeypatch):
    monkeypatch.setattr(attention_peers, "sdpa_kernel", lambda _: nullcontext())
    assert_right(attention_peers.cudnn(INPUTS.scale), RULE)


def test_flex_attention_sees_windows_and_biases(monkeypatch):
    module = importlib.import_module("torch.nn.attention.flex_attention")
    monkeypatch.setattr(attention_peers, "_compiled_flex", lambda: module.flex_attention)
    mask = attention_peers.window_mask(SHAPE.rows, LOOK_BACK, CPU)
    assert_right(attention_peers.flex(INPUTS.scale, mask), WINDOW)
    given = task()
    assert_right(global_bias._flex(given, given.slopes), RULE, given=given.given)


def assert_right(attend, rule, layout: Layout = "rows first", given=HEADS):
    """Compare a peer's adapter with the oracle."""
    expected = attention_oracle.sampled(given, ROWS, INPUTS.of_output[ROWS], rule)["output"]
    # what compiles without a GPU has no backward there
    out = attend(*(x.detach() for x in attention_race.heads_of(INPUTS, layout)))
    assert vector_error(out[ROWS], expected) < attention_race.PEER_ERROR / 2


def test_block_masks_hold_all_that_is_seen_and_little_more():
    rows = 1024
    apart = torch.arange(rows)[:, None] - torch.arange(rows)
    tiles = ((apart >= 0) & (apart <= LOOK_BACK)).view(8, 128, 8, 128).any(3).any(1)
    mask = attention_peers.window_mask(rows, LOOK_BACK, CPU)
    assert torch.equal(mask.to_dense()[0, 0].bool(), tiles)
    first = torch.tensor([[0, 0, 1, 3], [0, 0, 0, 0]])
    causal = attention_peers.causal_mask(first)
    tile = torch.arange(4)
    for head in range(2):
        expected = (tile <= tile[:, None]) & (tile >= first[head][:, None])
        assert torch.equal(causal.to_dense()[0, head].bool(), expected)
        assert causal.kv_num_blocks[0, head].tolist() == [1, 1, 1, 1]
        assert causal.full_kv_num_blocks[0, head].tolist() == (tile - first[head]).tolist()


def test_cudnn_counts_the_query_itself_into_the_window():
    names = SimpleNamespace(diagonal_alignment=SimpleNamespace(TOP_LEFT="top left"))
    band = object.__new__(cudnn_band.Band)
    band.cudnn, band.look_back = names, LOOK_BACK
    assert band.mask() == {
        "diagonal_alignment": "top left", "diagonal_band_left_bound": 128, "diagonal_band_right_bound": 0,
    }  # fmt: skip


def test_cudnn_graphs_are_valid_on_hopper():
    cudnn = pytest.importorskip("cudnn")
    band = cudnn_band.Band(LOOK_BACK, INPUTS.scale)
    real = cudnn.pygraph
    band.cudnn = SimpleNamespace(**{name: getattr(cudnn, name) for name in ("data_type", "diagonal_alignment")})
    band.cudnn.pygraph = lambda **given: real(**{**given, "sm_version": 90, "sm_count": 132})
    heads = [INPUTS.query, INPUTS.key, INPUTS.value]
    tensors = dict(enumerate([*heads, INPUTS.query, cudnn_band.statistics(INPUTS.query), INPUTS.query, *heads], 1))
    for kind in ("forward", "backward"):
        band.graph(kind, tensors).validate()


def test_every_group_needs_what_it_says(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with pytest.raises(peers.Absent, match="cudnn"):
        attention_peers.band(INPUTS.scale, LOOK_BACK)
    present = sliding_window.present(dataclasses.replace(INPUTS, shape=attention_inputs.SHAPES[2]))
    assert list(present) == list(sliding_window.WINDOWS)
    assert present[attention_peers.FLEX].absent == "compiled for 4096 rows alone"
