"""Where heads lie in memory, as the span rotary kernels are told."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


def mergeable(x: Tensor) -> Tensor:
    """Return x [s, b, ...] such that row s b + i starts at a multiple of one stride, and channels are dense."""
    s, b = x.shape[:2]
    merges = s == 1 or b == 1 or x.stride(0) == b * x.stride(1)
    return x if merges and x.stride(-1) == 1 else x.contiguous()


def _row_stride(x: Tensor) -> int:
    return x.stride(0) if x.shape[1] == 1 else x.stride(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadLayout:
    """Sizes, and strides in elements: of query rows, groups and heads, and of key rows and groups.

    `mixed` is whether queries, keys and values lie in one projection, so that values are copied along.
    """

    s: int
    b: int
    np: int
    ng: int
    hn: int
    r: int
    query: tuple[int, int, int]
    key: tuple[int, int]
    mixed: bool

    @classmethod
    def of_heads(cls, query: Tensor, key: Tensor, r: int) -> HeadLayout:
        """Return the layout of queries [s, b, np, hn] and keys [s, b, ng, hn] as they lie in memory."""
        s, b, np, hn = query.shape
        ng = key.shape[2]
        if key.shape != (s, b, ng, hn) or np % ng or not 0 < 2 * r <= hn:
            raise ValueError(f"queries {tuple(query.shape)} and keys {tuple(key.shape)} do not fit {r} rotary pairs")
        if query.dtype != key.dtype:
            raise ValueError(f"queries are {query.dtype} and keys {key.dtype}")
        head = query.stride(2)
        strides = (_row_stride(query), np // ng * head, head)
        key_strides = (_row_stride(key), key.stride(2))
        return cls(s=s, b=b, np=np, ng=ng, hn=hn, r=r, query=strides, key=key_strides, mixed=False)

    @classmethod
    def of_mixed(cls, mixed: Tensor, hn: int, r: int) -> HeadLayout:
        """Return the layout of a contiguous mixed projection."""
        s, b, ng, width = mixed.shape
        if width % hn or width < 3 * hn or not 0 < 2 * r <= hn:
            raise ValueError(f"a mixed projection {tuple(mixed.shape)} does not hold heads of {hn} and {r} pairs")
        np, row = (width // hn - 2) * ng, ng * width
        return cls(s=s, b=b, np=np, ng=ng, hn=hn, r=r, query=(row, width, hn), key=(row, width), mixed=True)

    @property
    def gradient(self) -> HeadLayout:
        """Where gradients of what was read are written: the same, dense."""
        if self.mixed:
            return self
        query = (self.np * self.hn, self.np // self.ng * self.hn, self.hn)
        return replace(self, query=query, key=(self.ng * self.hn, self.hn))

    def parts(self, source: Tensor, key: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return tensors that begin where queries, keys and values do."""
        if key is not None:
            return source, key, key
        flat, first = source.view(-1), self.np // self.ng * self.hn
        return flat, flat[first:], flat[first + self.hn :]
