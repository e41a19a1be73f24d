"""CLEX: rotary frequencies moved by a learned ordinary differential equation in the ratio of lengths."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from megacontext_megatron.encoding_config import ClexConfig
from megacontext_megatron.position.parameters import PositionalParameters, SumOverRanks


class ClexFrequencies(PositionalParameters):
    """CLEX (Chen et al. 2023, 2310.16450, section 3): log-frequencies y at t = ceil(length / original length).

    dy/dt = act((y + ln ntk(t)) W_up) W_down + d ln ntk(t) / dt, from y(1) = ln ntk(1) = ln omega, where ntk(t) is
    static NTK scaling by 2 t - 1: pair i of r has omega_i (2 t - 1)^(-i / (r - 1)).  t is at least 1 and at most
    `max_t`.  What is integrated is y - ln ntk, so that with W_down = 0, as it starts, the frequencies are those of
    static NTK without any error of integration.

    Parameters `up` [r m] and `down` [m r] are W_up and W_down by rows, m = hidden_factor 2 r.  W_up starts uniform in
    +-1 / sqrt(m), as in the authors' code, the same on all ranks.
    """

    def __init__(
        self, config: ClexConfig, length: int, omega: Tensor, sum_over_ranks: SumOverRanks, *, seed: int = 0
    ) -> None:
        super().__init__(sum_over_ranks)
        pairs = len(omega)
        self._hidden = max(1, round(config.hidden_factor * 2 * pairs))
        self.t = max(1, min(config.max_t, math.ceil(length / config.original_length)))
        self._activation = functional.silu if config.activation == "silu" else torch.tanh
        self._steps = math.ceil((self.t - 1) / config.step - 1e-6)
        self._scaling = self._ntk_scaling(omega)
        self.up, self.down = (self.new_parameter(pairs * self._hidden) for _ in "ab")
        source = torch.Generator().manual_seed(seed)
        uniform = torch.rand(pairs * self._hidden, generator=source, dtype=torch.float64, device="cpu")
        self.up.data += ((2 * uniform - 1) / math.sqrt(self._hidden)).to(self.up)

    @torch.inference_mode(False)  # tables made or moved in a validation must serve the backward of training
    def _ntk_scaling(self, omega: Tensor) -> Tensor:
        """Return ln ntk at the four places of each step's stages and at t, float64 [4 steps + 1, r]."""
        width = (self.t - 1) / max(1, self._steps)
        places = [1 + width * (step + stage / 3) for step in range(self._steps) for stage in range(4)]
        times = torch.tensor([*places, float(self.t)], dtype=torch.float64, device="cpu")
        exponents = torch.arange(len(omega), dtype=torch.float64, device="cpu") / max(1, len(omega) - 1)
        return omega.cpu().double().log() - (2 * times - 1).log().unsqueeze(1) * exponents

    @torch.inference_mode(False)
    def _move(self, device: torch.device) -> None:
        self._scaling = self._scaling.to(device)

    def forward(self, device: torch.device) -> Tensor:
        """Return omega at t, fp32 [1, r] in radians per token, computed in float64, which autocast leaves alone."""
        self._move(device)
        up = self.shared(self.up).double().view(-1, self._hidden)
        down = self.shared(self.down).double().view(self._hidden, -1)
        return (self._scaling[-1] + self._difference(up, down)).exp().float().unsqueeze(0)

    def _difference(self, up: Tensor, down: Tensor) -> Tensor:
        """Return y - ln ntk at t, float64 [r], by Kutta's 3/8 rule: torchdiffeq's "rk4"."""
        width = (self.t - 1) / max(1, self._steps)
        driven = (2 * self._scaling[:-1]) @ up
        # At t = 1 both parameters still get a gradient, which Megatron waits for: zeros.
        moved = 0.0 * (up.sum() + down.sum()) + torch.zeros_like(self._scaling[-1])
        for stages in driven.view(self._steps, 4, self._hidden).unbind(0):
            first = self._rate(moved, stages[0], up, down)
            second = self._rate(moved + first * (width / 3), stages[1], up, down)
            third = self._rate(moved + (second - first / 3) * width, stages[2], up, down)
            fourth = self._rate(moved + (first - second + third) * width, stages[3], up, down)
            moved = moved + (first + 3 * (second + third) + fourth) * (width / 8)
        return moved

    def _rate(self, moved: Tensor, driven: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """Return the derivative of y - ln ntk; `driven` is 2 ln ntk W_up."""
        return self._activation(torch.addmv(driven, up.t(), moved)) @ down
