"""Core attention on the plugin's kernels: sliding windows, and linear biases on the distance of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megacontext_megatron.attention.biased_attention import CENTRE
from megacontext_megatron.attention.core_attention import GatheredRows
from megacontext_megatron.attention.window_chunks import chunked_window_attention
from megacontext_megatron.attention.windows import window_of

CARRIER, SLOPES = "carrier", "slopes"
"""Names of tensors that go with queries and keys: the rows' places, where windows rotate by them, and slopes."""


class KernelAttention(torch.nn.Module):
    """What core attention on a kernel is built with."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,
        softmax_scale: float | None = None,
        pg_collection: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._head_dim = cast(int, config.kv_channels)
        self._scale = softmax_scale or 1.0 / math.sqrt(self._head_dim)
        self._cp: ProcessGroup = pg_collection.cp
        window = window_of(config, layer_number)
        self._look_back = None if window is None else window[0]

    @staticmethod
    def _check(arguments: Mapping[str, Any]) -> None:
        """RuntimeError for packed samples, which no kernel here keeps apart."""
        if arguments.get("packed_seq_params") is not None:
            raise RuntimeError("packed samples would attend to each other in this attention")

    @staticmethod
    def _rows(
        names: tuple[str, ...], attention_bias: Mapping[str, Tensor] | None, arguments: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Return the tensors of rows by these names, which come in `attention_bias` or as arguments of their own."""
        given = {**(attention_bias or {}), **arguments}
        return {name: given[name] for name in names if isinstance(given.get(name), Tensor)}


class WindowAttention(KernelAttention):
    """Attention within a sliding window; over a context-parallel group, chunks fetch the rows before them.

    Where it is given a rotation, queries are Megatron's mixed projection instead, keys and values are empty, and q and
    k are rotated where they are used.
    """

    _rotation: Callable[[Tensor], Any] | None = None

    def attach_rotation(self, rotation: Callable[[Tensor], Any]) -> None:
        """Rotate from now on by what `rotation` makes of a carrier."""
        self._rotation = rotation

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attention_bias: Mapping[str, Tensor] | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Return [s / cp, b, np hn] from q [s / cp, b, np, hn], k and v [s / cp, b, ng, hn] of this rank's rows."""
        # Triton is not everywhere that PyTorch is.
        from megacontext_megatron.kernels.window_attention import split_window_attention, window_attention

        del attention_mask
        self._check(arguments)
        look_back = cast(int, self._look_back)
        carrier = self._rows((CARRIER,), attention_bias, arguments).get(CARRIER)
        if carrier is not None:
            assert self._rotation is not None
            rotation = self._rotation(carrier)
            return split_window_attention(query, self._head_dim, look_back, self._scale, rotation=rotation).flatten(2)
        if self._cp.size() == 1:
            return window_attention(query, key, value, look_back, self._scale).flatten(2)
        found = chunked_window_attention(query, key, value, look_back, scale=self._scale, group=self._cp)
        return found.flatten(2)


class LinearBiasAttention(KernelAttention):
    """Causal attention with a linear bias, or with none; keys are gathered over the context-parallel group.

    With `reach_skip` and norms of queries and keys, keys that cannot matter are left unread.
    """

    biased = False
    """Whether rows must bring slopes."""

    _norms: tuple[torch.nn.Module, torch.nn.Module] | None = None

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, layer_number, *args, **kwargs)
        self._gathering = GatheredRows(config, layer_number, self._cp)
        self._zero_centred = config.layernorm_zero_centered_gamma

    def attach_norms(
        self, query_norm: torch.nn.Module, key_norm: torch.nn.Module, *, rotated: bool, gain: float
    ) -> None:
        """Leave out keys beyond the reach that the RMS norms of queries and keys bound.

        `rotated` says whether they are rotated after the norms, and `gain` by what that can multiply scores.
        """
        # A tuple, so that they do not become submodules of this.
        self._norms, self._rotated, self._gain = (query_norm, key_norm), rotated, gain

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attention_bias: Mapping[str, Tensor] | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Return [s / cp, b, np hn] from q [s / cp, b, np, hn], k and v [s / cp, b, ng, hn] of this rank's rows.

        The bias has `slopes` fp32 [np] or [s / cp, b, np], nats per token, over `centre` float64 [s / cp, b], whole
        half tokens.
        """
        del attention_mask
        self._check(arguments)
        rows = self._rows((CENTRE, SLOPES), attention_bias, arguments)
        slopes = rows.get(SLOPES)
        if self.biased and slopes is None:
            raise RuntimeError("a layer with a linear bias was given no slopes")
        doubled = None if slopes is None else self._gathering.gather(rows[CENTRE] * 2)
        key, value = self._gathering.gather(key), self._gathering.gather(value)
        parts = [
            self._attend(
                query[own], key[:seen], value[:seen], _of_rows(slopes, own), None if doubled is None else doubled[:seen]
            )
            for own, seen in self._spans(len(query))
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(2)

    def _spans(self, rows: int) -> list[tuple[slice, int]]:
        """Return which of this rank's rows follow one another, and how many of all rows the last of them sees."""
        size, rank = self._cp.size(), self._cp.rank()
        if size == 1:
            return [(slice(0, rows), rows)]
        chunk = rows // 2
        return [(slice(0, chunk), (rank + 1) * chunk), (slice(chunk, rows), (2 * size - rank) * chunk)]

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None, doubled_centre: Tensor | None
    ) -> Tensor:
        from megacontext_megatron.kernels.linear_bias_attention import LinearBias, linear_bias_attention

        if slopes is None or doubled_centre is None:
            return linear_bias_attention(query, key, value, self._scale, look_back=self._look_back)
        bias = LinearBias(slopes=slopes, doubled_centre=doubled_centre)
        reach = self._reach(query)
        return linear_bias_attention(query, key, value, self._scale, bias, look_back=self._look_back, reach=reach)

    def _reach(self, query: Tensor) -> Any:
        """Return the leave to skip for all heads of q, whose norms share one weight; None without norms."""
        from megacontext_megatron.kernels.linear_bias_attention import Reach, score_bound

        if self._norms is None:
            return None
        query_weight, key_weight = (cast(Tensor, norm.weight) for norm in self._norms)
        bound = score_bound(
            query_weight, key_weight, self._scale, rotated=self._rotated, zero_centred=self._zero_centred
        )
        return Reach(
            score_bound=(bound * self._gain).repeat(query.shape[2]), tolerance=torch.finfo(query.dtype).eps / 8
        )


def _of_rows(slopes: Tensor | None, rows: slice) -> Tensor | None:
    """Return slopes [np], which all rows share, or the slopes of these rows [s, b, np]."""
    return slopes if slopes is None or slopes.dim() == 1 else slopes[rows]
