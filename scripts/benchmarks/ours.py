"""The plugin's rotary as benchmarks call it; the one place that knows the kernels' arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scripts.benchmarks.inputs import Inputs

EPS = 1e-5
"""Of QK-norm."""


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """An implementation of the rotary contract: a module with span_rotary and split_span_rotary."""

    module: Any

    @classmethod
    def kernel(cls) -> Rotary:
        """Return the Triton kernels."""
        from megacontext_megatron.kernels import rotary

        return cls(module=rotary)

    @classmethod
    def reference(cls) -> Rotary:
        """Return the same functions in plain PyTorch."""
        from megacontext_megatron.kernels import reference

        return cls(module=reference)

    def fixed_table(self, inputs: Inputs) -> Any:
        """Return the table of Megatron's frequencies."""
        from megacontext_megatron.kernels.rotary_arguments import RotaryTable

        return RotaryTable.fixed(inputs.frequencies)

    def learned_table(self, omega: Tensor) -> Any:
        """Return the table of learnable frequencies [1 or ng, r]."""
        from megacontext_megatron.kernels.rotary_arguments import RotaryTable

        return RotaryTable.learned(omega)

    def rotate(self, given: Mapping[str, Tensor], table: Any) -> tuple[Tensor, Tensor]:
        """Return finished q and k of `query`, `key` and the places in `given`."""
        return self.module.span_rotary(given["query"], given["key"], places(given), table, _options())

    def split(self, given: Mapping[str, Tensor], table: Any, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return finished q, k and v of `mixed`, normalised by `query_weight` and `key_weight`."""
        from megacontext_megatron.kernels.rotary_arguments import QKNorm

        norm = QKNorm(query_weight=given["query_weight"], key_weight=given["key_weight"], eps=EPS)
        return self.module.split_span_rotary(given["mixed"], head_dim, places(given), table, _options(), norm=norm)


def places(given: Mapping[str, Tensor]) -> Any:
    """Return the rows' places: `doubled_centre`, `anchor` and, where present, `sigma` and `offset`."""
    from megacontext_megatron.kernels.rotary_arguments import RowPlaces

    return RowPlaces(
        doubled_centre=given["doubled_centre"],
        sigma=given.get("sigma"),
        offset=given.get("offset"),
        anchor=given["anchor"],
    )


def _options() -> Any:
    from megacontext_megatron.kernels.rotary_arguments import RotaryOptions

    return RotaryOptions()
