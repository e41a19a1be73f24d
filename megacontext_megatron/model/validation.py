"""Megatron's own checks of a loss: not a number, infinite, or unexpectedly large."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from torch import Tensor

SPIKY_LOSS_FACTOR = 10
"""How many times the usual loss counts as unexpectedly large, as in Megatron's pretrain_gpt.py."""


def loss_checks(*, not_finite: bool, spiky: bool) -> Callable[[Tensor], None]:
    """Return what validates a micro-batch's loss, a scalar, through Megatron's rerun state machine.

    `not_finite` is `--check-for-nan-in-loss-and-grad` (on by default), `spiky` is `--check-for-spiky-loss`.  The
    check raises RuntimeError for a loss that is not finite.
    """

    def check(loss: Tensor) -> None:
        machine = get_rerun_state_machine()
        rejections: list[tuple[str, Callable[[Any], Any], bool]] = []
        if not_finite:
            rejections += [("found NaN in the loss", torch.isnan, True), ("found Inf in the loss", torch.isinf, True)]
        if spiky:
            large = partial(machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss")
            rejections.append(("Spiky loss", large, False))
        for message, rejects, fatal in rejections:
            # The forward pass is deterministic, so a rerun must give the same loss.
            machine.validate_result(result=loss, rejection_func=rejects, message=message, tolerance=0.0, fatal=fatal)

    return check
