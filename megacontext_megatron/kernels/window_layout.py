"""Where heads lie in memory, as the sliding-window attention kernels are told."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


def dense_channels(x: Tensor) -> Tensor:
    """Return x [s, b, ...] such that its channels lie next to one another, other strides being free."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    rows, sequences, heads = x.stride()[:3]
    return rows, sequences, heads


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowLayout:
    """Sizes, and strides in elements: of query rows, sequences, groups and heads, and of rows, sequences and groups.

    `mixed` is whether queries, keys and values lie in one projection.
    """

    sq: int
    sk: int
    b: int
    np: int
    ng: int
    hn: int
    query: tuple[int, int, int, int]
    key: tuple[int, int, int]
    value: tuple[int, int, int]
    mixed: bool

    @classmethod
    def of_heads(cls, query: Tensor, key: Tensor, value: Tensor) -> WindowLayout:
        """Return the layout of queries [sq, b, np, hn], keys and values [sk, b, ng, hn] as they lie in memory."""
        shapes = f"queries {tuple(query.shape)}, keys {tuple(key.shape)} and values {tuple(value.shape)}"
        if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape or query.shape[1::2] != key.shape[1::2]:
            raise ValueError(f"{shapes} do not fit one another")
        (sq, b, np, hn), (sk, _, ng, _) = query.shape, key.shape
        if not 0 < ng <= np or np % ng or sq > sk:
            raise ValueError(f"{shapes} do not fit one another")
        if not query.dtype == key.dtype == value.dtype:
            raise ValueError(f"queries are {query.dtype}, keys {key.dtype} and values {value.dtype}")
        rows, sequences, head = _strides(query)
        return cls(
            sq=sq, sk=sk, b=b, np=np, ng=ng, hn=hn, query=(rows, sequences, np // ng * head, head),
            key=_strides(key), value=_strides(value), mixed=False,
        )  # fmt: skip

    @classmethod
    def of_mixed(cls, mixed: Tensor, hn: int) -> WindowLayout:
        """Return the layout of a mixed projection [s, b, ng, (np / ng + 2) hn]."""
        if mixed.dim() != 4 or hn < 1 or mixed.shape[3] % hn or mixed.shape[3] < 3 * hn or not mixed.shape[2]:
            raise ValueError(f"a mixed projection {tuple(mixed.shape)} does not hold heads of {hn} channels")
        s, b, ng, width = mixed.shape
        strides = _strides(mixed)
        return cls(
            sq=s, sk=s, b=b, np=(width // hn - 2) * ng, ng=ng, hn=hn, query=(*strides, hn),
            key=strides, value=strides, mixed=True,
        )  # fmt: skip

    def again(self, source: Tensor, key: Tensor | None, value: Tensor | None) -> WindowLayout:
        """Return the layout of the same sizes as these tensors lie in memory."""
        if key is None or value is None:
            return WindowLayout.of_mixed(source, self.hn)
        return WindowLayout.of_heads(source, key, value)

    @property
    def per_group(self) -> int:
        """Query heads of a query group."""
        return self.np // self.ng

    @property
    def packed(self) -> int:
        """Lanes that the heads of a query group take of a row, a power of two."""
        return 1 << (self.per_group - 1).bit_length()

    @property
    def gradient_of_heads(self) -> WindowLayout:
        """Queries, keys and values of the same sizes, each dense and on its own."""
        row, group_row = self.np * self.hn, self.ng * self.hn
        key = (self.b * group_row, group_row, self.hn)
        return WindowLayout(
            sq=self.sq, sk=self.sk, b=self.b, np=self.np, ng=self.ng, hn=self.hn,
            query=(self.b * row, row, self.per_group * self.hn, self.hn), key=key, value=key, mixed=False,
        )  # fmt: skip

    def of_output(self, x: Tensor) -> WindowLayout:
        """Return the layout whose queries are x [sq, b, np, hn], the heads of a row of which are dense."""
        dense = self.gradient_of_heads
        # PyTorch takes a dimension of one for dense, whatever its stride.
        row, sequence = (
            given if size > 1 else own for given, size, own in zip(x.stride(), x.shape[:2], dense.query, strict=False)
        )
        return replace(dense, query=(row, sequence, *dense.query[2:]))

    @property
    def gradient(self) -> WindowLayout:
        """Where gradients of what was read are written: dense."""
        if not self.mixed:
            return self.gradient_of_heads
        width = (self.per_group + 2) * self.hn
        strides = (self.b * self.ng * width, self.ng * width, width)
        return WindowLayout(
            sq=self.sq, sk=self.sk, b=self.b, np=self.np, ng=self.ng, hn=self.hn,
            query=(*strides, self.hn), key=strides, value=strides, mixed=True,
        )  # fmt: skip

    def query_blocks(self, lanes: int) -> int:
        """Return how many programs of so many lanes own all queries."""
        rows = max(lanes, self.packed) // self.packed
        return -(-self.sq // rows) * self.b * self.ng

    def key_blocks(self, keys: int) -> int:
        """Return how many programs of so many keys own all keys."""
        return -(-self.sk // keys) * self.b * self.ng

    def parts(self, source: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return tensors that begin where queries, keys and values do."""
        if key is not None and value is not None:
            return source, key, value
        first = self.per_group * self.hn
        return source, source[..., first:], source[..., first + self.hn :]
