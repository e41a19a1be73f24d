"""Run Megatron's training loop without a GPU, with gloo, in real processes (`--cpu`).

Megatron 0.19 asks for CUDA in places that have a plain CPU answer; each part below gives one of them.  Nothing is
changed on a machine with a GPU unless `--cpu` was given, and nothing about the arithmetic of the model.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_MARK = "_megacontext_cpu"


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


class CudaMeansCpu(TorchFunctionMode):
    """Reads requests for a CUDA device in torch calls as requests for the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` with its device arguments rewritten."""
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Gradient clipping recognises tensors by the name of their CUDA type.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _Stream:
    """A stream on which everything has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        pass

    def wait_event(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class _Event:
    """An event that has already been reached."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def _devices() -> str:
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    CudaMeansCpu().__enter__()
    return "devices: 'cuda' means the CPU"


def _streams() -> str:
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event  # type: ignore[misc,assignment]
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: _Stream()  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment]
    return "streams and events: everything has already happened"


def _random_state() -> str:
    import megatron.core.tensor_parallel.random as parallel_random

    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()  # type: ignore[assignment,misc]
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)  # type: ignore[assignment]
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment,return-value]
    parallel_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    parallel_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    class ExpectedChange(logging.Filter):
        """Drops the warning that the CPU's random state changed, which here it must."""

        def filter(self, record: logging.LogRecord) -> bool:
            return "CPU RNG state changed" not in record.getMessage()

    logging.getLogger(parallel_random.__name__).addFilter(ExpectedChange())
    return "random state: the CPU generator stands for the CUDA one"


def _expert_splits() -> str:
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher.maybe_move_tensor_to_cpu = to_host
    return "expert parallelism: split sizes are read from the CPU tensors"


def _architecture() -> str:
    import megatron.training.arguments as arguments

    arguments.get_device_arch_version = lambda: 9
    return "argument validation: the device architecture is not asked for"


def _initialization() -> str:
    import megatron.training.training as training

    real = training.initialize_megatron

    @functools.wraps(real)
    def with_a_device(*args: Any, **kwargs: Any) -> Any:
        with pretended_device():
            return real(*args, **kwargs)

    training.initialize_megatron = with_a_device
    return "initialize_megatron: sees one device, so that it sets up groups and seeds"


@contextlib.contextmanager
def pretended_device() -> Iterator[None]:
    """Let Megatron's initialisation see one device; it skips process groups and seeds where it counts none."""
    names = ("is_available", "device_count", "set_device")
    saved = {name: getattr(torch.cuda, name) for name in names}
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda device: None
    try:
        yield
    finally:
        for name, function in saved.items():
            setattr(torch.cuda, name, function)


def install() -> list[str]:
    """Put every part in place, once; returns one sentence for each."""
    if hasattr(torch.cuda, _MARK):
        return list(getattr(torch.cuda, _MARK))
    parts = (_devices, _streams, _random_state, _expert_splits, _architecture, _initialization)
    said = [part() for part in parts]
    setattr(torch.cuda, _MARK, tuple(said))
    return said
