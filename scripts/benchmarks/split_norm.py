"""Group C: split of the mixed projection, QK-norm and rotation in one pass, against separate passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scripts.benchmarks import oracle, peers
from scripts.benchmarks.gate import Findings, compared
from scripts.benchmarks.inputs import LARGE, SHAPES, Inputs
from scripts.benchmarks.options import Options
from scripts.benchmarks.ours import EPS, Rotary
from scripts.benchmarks.results import FLOOR, OURS, Check, Comparison, at_least
from scripts.benchmarks.rotary_forward import COPY, copying
from scripts.benchmarks.timing import Case, Contender, Stopwatch

TITLE = "split, QK-norm and rotary"
SEPARATE = "split, 2 Transformer Engine norms, its fused rope"
EAGER = "split, 2 PyTorch norms, Megatron-Core unfused"
COMPILED = "the same under torch.compile"
WANTED = ("mixed", "query_weight", "key_weight")
NAMES = ("query", "key", "value")
Split = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]


def run(options: Options, found: Findings) -> None:
    """Check and time every shape; raises GateFailed."""
    rotary, watch = Rotary.kernel(), Stopwatch(rounds=options.rounds)
    graph = peers.compiled(plain)
    for shape in SHAPES[:1] if options.quick else SHAPES:
        inputs = Inputs(shape=shape, device=torch.device("cuda"))
        found.require(gate(rotary, inputs))
        for backward in (False, True):
            with torch.set_grad_enabled(backward):
                found.rows.append(watch.row(case(rotary, inputs, graph, backward=backward)))
            torch.cuda.empty_cache()


def given_of(inputs: Inputs) -> dict[str, Tensor]:
    """Return what the pass is given; the projection and the weights of the norms require a gradient."""
    query_weight, key_weight = inputs.norm_weights
    given = {
        "mixed": inputs.mixed,
        "query_weight": query_weight,
        "key_weight": key_weight,
        "doubled_centre": inputs.doubled_centre,
        "sigma": inputs.sigma,
        "anchor": inputs.anchor,
    }
    return {name: t.detach().clone().requires_grad_(name in WANTED) for name, t in given.items()}


def gate(rotary: Rotary, inputs: Inputs, scale: float = 1.0) -> list[Check]:
    """Compare q, k, v and the gradients of the projection and of the norms' weights with the oracle."""
    given, width = given_of(inputs), inputs.shape.head_dim
    out = dict(zip(NAMES, rotary.split(given, rotary.fixed_table(inputs), width), strict=True))
    upstream: dict[str, Tensor] = dict(zip(NAMES, inputs.upstream, strict=True))
    gradients = torch.autograd.grad(list(out.values()), [given[n] for n in WANTED], list(upstream.values()))
    values = {**out, **{f"d {n}": g for n, g in zip(WANTED, gradients, strict=True)}}
    omega = inputs.omega(per_group=False)
    reference = partial(oracle.split_norm_rotary, eps=EPS)
    expected = oracle.outputs_and_gradients(reference, {**given, "omega": omega}, upstream, WANTED)
    for tensors in (values, expected):
        # each head's part of the projection is compared for itself
        tensors["d mixed"] = tensors["d mixed"].unflatten(-1, (-1, width)).flatten(2, 3)
    return compared(values, expected, f"{inputs.shape.name}: ", scale)


def plain(
    mixed: Tensor, query_weight: Tensor, key_weight: Tensor, table: Tensor, turn: peers.Rotation
) -> tuple[Tensor, ...]:
    """Split, normalise and rotate in plain PyTorch; `table` is the angles of Megatron's rotation `turn`."""
    width = query_weight.shape[0]
    query, key, value = peers.split(mixed, width)
    query = torch.nn.functional.rms_norm(query, (width,), query_weight, EPS)
    key = torch.nn.functional.rms_norm(key, (width,), key_weight, EPS)
    return *turn(query, key, table), value


def separate(inputs: Inputs, given: Mapping[str, Tensor]) -> tuple[Split, list[Tensor]]:
    """Return Megatron's passes with Transformer Engine, and what gets a gradient; raises peers.Absent."""
    width, turn = inputs.shape.head_dim, peers.fused()
    norms = [peers.head_norm(width, EPS, given[f"{name}_weight"]) for name in ("query", "key")]
    table = peers.angles(inputs.frequencies.omega, inputs.shape.rows)

    def passes(given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        query, key, value = peers.split(given["mixed"], width)
        return *turn(norms[0](query), norms[1](key), table), value

    weights: list[Any] = [norm.weight for norm in norms]  # type: ignore[attr-defined]
    return passes, [given["mixed"], *weights]


def case(rotary: Rotary, inputs: Inputs, graph: Callable[..., tuple[Tensor, ...]], *, backward: bool) -> Case:
    """Return the contenders for one shape; `graph` is `plain` under torch.compile."""
    shape = inputs.shape
    contenders = [
        Contender(name=COPY, call=copying(inputs.query, inputs.key)),
        _ours(rotary, inputs, backward=backward),
        _separate(inputs, backward=backward),
        _plain(COMPILED, graph, inputs, backward=backward),
        _plain(EAGER, plain, inputs, backward=backward),
    ]
    # q, k and v in and out; backwards q and k of the projection are read as well
    mixed = shape.head_bytes(shape.query_heads + 2 * shape.groups)
    return Case(
        name=f"{shape.name}, {'forward + backward' if backward else 'forward'}",
        contenders=contenders,
        comparisons=list(_comparisons(judged=shape.name in LARGE)),
        floor_bytes=2 * mixed + ((2 * mixed + shape.qk_bytes) if backward else 0),
    )


def _ours(rotary: Rotary, inputs: Inputs, *, backward: bool) -> Contender:
    given, table = given_of(inputs), rotary.fixed_table(inputs)
    forward = partial(rotary.split, given, table, inputs.shape.head_dim)
    return _timed(OURS, forward, [given[n] for n in WANTED], inputs, backward=backward)


def _separate(inputs: Inputs, *, backward: bool) -> Contender:
    given = given_of(inputs)
    try:
        passes, leaves = separate(inputs, given)
    except peers.Absent as absent:
        return Contender(name=SEPARATE, absent=str(absent))
    return _timed(SEPARATE, partial(passes, given), leaves, inputs, backward=backward)


def _plain(name: str, function: Callable[..., tuple[Tensor, ...]], inputs: Inputs, *, backward: bool) -> Contender:
    try:
        turn = peers.megatron()
    except peers.Absent as absent:
        return Contender(name=name, absent=str(absent))
    given = given_of(inputs)
    table = peers.angles(inputs.frequencies.omega, inputs.shape.rows)
    leaves = [given[n] for n in WANTED]
    return _timed(name, partial(function, *leaves, table, turn), leaves, inputs, backward=backward)


def _timed(
    name: str, forward: Callable[[], tuple[Tensor, ...]], leaves: list[Tensor], inputs: Inputs, *, backward: bool
) -> Contender:
    if not backward:
        return Contender(name=name, call=forward)
    return Contender(name=name, call=lambda: torch.autograd.grad(forward(), leaves, inputs.upstream))


def _comparisons(*, judged: bool) -> Iterator[Comparison]:
    yield Comparison(over=OURS, under=COPY)
    yield Comparison(over=OURS, under=FLOOR)
    yield Comparison(over=SEPARATE, under=OURS, target=at_least(2.5) if judged else None)
    yield Comparison(over=COMPILED, under=OURS)
    yield Comparison(over=EAGER, under=OURS)
