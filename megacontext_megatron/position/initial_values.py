"""Initial values of learnable positions: the same on every rank, whatever was drawn before."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialValues:
    """Draws values that depend on the run's `seed`, the `layer` (counted from 1) and a name, and on nothing else."""

    seed: int
    layer: int

    def normal(self, name: str, size: int, std: float) -> Tensor:
        """Return fp32 [size] of the normal distribution around 0, on the CPU."""
        return std * torch.randn(size, generator=self._generator(name), dtype=torch.float32, device="cpu")

    def uniform(self, name: str, size: int, bound: float) -> Tensor:
        """Return fp32 [size], evenly distributed between -bound and bound, on the CPU."""
        return bound * (2 * torch.rand(size, generator=self._generator(name), dtype=torch.float32, device="cpu") - 1)

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{self.layer}/{name}".encode()).digest()
        return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:7], "big"))
