"""Group I: 32 rows pooled to one by attention of a learned query, against attention kernels on batches of blocks."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from scripts.benchmarks import peers
from scripts.benchmarks.gate import Findings, compared
from scripts.benchmarks.options import Options
from scripts.benchmarks.results import FLOOR, OURS, Check, Comparison, at_least, at_most
from scripts.benchmarks.rotary_forward import copying_bytes
from scripts.benchmarks.timing import Case, Contender, Stopwatch

TITLE = "gists of 32 rows, pooled by a learned query"
COPY = "copy of the same bytes, one launch"
BATCHED = "PyTorch SDPA, a batch of blocks (GistNet without the kernel)"
CUDNN = "cuDNN (PyTorch SDPA)"
VARLEN = "FlashAttention-2 (torch varlen)"
FLASH4 = "FlashAttention-4 varlen"
COMPILED = "softmax and sums under torch.compile"

Pool = Callable[[Tensor, Tensor, int], Tensor]
"""(query [1, d], keys and values [n, K, 2 d], heads) -> pooled values [n, d]."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Random blocks of `rows` rows, keys and values of `heads` heads beside each other as a projection leaves them."""

    blocks: int
    heads: int
    channels: int
    rows: int = 32
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """Rows in all, and heads by channels."""
        return f"{self.blocks * self.rows} rows, {self.heads}x{self.channels}"

    def _random(self, *size: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*size, generator=generator, device=self.device).to(self.dtype)

    @cached_property
    def query(self) -> Tensor:
        """The learned query [1, d]."""
        return self._random(1, self.heads * self.channels, seed=1)

    @cached_property
    def mixed(self) -> Tensor:
        """Keys and values [n, K, 2 d]."""
        return self._random(self.blocks, self.rows, 2 * self.heads * self.channels, seed=2)

    @cached_property
    def upstream(self) -> Tensor:
        """Gradient of the pooled values [n, d]."""
        return self._random(self.blocks, self.heads * self.channels, seed=3)

    def leaves(self) -> list[Tensor]:
        """Return the query and the blocks as leaves that want gradients."""
        return [x.detach().clone().requires_grad_() for x in (self.query, self.mixed)]

    def moved_bytes(self, *, backward: bool) -> int:
        """Return the bytes that a pass must read and write; backward, that of pooled values is read."""
        pooled, mixed = (x.numel() * x.element_size() for x in (self.upstream, self.mixed))
        return pooled + (2 if backward else 1) * mixed


GISTNET = Blocks(blocks=1024, heads=8, channels=64)
"""GistNet's own heads at its usual width."""

MODEL = Blocks(blocks=1024, heads=8, channels=128)
"""Keys and values of a model's rows."""


def run(options: Options, found: Findings) -> None:
    """Check and time every shape, forward and backward; raises GateFailed."""
    watch, pools = Stopwatch(rounds=options.rounds), present()
    for blocks in (GISTNET,) if options.quick else (GISTNET, MODEL):
        found.require(gate(kernel(), blocks))
        for backward in (False, True):
            with torch.set_grad_enabled(backward):
                found.rows.append(watch.row(case(kernel(), blocks, pools, backward=backward)))
        torch.cuda.empty_cache()


def kernel() -> Pool:
    """Return ours."""
    from megacontext_megatron.kernels.pooling import slot_pooling

    return slot_pooling


def gate(pool: Pool, blocks: Blocks, scale: float = 1.0) -> list[Check]:
    """Compare pooled values and both gradients with float64."""
    leaves = blocks.leaves()
    pooled = pool(leaves[0], leaves[1], blocks.heads)
    gradients = torch.autograd.grad(pooled, leaves, blocks.upstream)
    values = {"pooled": pooled, "d query": gradients[0], "d mixed": gradients[1]}
    return compared(_by_heads(values, blocks), _by_heads(exact(blocks), blocks), f"{blocks.name}: ", scale)


def exact(blocks: Blocks) -> dict[str, Tensor]:
    """Return pooled values and gradients in float64: softmax(q k / sqrt(hn)) v by its definition."""
    query, mixed = (x.double().requires_grad_() for x in (blocks.query, blocks.mixed))
    pooled = plain(query, mixed, blocks.heads)
    gradients = torch.autograd.grad(pooled, (query, mixed), blocks.upstream.double())
    return {"pooled": pooled.detach(), "d query": gradients[0], "d mixed": gradients[1]}


def _by_heads(values: Mapping[str, Tensor], blocks: Blocks) -> dict[str, Tensor]:
    """Return tensors with heads beside rows, [.., .., heads, hn], so that each head's vector is judged by itself.

    The gradient of the query is a sum over blocks, and is judged as such.
    """
    apart = {name: x.unflatten(-1, (-1, blocks.channels)) for name, x in values.items()}
    apart["pooled"] = apart["pooled"].unsqueeze(1)
    return apart


