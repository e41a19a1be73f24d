"""The process groups of this rank, with the type Megatron's accessors leave open."""

from __future__ import annotations

from typing import cast

from megatron.core import mpu
from torch.distributed import ProcessGroup


def tensor_parallel_group() -> ProcessGroup:
    """Return the group over which heads are split."""
    return cast(ProcessGroup, mpu.get_tensor_model_parallel_group())


def pipeline_group() -> ProcessGroup:
    """Return the group of this rank's pipeline stages."""
    return cast(ProcessGroup, mpu.get_pipeline_model_parallel_group())


def row_group() -> ProcessGroup:
    """Return the group over which rows are split: data parallel and context parallel together."""
    return cast(ProcessGroup, mpu.get_data_parallel_group(with_context_parallel=True))
