"""Gluon kernels of Hopper run from their source on the CPU, with stand-ins for what they ask the machine to do.

Partitions are threads and block on barriers as on a GPU.  Copies into shared memory happen late and in a random order;
operands of products in shared memory, and sources of copies out of it, are read only where they are waited for, and
what was loaded into registers counts as read only after a fence.  So a buffer that is overwritten too early gives a
wrong result, and a wrong phase a wrong result or a deadlock.
"""

from __future__ import annotations
import __future__ as future

import inspect
import math
import random
import re
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megacontext_megatron.kernels import window_strip_device

PATIENCE = 20
"""Seconds until a barrier that nobody arrives at is a deadlock."""


class SharedMemory:
    """A part of shared memory; `reads` keeps what a thread loaded and no fence has followed."""

    def __init__(self, view: Tensor, reads: threading.local) -> None:
        self.view, self.dtype, self._reads = view, view.dtype, reads

    def index(self, at: int) -> SharedMemory:
        assert 0 <= at < len(self.view), at
        return SharedMemory(self.view[at], self._reads)

    def slice(self, start: int, length: int, dim: int = 0) -> SharedMemory:
        assert start >= 0
        assert start + length <= self.view.shape[dim]
        return SharedMemory(self.view.narrow(dim, start, length), self._reads)

    def permute(self, order: Sequence[int]) -> SharedMemory:
        return SharedMemory(self.view.permute(*order), self._reads)

    def reshape(self, shape: Sequence[int]) -> SharedMemory:
        return SharedMemory(self.view.view(shape), self._reads)

    def load(self, layout: object) -> Tensor:
        found = self.view.clone()
        self._reads.late = [*getattr(self._reads, "late", []), (found, self.view)]
        return found

    def store(self, x: Tensor) -> None:
        self.view.copy_(x)


class Barrier:
    """A barrier of arrivals and of bytes copied."""

    count = left = bytes = parity = 0

    def settle(self, condition: threading.Condition) -> None:
        if self.left == 0 and self.bytes == 0:
            self.parity, self.left = self.parity ^ 1, self.count
            condition.notify_all()


