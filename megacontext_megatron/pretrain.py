"""The command: `torchrun … -m megacontext_megatron.pretrain` with Megatron's flags and the plugin's.

Nothing heavy is imported before `main` runs: a run without a GPU must set its environment before torch is loaded, and
helper processes of the checkpoint writer import this file again.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from megacontext_megatron.argv import CPU_FLAG, normalised, prepare_environment, wants_plugin
from megacontext_megatron.config import ConfigError

if TYPE_CHECKING:
    from megacontext_megatron.config import Settings

__all__ = ["main", "wants_plugin"]


def prepare(argv: Sequence[str]) -> None:
    """Make `sys.argv` what Megatron's parsers accept, and adapt what must be adapted; idempotent."""
    words = normalised(argv)
    sys.argv = [sys.argv[0], *words]
    prepare_environment(words)
    _load_transformer_engine(on_cpu=CPU_FLAG in words)
    if CPU_FLAG in words:
        from megacontext_megatron import cpu

        cpu.install()
    from megacontext_megatron import startup

    startup.install()


def _load_transformer_engine(*, on_cpu: bool) -> None:
    """Import the package that Megatron imports in every run, if it is there; raises ConfigError if it is broken."""
    if on_cpu:
        # Its kernels, which Megatron's optimizers would pick up, need a GPU.
        sys.modules.setdefault("transformer_engine", None)  # pyright: ignore[reportArgumentType]
        return
    if find_spec("transformer_engine") is None:
        return
    try:
        import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"Transformer Engine is installed and cannot be loaded ({error}): repair or uninstall it; Megatron imports "
            "it in every run."
        ) from error


def exit_with(error: ConfigError) -> None:
    """Print a refused request once per node, as argparse does, and leave with its exit code."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        where = "" if os.environ.get("RANK", "0") == "0" else f" (rank {os.environ['RANK']})"
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, build the settings, and hand over to Megatron's pretrain()."""
    started = time.time()
    try:
        prepare(sys.argv[1:] if argv is None else argv)
        from megacontext_megatron.run import parse

        args, settings = parse()
    except ConfigError as error:
        exit_with(error)
        return
    _train(args, settings, started)


def _train(args: Any, settings: Settings, started: float) -> None:
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megacontext_megatron.run import Run

    set_startup_timestamps(program_start=started, main_entry=time.time())
    run = Run(args, settings)
    with warnings.catch_warnings():
        # Megatron recommends its own model configs, which cannot build another model class.
        warnings.simplefilter("ignore")
        container = pretrain_cfg_container_from_args(args, None)
    try:
        pretrain(
            cfg_container=container,
            train_valid_test_dataset_provider=run.datasets,
            model_type=ModelType.encoder_or_decoder,
            forward_step_func=run.forward_step,
            model_provider=run.model_provider,
        )
    finally:
        run.finish()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
