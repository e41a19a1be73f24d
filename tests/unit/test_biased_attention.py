"""Dense attention with score biases: Megatron's bit for bit without them, the definition with them, split or whole."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as parallel_random
from megatron.core.transformer import dot_product_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megacontext_megatron.attention.biased_attention import BiasedAttention
from megacontext_megatron.cpu import CudaMeansCpu, install
from megacontext_megatron.position.score_bias import BiasInputs, ScoreBias
from megacontext_megatron.spans.context_parallel import zigzag_rows
from tests.bias_cases import GISTS, GROUPS, HEADS, SHARE, TOLERANCE, WIDTH, Scene, bias_of, precise
from tests.launch import call
from tests.sums_over_ranks import alone

ALL: dict[str, dict[str, Any]] = {
    "alibi": {},
    "t5": {},
    "fire": {"fire_length": 1060},
    "cope": {},
    "grape-a": {"gate": "qk", "learnable_slopes": True},
    "grape-ap": {},
    "fox": {},
}
SEED = 11


class One:
    """A process group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class Seeded:
    """Random numbers of dropout that begin anew at each use."""

    @contextlib.contextmanager
    def fork(self):
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            yield


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(dot_product_attention.tensor_parallel, "get_cuda_rng_tracker", Seeded)
    monkeypatch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", None)
    parallel_state._set_global_memory_buffer()


def built(kind: type = BiasedAttention, layer_number: int = 1, cp: Any = None, **settings: Any) -> Any:
    """Return a core attention as Megatron's SelfAttention builds it."""
    settings.setdefault("num_query_groups", GROUPS)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        context_parallel_size=1 if cp is None else cp.size(),
        **{"attention_dropout": 0.0, "attention_softmax_in_fp32": True, "masked_softmax_fusion": False} | settings,
    )
    return kind(
        config=config,
        layer_number=layer_number,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=SimpleNamespace(tp=One(), cp=cp or One()),
    )


class Constant(ScoreBias):
    """The same number for all."""

    def __init__(self, value: float) -> None:
        super().__init__(SHARE, alone)
        self.value = value

    def forward(self, inputs: BiasInputs) -> Tensor:
        return torch.full_like(inputs.scores[:1, :1], self.value)


def output_and_gradients(attention: Any, scene: Scene, **arguments: Any) -> list[Tensor]:
    """Return the output and the gradients of query, key and value (here twice the key)."""
    value = (2 * scene.key.detach()).requires_grad_()
    leaves = [scene.query, scene.key, value]
    output = attention(scene.query, scene.key, value, None, attn_mask_type=AttnMaskType.causal, **arguments)
    mix = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    return [output, *torch.autograd.grad((output * mix).sum(), leaves)]


def rows_of(scene: Scene) -> dict[str, Tensor]:
    """Return what every bias reads."""
    return {"centre": scene.centre, "width": scene.width}


def half(dtype: torch.dtype) -> dict[str, Any]:
    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16, "params_dtype": dtype}


# Megatron's own


