"""Adapters alone: taken out of a checkpoint into one safetensors file, and put into a model of any layout.

A tensor's name is that of the parameter in a model without pipelining, `decoder.layers.N.…` with N from 0 over all
layers.  Positional parameters and GistNet are whole on every tensor-parallel rank, so no tensor is cut.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megacontext_megatron.config import ConfigError
from megacontext_megatron.model.gpt import plugin_parameters
from megacontext_megatron.retrofit.checkpoint import (
    CONTEXT_SETTINGS,
    ENCODING_SETTINGS,
    GAUSSIAN_SETTINGS,
    GIST_SETTINGS,
    MODEL_SETTINGS,
    PATTERN_SETTINGS,
    RETROFIT_SETTINGS,
    ROTARY_SETTINGS,
    Difference,
    saved_run,
)

ADAPTER_KEY = re.compile(
    r"gist_net\.|places\.|decoder\.layers\.(?:\d+\.)?self_attention\.(?:rotary|log_width_bias|score_biases)\."
)
"""How the names of the plugin's parameters begin in a checkpoint."""

FIXED = (
    *(*MODEL_SETTINGS, *ROTARY_SETTINGS, *PATTERN_SETTINGS, *GAUSSIAN_SETTINGS, *CONTEXT_SETTINGS, *GIST_SETTINGS),
    *(*ENCODING_SETTINGS, *RETROFIT_SETTINGS, "mc_encoding", "position_embedding_type"),
)
"""Arguments that fix what adapters are made for."""

METADATA = "megacontext_megatron"
"""The one key of a file's metadata: of several the library would write in any order."""


def export_adapters(folder: str, out: Path, step: int | None = None) -> list[str]:
    """Write the adapters of a torch_dist checkpoint in `folder` to a safetensors file and return their names.

    No model is built.  The settings they were trained with lie in the file's metadata as JSON.  Raises ConfigError
    where there is no checkpoint or nothing of the plugin in it, or where the file cannot be written.
    """
    saved = saved_run(folder, step)
    if saved is None:
        raise ConfigError(f"--load {folder} holds no checkpoint.")
    tensors = _by_layer(_stored(saved.path), saved.args.num_layers)
    if not tensors:
        raise ConfigError(f"{saved.path} holds no adapters: it was trained without any of the plugin's parameters.")
    about = {"checkpoint": saved.path.name, "settings": adapter_settings(saved.args)}
    try:
        save_file(tensors, out, {METADATA: json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--out {out} cannot be written ({error}): name a file in a folder that exists.") from error
    return sorted(tensors)


def _stored(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the plugin in a torch_dist checkpoint, by their keys there."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(str(path))
    state: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and ADAPTER_KEY.match(key)
    }
    if state:
        with warnings.catch_warnings():
            # That nothing is distributed, which is what was asked for.
            warnings.simplefilter("ignore")
            load(state, storage_reader=reader, no_dist=True)
    return state


def _by_layer(stored: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Return tensors by name with the layer's number; where layers are alike a checkpoint stacks them in one."""
    found: dict[str, Tensor] = {}
    for key, value in stored.items():
        if not key.startswith("decoder.layers.self_attention."):
            found[key] = value
            continue
        rest = key.removeprefix("decoder.layers.")
        assert value.shape[0] == layers, f"{key} {tuple(value.shape)} is not one tensor of each of {layers} layers"
        found |= {f"decoder.layers.{number}.{rest}": each.clone() for number, each in enumerate(value)}
    return found


def adapter_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that fix what adapters are made for, by name, as JSON has them."""
    values = {name: value for name, value in vars(args).items() if name in FIXED}
    return json.loads(json.dumps(dict(sorted(values.items())), default=str))


def read_adapters(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of an exported file on the CPU, and the settings they were trained with.

    Raises ConfigError for a file that is not there, or was not exported.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = (file.metadata() or {}).get(METADATA)
            if about is None:
                raise ConfigError(
                    f"{path} holds no adapters: export them with python -m megacontext_megatron.adapters export."
                )
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(about)["settings"]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--retrofit-adapters {path} cannot be read ({error}).") from error


def check_adapters(args: argparse.Namespace, path: Path | str) -> None:
    """Refuse adapters that were trained with other settings than a run's; raises ConfigError naming the flags."""
    _, trained = read_adapters(path)
    asked = adapter_settings(args)
    found = [
        Difference(name=name, saved=trained[name], asked=asked[name])
        for name in sorted(trained.keys() & asked.keys())
        if _comparable(trained[name]) != _comparable(asked[name])
    ]
    if found:
        listed = "; ".join(str(difference) for difference in found)
        raise ConfigError(f"--retrofit-adapters {path} were trained with other settings ({listed}): use the same.")


def _comparable(value: Any) -> Any:
    """Return a setting without the order of names in it, which says nothing."""
    names = isinstance(value, list) and all(isinstance(each, str) for each in value)
    return sorted(value) if names else value


def load_adapters(model: torch.nn.Module, path: Path | str) -> list[str]:
    """Put an exported file's tensors into a model's plugin parameters and return the names taken.

    `model` is one stage, or virtual chunk, of any layout, before an optimizer copies its parameters.  Every plugin
    parameter must be in the file with its shape, and everything in the file must have its place in the model, or belong
    to another stage.  Raises ConfigError otherwise, with nothing changed.
    """
    tensors, _ = read_adapters(path)
    wanted = named_adapters(model)
    absent = sorted(wanted.keys() - tensors.keys())
    surplus = sorted(name for name in tensors.keys() - wanted.keys() if _belongs_here(name, model))
    shaped = sorted(
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(parameter.shape)}"
        for name, parameter in wanted.items()
        if name in tensors and tensors[name].shape != parameter.shape
    )
    wrong = {"lacks": absent, "has what this run does not": surplus, "has in another shape": shaped}
    if any(wrong.values()):
        listed = "; ".join(f"{how} {', '.join(names)}" for how, names in wrong.items() if names)
        raise ConfigError(
            f"--retrofit-adapters {path} {listed}: give the flags that its adapters were trained with "
            "(python -m megacontext_megatron.adapters show prints them)."
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    return sorted(wanted)


def named_adapters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the plugin's parameters of a stage by the names that they have in a model without pipelining."""
    own = {id(parameter) for parameter in plugin_parameters(model).values()}
    # A parameter that layers share has a name, and in the file a tensor, for each.
    named = model.named_parameters(remove_duplicate=False)
    return {_whole_name(name, model): parameter for name, parameter in named if id(parameter) in own}


def _whole_name(name: str, model: torch.nn.Module) -> str:
    found = re.match(r"decoder\.layers\.(\d+)\.", name)
    if found is None:
        return name
    layer = cast(Any, model).decoder.layers[int(found[1])].layer_number - 1
    return f"decoder.layers.{layer}.{name[found.end() :]}"


def _belongs_here(name: str, model: torch.nn.Module) -> bool:
    """Return whether a tensor's place would be in this stage: in one of its layers, in front of them, or in none."""
    stage = cast(Any, model)
    found = re.match(r"decoder\.layers\.(\d+)\.", name)
    if found is None:
        return bool(stage.pre_process)
    number = int(found[1])
    here = {layer.layer_number - 1 for layer in stage.decoder.layers}
    return number in here or number >= stage.config.num_layers
