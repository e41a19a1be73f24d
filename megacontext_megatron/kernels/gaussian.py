"""Gaussian RoPE on the span rotary kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megacontext_megatron.config import GaussianRopeConfig
from megacontext_megatron.kernels.rotary import span_rotary, split_span_rotary
from megacontext_megatron.kernels.rotary_arguments import QKNorm, RotaryOptions, RotaryTable, RowPlaces
from megacontext_megatron.kernels.row_rotation import RowRotation
from megacontext_megatron.position.gaussian import GaussianRotary
from megacontext_megatron.spans.metadata import SpanMetadata, carried_places


class FusedGaussianRotary(GaussianRotary):
    """GaussianRotary whose arithmetic is the kernels.rotary launch; same parameters, same checkpoint keys."""

    def __init__(self, config: GaussianRopeConfig, *args: Any, **kwargs: Any) -> None:
        if not config.fusable:
            raise ValueError("the kernel has exact phases and no renormalisation")
        super().__init__(config, *args, **kwargs)
        if not self._frequencies.fusable:
            raise ValueError("the kernel has no factors on cos, sin and queries, and no start window")
        self._options = RotaryOptions(interleaved=self._interleaved, damp_query=config.sides == "qk")
        self._table: RotaryTable | None = None

    def forward(self, query: Tensor, key: Tensor, spans: SpanMetadata) -> tuple[Tensor, Tensor]:
        """Return finished query [s, b, np, hn] and key [s, b, ng, hn]; spans are [s, b]."""
        places = RowPlaces(doubled_centre=spans.doubled_centre, sigma=self.sigma(spans), offset=spans.offset)
        return span_rotary(query, key, places, self._frequency_table(query.device), self._options)

    def split(
        self, mixed: Tensor, head_dim: int, carrier: Tensor, norm: QKNorm | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return finished query, key and value of Megatron's mixed projection [s, b, ng, (np / ng + 2) hn].

        Where sigma is not learned, the kernel reads places from the carrier as it is.
        """
        centre, sigma, offset = carried_places(carrier)
        if self.sigma_scale is not None:
            sigma = self.sigma(SpanMetadata.unpack(carrier))
        elif offset is not None:
            sigma = sigma.float()
        places = RowPlaces(doubled_centre=centre, sigma=sigma, offset=None if offset is None else offset.float())
        return split_span_rotary(mixed, head_dim, places, self._frequency_table(mixed.device), self._options, norm=norm)

    def rotation(self, carrier: Tensor) -> RowRotation:
        """Return what rotates queries and keys inside attention; gives places no gradient."""
        centre, sigma, offset = carried_places(carrier.detach())
        places = RowPlaces(
            doubled_centre=centre, sigma=sigma.float(), offset=None if offset is None else offset.float()
        )
        return RowRotation(places=places, table=self._frequency_table(carrier.device), options=self._options)

    @torch.inference_mode(False)  # a table made in a validation must serve the backward of training
    def _frequency_table(self, device: torch.device) -> RotaryTable:
        if self._table is None or self._table.omega.device != device:
            self._table = RotaryTable.fixed(self._frequencies.to(device))
        return self._table
