"""Rotation by frequencies that a layer finds itself, with Gaussian damping by the same frequencies."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from megacontext_megatron.config import GaussianRopeConfig, RotaryConfig
from megacontext_megatron.kernels.rotary_arguments import QKNorm, RotaryOptions, RotaryTable, RowPlaces
from megacontext_megatron.position.contextual import ContextualSteps
from megacontext_megatron.position.frequencies import rotary_frequencies
from megacontext_megatron.position.gaussian import GaussianRotary, LearnableSigma
from megacontext_megatron.position.layer_frequencies import FixedFrequencies
from megacontext_megatron.spans.metadata import SpanMetadata, carried_places

if TYPE_CHECKING:
    from megacontext_megatron.position.clex import ClexFrequencies
    from megacontext_megatron.position.layer_frequencies import GrapeFrequencies


class TableRotary(GaussianRotary):
    """GaussianRotary whose frequencies come from a module, of which each query group may have its own.

    Phases are exact for the frequencies as they are, which damp, too; gradients reach their parameters, counted from
    the middle of the history, which keeps their digits.  With `steps` the place of a row is what position.contextual
    makes of the attention's input, and its spread is stretched by its step.  Nothing but `frequencies`, `steps` and
    `sigma_scale` has parameters.  Raises ValueError for phases that are not exact, for renormalisation, and for a
    frequency rule that does more than set frequencies.
    """

    def __init__(
        self,
        config: GaussianRopeConfig,
        rotary: RotaryConfig,
        frequencies: FixedFrequencies | GrapeFrequencies | ClexFrequencies,
        learnable: LearnableSigma | None = None,
        *,
        steps: ContextualSteps | None = None,
        backend: Literal["torch", "triton"] = "torch",
    ) -> None:
        plain = rotary_frequencies(dataclasses.replace(rotary, by_layer=None))
        if not (config.fusable and plain.fusable):
            raise ValueError("frequencies of a layer's own have exact phases, no renormalisation and no factors")
        super().__init__(config, plain, rotary.interleaved, learnable)
        self.frequencies, self.steps = frequencies, steps
        self._options = RotaryOptions(interleaved=rotary.interleaved, damp_query=config.sides == "qk")
        self._doubled_middle = rotary.length
        self._fixed: RotaryTable | None = None
        if backend == "triton":
            # Triton is not everywhere that PyTorch is.
            from megacontext_megatron.kernels.rotary import span_rotary, split_span_rotary
        else:
            from megacontext_megatron.kernels.reference import span_rotary, split_span_rotary
        self._rotate, self._split = span_rotary, split_span_rotary

    def forward(
        self, query: Tensor, key: Tensor, spans: SpanMetadata, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return finished query [s, b, np, hn] and key [s, b, ng, hn]; spans are [s, b].

        `hidden` [s, b, h] is the attention's input, without which contextual places raise RuntimeError.
        """
        return self._rotate(query, key, self._places(spans, hidden), self._table(query.device), self._options)

    def split(
        self,
        mixed: Tensor,
        head_dim: int,
        carrier: Tensor,
        norm: QKNorm | None = None,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return finished query, key and value of Megatron's mixed projection [s, b, ng, (np / ng + 2) hn].

        Where neither sigma nor places are learned, places are read from the carrier as it is.
        """
        if self.sigma_scale is None and self.steps is None:
            centre, sigma, offset = carried_places(carrier)
            if offset is not None:
                sigma, offset = sigma.float(), offset.float()
            places = RowPlaces(doubled_centre=centre, sigma=sigma, offset=offset, anchor=self._middle(centre))
        else:
            places = self._places(SpanMetadata.unpack(carrier), hidden)
        return self._split(mixed, head_dim, places, self._table(mixed.device), self._options, norm=norm)

    def _places(self, spans: SpanMetadata, hidden: Tensor | None) -> RowPlaces:
        sigma, centre = self.sigma(spans), spans.doubled_centre
        if self.steps is None:
            return RowPlaces(doubled_centre=centre, sigma=sigma, offset=spans.offset, anchor=self._middle(centre))
        if hidden is None:
            raise RuntimeError("contextual places need the attention's input")
        found = self.steps(hidden, spans)
        return RowPlaces(
            doubled_centre=found.doubled_centre,
            sigma=sigma * found.step.unsqueeze(-1),
            offset=found.offset,
            anchor=found.anchor,
        )

    def _middle(self, centre: Tensor) -> Tensor:
        """Return the doubled centre of the history, int64 [b]: equal on all ranks, whichever rows they hold."""
        return torch.full(centre.shape[1:], self._doubled_middle, dtype=torch.int64, device=centre.device)

    @torch.inference_mode(False)  # a table made in a validation must serve the backward of training
    def _fixed_table(self, device: torch.device) -> RotaryTable:
        if self._fixed is None or self._fixed.omega.device != device:
            self._fixed = RotaryTable.learned(self.frequencies(device))
        return self._fixed

    def _table(self, device: torch.device) -> RotaryTable:
        if isinstance(self.frequencies, FixedFrequencies):
            return self._fixed_table(device)
        return RotaryTable.learned(self.frequencies(device))