@pytest.mark.parametrize("biases", [{}, {"zero": 0.0}, {"zero": 0.0, "other": 0.0}])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attention_dropout": 0.3},
        {"window_size": (3, 0)},
        {"window_size": (3, 0), "window_attn_skip_freq": 1},
        {"apply_query_key_layer_scaling": True},
        {"softmax_scale": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_biases_it_is_megatrons_to_the_last_bit(biases, groups, settings, dtype):
    scene = Scene(widths=[1] * 16, groups=groups, dtype=dtype)
    settings = {**settings, **half(dtype), "num_query_groups": groups}
    scale = {"softmax_scale": settings.pop("softmax_scale")} if "softmax_scale" in settings else {}
    ours, theirs = (built(kind, layer_number=3, **settings) for kind in (BiasedAttention, DotProductAttention))
    for attention in (ours, theirs):
        attention.softmax_scale = scale.get("softmax_scale", attention.softmax_scale)
    ours.attach({name: Constant(value) for name, value in biases.items()})
    with CudaMeansCpu():
        expected = output_and_gradients(theirs, scene)
    found = output_and_gradients(ours, scene, attention_bias=rows_of(scene))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert all(tensor.dtype == dtype for tensor in found)


def test_a_bias_changes_what_dropout_and_windows_leave():
    """So that the equalities above are not of something that ignores its scores."""
    scene = Scene(widths=[1] * 16)
    changed: tuple[dict[str, Any], ...] = ({"attention_dropout": 0.3}, {"window_size": (3, 0)})
    for settings in changed:
        attention = built(**settings)
        plain = output_and_gradients(attention, scene)
        attention.attach({"alibi": bias_of("alibi")})
        assert not torch.allclose(output_and_gradients(attention, scene, **rows_of(scene))[0], plain[0])
        assert not torch.allclose(output_and_gradients(built(), scene)[0], plain[0])


# The definition


def every_bias() -> dict[str, ScoreBias]:
    return {name: precise(bias_of(name, **fields), size=0.2) for name, fields in ALL.items()}


def features_of(biases: dict[str, ScoreBias], scene: Scene) -> dict[str, Tensor]:
    found = {f"features/{n}": b.features(scene.hidden, scene.query, scene.key) for n, b in biases.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def definition(biases: dict[str, ScoreBias], scene: Scene, value: Tensor, window: int | None = None) -> Tensor:
    """Return softmax(q k / sqrt(d) + biases) v over the rows that a row sees, [s, b, np hn], in float64."""
    rows = torch.arange(len(scene.widths))
    seen = rows <= rows[:, None]
    if window is not None:
        seen &= rows >= rows[:, None] - window
    logits = scene.scores() + sum(scene.of(bias) for bias in biases.values())
    probabilities = logits.masked_fill(~seen, -math.inf).softmax(-1)
    by_head = value.repeat_interleave(HEADS // GROUPS, dim=2)
    return torch.einsum("bhqk,kbhd->qbhd", probabilities, by_head).flatten(2)


@pytest.mark.parametrize("window", [None, 3])
def test_with_biases_it_is_the_definition(window):
    scene, biases = Scene(widths=GISTS), every_bias()
    value = torch.randn_like(scene.key).requires_grad_()
    attention = built(window_size=None if window is None else (window, 0))
    attention.attach(biases)
    leaves = [*scene.leaves.values(), value, *(p for bias in biases.values() for p in bias.parameters())]
    rows = {**rows_of(scene), **features_of(biases, scene)}
    found = attention(scene.query, scene.key, value, None, attention_bias=rows)
    expected = definition(biases, scene, value, window)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    mix = torch.randn_like(expected)
    grads = [torch.autograd.grad((output * mix).sum(), leaves) for output in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
        assert bool(theirs.any())


def test_tensors_of_rows_come_as_one_or_one_by_one():
    """Selective recomputation passes on only what arrives as an argument of its own."""
    scene, biases, attention = Scene(widths=GISTS), every_bias(), built()
    attention.attach(biases)
    places, made = rows_of(scene), [features_of(biases, scene) for _ in range(3)]
    together = output_and_gradients(attention, scene, attention_bias={**places, **made[0]})
    apart = output_and_gradients(attention, scene, **places, **made[1])
    mixed = output_and_gradients(attention, scene, attention_bias=made[2], packed_seq_params=None, **places)
    assert all(torch.equal(*pair) for pair in zip(together, apart, strict=True))
    assert all(torch.equal(*pair) for pair in zip(together, mixed, strict=True))


def test_missing_places_are_an_error():
    scene, attention = Scene(widths=GISTS), built()
    attention.attach({"alibi": bias_of("alibi")})
    with pytest.raises(RuntimeError, match="layer 1: score biases need the centre and width of each row"):
        output_and_gradients(attention, scene)
    output_and_gradients(attention, scene, **rows_of(scene))
    attention.attach({})
    output_and_gradients(attention, scene)


def test_biases_are_no_part_of_core_attention():
    attention = built()
    names = set(attention.state_dict()), [name for name, _ in attention.named_modules()]
    attention.attach({"t5": bias_of("t5")})
    assert (set(attention.state_dict()), [name for name, _ in attention.named_modules()]) == names
    assert not list(attention.parameters())


# Precision


class FarRamp(ScoreBias):
    """A quarter for each row, around 1000, where neighbouring numbers of bf16 are 4 apart."""

    def forward(self, inputs: BiasInputs) -> Tensor:
        columns = torch.arange(inputs.scores.size(-1), dtype=inputs.scores.dtype)
        return (1000 + columns / 4).expand_as(inputs.scores)


def test_biases_are_not_rounded_to_the_models_dtype():
    scene = Scene(widths=[1] * WIDTH, dtype=torch.bfloat16)
    attention = built(bf16=True, params_dtype=torch.bfloat16)
    attention.attach({"ramp": FarRamp(SHARE, alone)})
    # Without queries the scores are 0, and values that are one-hot show the probabilities.
    value = torch.eye(WIDTH, dtype=torch.bfloat16)[:, None, None].expand_as(scene.key).contiguous()
    found = attention(0 * scene.query, scene.key, value, None, **rows_of(scene))
    behind = torch.ones(WIDTH, WIDTH, dtype=torch.bool).triu(1)
    expected = (torch.arange(WIDTH) / 4).expand(WIDTH, -1).masked_fill(behind, -math.inf).softmax(-1)
    assert torch.equal(found.unflatten(-1, (HEADS, WIDTH))[:, 0, 0], expected.bfloat16())


def test_a_layers_scale_is_not_the_biases():
    """Megatron divides scores by the layer's number and multiplies them back in the softmax."""
    scene, biases = Scene(widths=GISTS, dtype=torch.float32), {"alibi": bias_of("alibi")}
    outputs = []
    for scaling in (False, True):
        attention = built(layer_number=3, apply_query_key_layer_scaling=scaling)
        attention.attach(biases)
        outputs.append(output_and_gradients(attention, scene, **rows_of(scene))[0])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


def test_fused_softmax_is_not_asked_for():
    """It takes half-precision scores only, and knows no mask but the plain causal one."""
    scene = Scene(widths=[1] * 20, dtype=torch.bfloat16)
    attention = built(bf16=True, params_dtype=torch.bfloat16, masked_softmax_fusion=True)
    plain = built(bf16=True, params_dtype=torch.bfloat16)
    pair = (output_and_gradients(a, scene)[0] for a in (attention, plain))
    assert torch.equal(*pair)


# Context parallelism


def split_and_whole(ranks: int) -> list[float]:
    """Return the greatest differences of a rank's output and gradients from the whole's."""
    import torch.distributed as dist

    install()
    dist.init_process_group("gloo")
    parallel_state._set_global_memory_buffer()
    parallel_random.initialize_rng_tracker()
    dot_product_attention.tensor_parallel.get_cuda_rng_tracker = Seeded  # type: ignore[assignment]
    group: Any = dist.group.WORLD
    results = []
    for cp in (None, group):
        scene, biases = Scene(widths=[1024, 32, 32, 1, 1, 32, 1, 1]), every_bias()
        rows = zigzag_rows(8, 1 if cp is None else ranks, 0 if cp is None else group.rank())
        attention = built(cp=cp, window_size=(5, 0))
        attention.attach(biases)
        own = Scene(widths=[1] * len(rows))
        own.width = scene.width[rows]
        for name, leaf in scene.leaves.items():
            setattr(own, name, leaf.detach()[rows].requires_grad_())
        tensors = {**rows_of(own), **features_of(biases, own)}
        output = attention(own.query, own.key, 2 * own.key, None, **tensors)
        weights = torch.arange(output.numel() if cp is None else 2 * output.numel()).view(8, *output.shape[1:])[rows]
        (output * weights.double().cos()).sum().backward()
        learned = [p.grad for bias in biases.values() for p in bias.parameters()]
        if cp is not None:
            for gradient in learned:
                dist.all_reduce(gradient)
        results.append(([output, *(leaf.grad for leaf in own.leaves.values())], learned, rows))
    (whole, whole_learned, _), (part, part_learned, rows) = results
    differences = [(p - w[rows]).abs().max() for p, w in zip(part, whole, strict=True)]
    differences += [(p - w).abs().max() for p, w in zip(part_learned, whole_learned, strict=True)]
    assert all(bool(w.any()) for w in (*whole, *whole_learned))
    dist.destroy_process_group()
    return [float(difference) for difference in differences]


def test_rows_may_be_split_over_ranks(tmp_path: Path):
    result = call(split_and_whole, {"ranks": 2}, ranks=2, workdir=tmp_path).check()
    for differences in result.values:
        assert len(differences) > 15
        assert max(differences) < TOLERANCE