def plain(query: Tensor, mixed: Tensor, heads: int) -> Tensor:
    """Pool in plain PyTorch, in fp32 at least."""
    wide = torch.promote_types(mixed.dtype, torch.float32)
    key, value = (x.unflatten(-1, (heads, -1)).to(wide) for x in mixed.chunk(2, dim=-1))
    scores = (query.unflatten(-1, (heads, -1)).to(wide) * key).sum(-1) / math.sqrt(key.shape[-1])
    return (scores.softmax(1).unsqueeze(-1) * value).sum(1).flatten(1).to(mixed.dtype)


def batched(query: Tensor, mixed: Tensor, heads: int) -> Tensor:
    """Pool as GistNet does without the kernel."""
    from megacontext_megatron.context.gistnet import attend

    key, value = mixed.chunk(2, dim=-1)
    return attend(query.expand(mixed.shape[0], 1, -1), (key, value), heads).squeeze(1)


def cudnn(query: Tensor, mixed: Tensor, heads: int) -> Tensor:
    """Pool by cuDNN alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return batched(query, mixed, heads)


def varlen() -> Pool:
    """Return FlashAttention-2 on sequences of one query and K keys; raises peers.Absent."""
    function = peers.found(lambda: importlib.import_module("torch.nn.attention.varlen").varlen_attn)

    def attend(heads: list[Tensor], ends: list[Tensor], rows: int) -> Tensor:
        return function(*heads, *ends, 1, rows)

    return partial(packed, attend)


def flash4() -> Pool:
    """Return FlashAttention-4 on the same; raises peers.Absent."""
    function = peers.found(lambda: importlib.import_module("flash_attn.cute").flash_attn_varlen_func)

    def attend(heads: list[Tensor], ends: list[Tensor], rows: int) -> Tensor:
        starts = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
        out = function(*heads, **starts, max_seqlen_q=1, max_seqlen_k=rows)
        return out[0] if isinstance(out, tuple) else out

    return partial(packed, attend)


def packed(attend: Callable[[list[Tensor], list[Tensor], int], Tensor], *given: Any) -> Tensor:
    """Pool blocks as packed sequences by `attend`(q, k and v [rows, heads, hn], ends, K)."""
    query, mixed, heads = given
    count, rows = mixed.shape[:2]
    ends = [torch.arange(0, count * n + 1, n, dtype=torch.int32, device=mixed.device) for n in (1, rows)]
    key, value = (x.unflatten(-1, (heads, -1)).flatten(0, 1) for x in mixed.chunk(2, dim=-1))
    queries = query.unflatten(-1, (heads, -1)).expand(count, -1, -1).contiguous()
    return attend([queries, key, value], ends, rows).flatten(1)


def present() -> dict[str, Pool | str]:
    """Return the peers by name; an absent one is its reason."""
    loads: dict[str, Callable[[], Pool]] = {
        BATCHED: lambda: batched,
        CUDNN: lambda: cudnn,
        VARLEN: varlen,
        FLASH4: flash4,
        COMPILED: lambda: peers.compiled(plain),
    }
    pools: dict[str, Pool | str] = {}
    for name, load in loads.items():
        try:
            pools[name] = load()
        except peers.Absent as absent:
            pools[name] = str(absent)
    return pools


def case(ours: Pool, blocks: Blocks, pools: Mapping[str, Pool | str], *, backward: bool) -> Case:
    """Return the contenders for one shape and pass."""
    moved = blocks.moved_bytes(backward=backward)
    contenders = [
        Contender(name=COPY, call=copying_bytes(moved // 2, blocks.mixed.device)),
        Contender(name=OURS, call=_timed(ours, blocks, backward=backward)),
        *(_peer(name, pool, blocks, backward=backward) for name, pool in pools.items()),
    ]
    return Case(
        name=f"{blocks.name}, {'backward' if backward else 'forward'}",
        contenders=contenders,
        comparisons=list(_comparisons(pools)),
        floor_bytes=moved,
    )


def _timed(pool: Pool, blocks: Blocks, *, backward: bool) -> Callable[[], object]:
    """Return a call of one pass."""
    if not backward:
        return partial(pool, blocks.query, blocks.mixed, blocks.heads)
    leaves = blocks.leaves()
    pooled = pool(leaves[0], leaves[1], blocks.heads)
    return lambda: torch.autograd.grad(pooled, leaves, blocks.upstream, retain_graph=True)


def _peer(name: str, pool: Pool | str, blocks: Blocks, *, backward: bool) -> Contender:
    if isinstance(pool, str):
        return Contender(name=name, absent=pool)
    try:
        return Contender(name=name, call=_timed(pool, blocks, backward=backward))
    except Exception as error:  # a peer raises what it likes; ours is gated before
        return Contender(name=name, absent=f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def _comparisons(names: Mapping[str, object]) -> Iterator[Comparison]:
    yield Comparison(over=OURS, under=FLOOR, target=at_most(1.3))
    yield Comparison(over=OURS, under=COPY)
    for name in names:
        yield Comparison(over=name, under=OURS, target=at_least(5.0) if name in (BATCHED, VARLEN) else None)