class Descriptor:
    """What TensorDescriptor says of a tensor, of which `block_type` and `layout` are asked inside kernels."""

    layout = None

    def __init__(self, base: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> None:
        self.tensor = base.detach().as_strided(shape, strides, base.storage_offset())
        self.block, self.dtype = block, base.dtype
        self.block_type = types.SimpleNamespace(nbytes=math.prod(block) * base.element_size())

    def box(self, at: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return which part of a box at `at` lies inside the tensor, counted from the tensor and from the box."""
        inside, of_box = [], []
        for size, first, length in zip(self.tensor.shape, at, self.block, strict=True):
            low = min(max(first, 0), size)
            high = max(min(first + length, size), low)
            inside.append(slice(low, high))
            of_box.append(slice(low - first, high - first) if high > low else slice(0, 0))
        return tuple(inside), tuple(of_box)


class Pointer:
    """Where a tensor begins, and places counted from there."""

    def __init__(self, tensor: Tensor, at: Any = 0) -> None:
        self.tensor, self.at = tensor.detach(), at

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.tensor, self.at + more)


class Later:
    """A product that is found where it is waited for."""

    def __init__(self, find: Callable[[], Tensor]) -> None:
        self.find = find


class Number(int):
    """A whole number that can be asked for another type."""

    def to(self, dtype: object) -> Number:
        return self

    def __add__(self, other: Any) -> Any:
        return other + int(self) if isinstance(other, Tensor) else Number(int(self) + int(other))

    def __mul__(self, other: Any) -> Any:
        return other * int(self) if isinstance(other, Tensor) else Number(int(self) * int(other))

    def __floordiv__(self, other: Any) -> Any:
        return Number(int(self) // int(other))

    def __mod__(self, other: Any) -> Any:
        return Number(int(self) % int(other))


class Machine:
    """One multiprocessor that runs one program at a time; without `fences` it forgets to honour them."""

    def __init__(self, seed: int, *, fences: bool = True) -> None:
        self.random, self.fences = random.Random(seed), fences
        self.condition = threading.Condition()
        self.pending: list[tuple[Descriptor, list[int], Barrier, SharedMemory]] = []
        self.failure: BaseException | None = None
        self.stopped = False
        self.program = (0, 0)
        self._own = threading.local()

    def run(self, kernel: Any, grid: tuple[int, int], arguments: dict[str, Any]) -> None:
        """Run all programs of a kernel."""
        function = self._source_of(kernel)
        self.stopped, copies = False, threading.Thread(target=self._guarded, args=(self._copy,))
        copies.start()
        try:
            for y in range(grid[1]):
                for x in range(grid[0]):
                    self.program = (x, y)
                    function(**arguments)
                    if self.failure is not None:
                        raise self.failure
        finally:
            self.stopped = True
            copies.join()

    def _source_of(self, kernel: Any) -> Callable[..., None]:
        """Return a kernel, and what it calls, as Python functions over the stand-ins."""
        names = self._stand_ins()
        own = sys.modules[kernel.fn.__module__]
        for module in (window_strip_device, own):
            text = re.sub(
                r"^(from|import) .*?(\(.*?\)|$)", "", inspect.getsource(module), flags=re.MULTILINE | re.DOTALL
            )
            text = re.sub(r"^@gluon\..*\n", "", text, flags=re.MULTILINE)
            text = re.sub(r"gl\.constexpr\(([^)]*)\)", r"\1", text).replace(".type.layout", ".shape")
            exec(compile(text, str(module.__file__), "exec", flags=future.annotations.compiler_flag), names)
        return names[kernel.fn.__name__]

    def _stand_ins(self) -> dict[str, Any]:
        return {
            "gl": self._language(),
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: None, init=self._init, expect=self._expect, arrive=self._arrive, wait=self._wait
            ),
            "tma": types.SimpleNamespace(
                async_copy_global_to_shared=self._copy_in, async_copy_shared_to_global=self._copy_out,
                store_wait=self._store_wait,
            ),
            "warpgroup_mma": self._product, "warpgroup_mma_wait": self._product_wait, "fence_async_shared": self._fence,
        }  # fmt: skip

    def _language(self) -> types.SimpleNamespace:
        def nothing(*given: Any, **more: Any) -> None:
            return None

        return types.SimpleNamespace(
            constexpr=object, float32=torch.float32, int64=torch.int64,
            NVMMADistributedLayout=nothing, DotOperandLayout=nothing, SliceLayout=nothing,
            zeros=lambda shape, dtype, layout: torch.zeros(shape), thread_barrier=nothing,
            convert_layout=lambda x, layout, assert_trivial: x,
            max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), exp2=torch.exp2, log2=torch.log2,
            maximum=_of_either(torch.maximum), minimum=_of_either(torch.minimum), where=_where,
            arange=lambda first, end, layout: torch.arange(first, end),
            permute=lambda x, order: x.permute(order), reshape=lambda x, shape: x.reshape(shape),
            split=lambda x: x.unbind(-1), join=lambda x, y: torch.stack((x, y), dim=-1),
            load=_load, store=_store, static_range=range, to_tensor=lambda x: x,
            program_id=lambda axis: Number(self.program[axis]),
            allocate_shared_memory=self._allocate, warp_specialize=self._warp_specialize,
        )  # fmt: skip

    def _allocate(self, dtype: torch.dtype, shape: list[int], layout: object) -> Any:
        if dtype == torch.int64:
            return _Barriers(shape[0])
        return SharedMemory(torch.full(shape, float("nan"), dtype=dtype), self._own)

    def _fence(self) -> None:
        if self.fences:
            self._own.late = []

    def _product(self, a: Tensor, b: SharedMemory, acc: Any, *, use_acc: bool, is_async: bool) -> Later:
        def find() -> Tensor:
            late = [view for found, view in getattr(self._own, "late", []) if found is a]
            made = (late[0] if late else a).float() @ b.view.float()
            if not use_acc:
                return made
            return made + (acc.find() if isinstance(acc, Later) else acc)

        return Later(find)

    def _warp_specialize(
        self, parts: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]
    ) -> None:
        threads = [threading.Thread(target=self._guarded, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _guarded(self, function: Callable[..., None], given: tuple[Any, ...] = ()) -> None:
        try:
            function(*given)
        except BaseException as error:
            self.failure = error

    def _init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.left = count

    def _expect(self, barrier: Barrier, size: int) -> None:
        with self.condition:
            barrier.bytes += size
            self._arrive_held(barrier)

    def _arrive(self, barrier: Barrier, count: int) -> None:
        assert count == 1
        with self.condition:
            self._arrive_held(barrier)

    def _arrive_held(self, barrier: Barrier) -> None:
        barrier.left -= 1
        assert barrier.left >= 0
        barrier.settle(self.condition)

    def _wait(self, barrier: Barrier, phase: int) -> None:
        with self.condition:
            end = time.monotonic() + PATIENCE
            while barrier.parity == int(phase):
                if self.failure is not None or (not self.condition.wait(0.5) and time.monotonic() > end):
                    raise RuntimeError("deadlock")

    def _copy_in(self, source: Descriptor, at: Sequence[Any], barrier: Barrier, target: SharedMemory) -> None:
        with self.condition:
            self.pending.append((source, [int(x) for x in at], barrier, target))
            self.condition.notify_all()

    def _copy_out(self, target: Descriptor, at: Sequence[Any], source: SharedMemory) -> None:
        self._stores().append((target, [int(x) for x in at], source))

    def _stores(self) -> list[tuple[Descriptor, list[int], SharedMemory]]:
        if not hasattr(self._own, "stores"):
            self._own.stores = []
        return self._own.stores

    def _store_wait(self, pending: int) -> None:
        assert pending == 0
        for target, at, source in self._stores():
            inside, of_box = target.box(at)
            target.tensor[inside] = source.view[of_box]
        self._stores().clear()

    def _product_wait(self, pending: int, deps: Sequence[Later]) -> Any:
        assert pending == 0
        if self.random.random() < 0.5:
            time.sleep(self.random.random() * 1e-3)
        found = tuple(x.find() for x in deps)
        return found[0] if len(found) == 1 else found

    def _copy(self) -> None:
        while True:
            with self.condition:
                while not self.pending:
                    if self.stopped:
                        return
                    self.condition.wait(0.05)
            if self.random.random() < 0.3:
                time.sleep(self.random.random() * 1e-3)
            with self.condition:
                source, at, barrier, target = self.pending.pop(self.random.randrange(len(self.pending)))
                inside, of_box = source.box(at)
                target.view.zero_()
                target.view[of_box] = source.tensor[inside]
                barrier.bytes -= target.view.numel() * target.view.element_size()
                barrier.settle(self.condition)


class _Barriers:
    def __init__(self, count: int) -> None:
        self._all = [Barrier() for _ in range(count)]

    def index(self, at: int) -> Barrier:
        assert 0 <= at < len(self._all)
        return self._all[at]


def _of_either(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    def of(x: Any, y: Any) -> Any:
        made = function(torch.as_tensor(x), torch.as_tensor(y))
        return made if made.dim() else Number(made.item())

    return of


def _where(condition: Any, x: Any, y: Any) -> Any:
    if not isinstance(condition, Tensor):
        return x if condition else y
    return torch.where(condition, torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y, dtype=torch.float32))


def _load(pointer: Pointer, mask: Tensor, other: float) -> Tensor:
    at, mask = torch.broadcast_tensors(pointer.at, mask)
    assert not mask.any() or (at[mask].min() >= 0 and at[mask].max() < pointer.tensor.numel())
    found = torch.full(at.shape, other, dtype=pointer.tensor.dtype)
    found[mask] = pointer.tensor.view(-1)[at[mask]]
    return found


def _store(pointer: Pointer, x: Tensor, mask: Tensor) -> None:
    at = pointer.at[mask]
    assert not at.numel() or (at.min() >= 0 and at.max() < pointer.tensor.numel())
    pointer.tensor.view(-1)[at] = x[mask]
