"""Contenders for attention: their passes, whether peers compute the same, and readings made of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from scripts.benchmarks.attention_inputs import AttentionInputs, causal_flops
from scripts.benchmarks.attention_peers import Layout, Peer, repeatable
from scripts.benchmarks.gate import VECTORS, vector_error
from scripts.benchmarks.results import OURS, Reading, Row
from scripts.benchmarks.timing import Contender

Pass = Literal["forward", "backward", "forward + backward"]
PASSES: tuple[Pass, ...] = ("forward", "backward", "forward + backward")

PEER_ERROR = 2 * VECTORS
"""Largest relative error of an output's head with which a peer counts as doing the same job."""

NOBODY = "none of them is here"


@dataclass(frozen=True, kw_only=True)
class Race:
    """One shape and pass: `backward` is timed alone, on a graph made before; `forward` keeps what a backward needs."""

    inputs: AttentionInputs
    how: Pass

    def contender(self, name: str, peer: Peer, extra: Sequence[Tensor] = ()) -> Contender:
        """Return attention on heads of its own, in the order it likes; `extra` tensors get gradients as well."""
        if peer.attend is None:
            return Contender(name=name, absent=peer.absent)
        leaves = heads_of(self.inputs, peer.layout)
        upstream = ordered(self.inputs.of_output, peer.layout)
        return self.timed(name, partial(peer.attend, *leaves), [*leaves, *extra], [upstream])

    def timed(
        self, name: str, forward: Callable[[], Any], leaves: Sequence[Tensor], upstream: Sequence[Tensor]
    ) -> Contender:
        """Return the pass of a function that returns one tensor or several; a peer that fails here is absent."""
        try:
            call = self._pass(forward, list(leaves), list(upstream))
        except Exception as error:  # a peer raises what it likes; ours is gated before
            if name.startswith(OURS):
                raise
            return Contender(name=name, absent=failure(error))
        return Contender(name=name, call=call)

    def _pass(self, forward: Callable[[], Any], leaves: list[Tensor], upstream: list[Tensor]) -> Callable[[], object]:
        if self.how == "forward":
            return forward
        if self.how == "forward + backward":
            return lambda: torch.autograd.grad(_several(forward()), leaves, upstream)
        out = _several(forward())
        again = repeatable(out[0])

        def backward() -> object:
            again()
            return torch.autograd.grad(out, leaves, upstream, retain_graph=True)

        return backward


def _several(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def failure(error: Exception) -> str:
    """Return why something is absent that raised."""
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def ordered(heads: Tensor, layout: Layout) -> Tensor:
    """Return a copy of [s, b, n, hn] whose memory is in that order, or in the order (b, s, n, hn)."""
    if layout == "rows first":
        return heads.detach().clone(memory_format=torch.contiguous_format)
    return heads.detach().transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


def heads_of(inputs: AttentionInputs, layout: Layout = "rows first") -> list[Tensor]:
    """Return copies of q, k and v that require gradients."""
    return [ordered(x, layout).requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]


def checked(
    peers: Mapping[str, Peer], inputs: AttentionInputs, rows: Tensor, expected: Tensor
) -> tuple[dict[str, Peer], list[str]]:
    """Return the peers whose outputs at `rows` are the `expected` ones, float64; the others become absent.

    Also returns a note for each that has run and is right.
    """
    found, notes = {}, []
    for name, peer in peers.items():
        found[name] = peer
        if peer.attend is None:
            continue
        try:
            # with gradients, because what runs without them would be compiled besides
            error = vector_error(peer.attend(*heads_of(inputs, peer.layout))[rows], expected)
        except Exception as raised:  # a peer raises what it likes
            found[name] = Peer(absent=failure(raised))
            continue
        if error > PEER_ERROR:
            found[name] = Peer(absent=f"wrong results: {error:.2e} > {PEER_ERROR:.2e}")
        else:
            notes.append(f"{inputs.shape.name}: {name} errs by {error:.1e}")
    return found, notes


def with_fastest(row: Row, names: Iterable[str], label: str) -> Row:
    """Return the row with the fastest reading of those names once more, as `label`."""
    present = [r for r in map(row.reading, names) if r.rounds]
    best = min(present, key=lambda r: r.value, default=None)
    added = Reading(name=label, absent=NOBODY) if best is None else replace(best, name=label)
    return replace(row, readings=(*row.readings, added))


def with_sum(row: Row, parts: tuple[str, str], label: str) -> Row:
    """Return the row with the sum of two readings, round by round, as `label`."""
    first, second = map(row.reading, parts)
    if first.rounds and second.rounds:
        rounds = tuple(a + b for a, b in zip(first.rounds, second.rounds, strict=True))
        added = Reading(name=label, rounds=rounds)
    else:
        added = Reading(name=label, absent=first.absent or second.absent)
    return replace(row, readings=(*row.readings, added))


def once(name: str, call: Callable[[], object]) -> Reading:
    """Return the time of a single call after one that compiles it; for what takes seconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        call()
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
    except Exception as error:  # a peer raises what it likes
        return Reading(name=name, absent=failure(error))
    return Reading(name=name, rounds=(1000.0 * begin.elapsed_time(end),))


def rates(row: Row, inputs: AttentionInputs, how: Pass) -> str:
    """Return the TFLOP/s of causal attention that each reading stands for, in one line."""
    flops = causal_flops(inputs.shape, forward=how != "backward", backward=how != "forward")
    rated = [f"{r.name} {flops / r.value * 1e-6:.0f}" for r in row.readings if r.rounds]
    return f"{row.case}, TFLOP/s of the unskipped causal half: {', '.join(rated)}"
