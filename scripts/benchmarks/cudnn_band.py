"""cuDNN's attention in a band below the diagonal, through NVIDIA's frontend for Python."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from scripts.benchmarks.peers import found

_Q, _K, _V, _OUT, _STATS, _D_OUT, _D_Q, _D_K, _D_V = range(1, 10)
"""What tensors of the graphs are called."""


class Band:
    """Causal attention of the row itself and the `look_back` before it; one pair of graphs for each set of shapes.

    Raises peers.Absent where the package `cudnn` cannot be imported.
    """

    def __init__(self, look_back: int, scale: float) -> None:
        self.cudnn: Any = found(lambda: importlib.import_module("cudnn"))
        self.look_back, self.scale = look_back, scale
        self._handle: Any = None
        self._graphs: dict[Any, tuple[Any, int]] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return attention [s, b, np, hn] of q [s, b, np, hn], k and v [s, b, ng, hn]."""
        return _Banded.apply(self, query, key, value)

    def mask(self) -> dict[str, Any]:
        """Return the graph's arguments that say which keys a query sees; cuDNN counts the query's own row in."""
        return {
            "diagonal_alignment": self.cudnn.diagonal_alignment.TOP_LEFT,
            "diagonal_band_left_bound": self.look_back + 1,
            "diagonal_band_right_bound": 0,
        }

    def graph(self, kind: str, tensors: dict[int, Tensor], handle: Any = None) -> Any:
        """Return the unbuilt graph `forward` or `backward` of tensors by uid, all [s, b, n, hn] but the statistics."""
        graph = self.cudnn.pygraph(
            handle=handle,
            io_data_type=self.cudnn.data_type.BFLOAT16,
            intermediate_data_type=self.cudnn.data_type.FLOAT,
            compute_data_type=self.cudnn.data_type.FLOAT,
        )
        float32 = self.cudnn.data_type.FLOAT
        if kind == "forward":
            q, k, v = (self._named(graph, uid, tensors[uid]) for uid in (_Q, _K, _V))
            out, stats = graph.sdpa(
                name="sdpa", q=q, k=k, v=v, generate_stats=True, attn_scale=self.scale, **self.mask()
            )
            self._returned(out, _OUT, tensors)
            self._returned(stats, _STATS, tensors).set_data_type(float32)
            return graph
        q, k, v, o, do = (self._named(graph, uid, tensors[uid]) for uid in (_Q, _K, _V, _OUT, _D_OUT))
        kept = tensors[_STATS]
        stats = graph.tensor(
            name="stats", dim=list(kept.shape), stride=list(kept.stride()), data_type=float32, uid=_STATS
        )
        gradients = graph.sdpa_backward(
            name="sdpa_backward", q=q, k=k, v=v, o=o, dO=do, stats=stats, attn_scale=self.scale, **self.mask()
        )
        for tensor, uid in zip(gradients, (_D_Q, _D_K, _D_V), strict=True):
            self._returned(tensor, uid, tensors)
        return graph

    def run(self, kind: str, tensors: dict[int, Tensor]) -> None:
        """Run the graph `forward` or `backward`, which writes into those of the tensors that it returns."""
        if self._handle is None:
            self._handle = self.cudnn.create_handle()
        self.cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
        shapes = (kind, *((t.shape, t.stride()) for t in tensors.values()))
        if shapes not in self._graphs:
            graph = self.graph(kind, tensors, self._handle)
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
            graph.check_support()
            graph.build_plans()
            self._graphs[shapes] = (graph, max(1, graph.get_workspace_size()))
        graph, size = self._graphs[shapes]
        space = torch.empty(size, dtype=torch.uint8, device=tensors[_Q].device)
        graph.execute(tensors, space, handle=self._handle)

    def _named(self, graph: Any, uid: int, tensor: Tensor) -> Any:
        dim, stride = _bhsd(tensor)
        return graph.tensor(name=f"t{uid}", dim=dim, stride=stride, data_type=self.cudnn.data_type.BFLOAT16, uid=uid)

    def _returned(self, node: Any, uid: int, tensors: dict[int, Tensor]) -> Any:
        tensor = tensors[uid]
        dim, stride = (list(tensor.shape), list(tensor.stride())) if uid == _STATS else _bhsd(tensor)
        return node.set_uid(uid).set_output(True).set_dim(dim).set_stride(stride)


def _bhsd(tensor: Tensor) -> tuple[list[int], list[int]]:
    """Return sizes and strides of [s, b, n, hn] as cuDNN's [b, n, s, hn]."""
    view = tensor.permute(1, 2, 0, 3)
    return list(view.shape), list(view.stride())


def statistics(query: Tensor) -> Tensor:
    """Return room for the normaliser of each query, fp32 [b, np, s, 1]."""
    rows, batch, heads, _ = query.shape
    return torch.empty(batch, heads, rows, 1, dtype=torch.float32, device=query.device)


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, band: Band, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, stats = torch.empty_like(query), statistics(query)
        band.run("forward", {_Q: query, _K: key, _V: value, _OUT: out, _STATS: stats})
        ctx.band = band
        ctx.save_for_backward(query, key, value, out, stats)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        query, key, value, out, stats = ctx.saved_tensors
        of_heads = [torch.empty_like(x) for x in (query, key, value)]
        tensors = {_Q: query, _K: key, _V: value, _OUT: out, _STATS: stats, _D_OUT: gradients[0]}
        ctx.band.run("backward", {**tensors, **dict(zip((_D_Q, _D_K, _D_V), of_heads, strict=True))})
        return None, *of_heads
