"""Adapters alone: out of a checkpoint of any layout, into a model of another, and refused where they do not fit."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megacontext_megatron.adapters import main
from megacontext_megatron.config import ConfigError
from megacontext_megatron.encoding_config import BiasConfig, RetrofitConfig
from megacontext_megatron.retrofit import adapters
from megacontext_megatron.retrofit.adapters import (
    ADAPTER_KEY,
    check_adapters,
    export_adapters,
    load_adapters,
    named_adapters,
    read_adapters,
)
from tests import retrofit_models
from tests.launch import call
from tests.retrofit_models import GROUPS, HEADS, HIDDEN, LAYER, LAYERS, SETTINGS, SIZES

ALIKE = dataclasses.replace(
    SETTINGS,
    retrofit=RetrofitConfig(parts=("slow-bands",)),
    biases=(BiasConfig(name="slow-bands", layers=(1, 2, 3, 4), periods=(50.0, 400.0)),),
)
"""All layers have the same parameters, which Megatron then saves as one tensor each."""

ALIKE_SIZES = {
    LAYER.format(n) + name: size
    for n in range(LAYERS)
    for name, size in {
        "rotary.sigma_scale.log_scale": 2 * GROUPS,
        "log_width_bias.factor": 1,
        "score_biases.slow-bands.amplitude": 2 * HEADS,
    }.items()
}
RUN = {
    **{"num_layers": LAYERS, "hidden_size": HIDDEN, "mc_encoding": "rope", "position_embedding_type": "rope"},
    **{"retrofit": ["alibi-lora", "slow-bands"], "retrofit_lora_rank": 2, "retrofit_lora_length": 16},
    **{"position_bias": ["slow-bands"], "slow_band_periods": [50.0, 400.0], "rope_stretch": 4.0, "rotary_base": 100},
    **{"no_rope_freq": None, "gaussian_rope_learnable_sigma": "head", "train_iters": 7, "data_path": ["/data/x"]},
}
LAYOUTS = [(1, 1), (2, 1), (1, 2)]


def save(folder: str, layout: tuple[int, int], alike: bool) -> list[str]:
    """Save a stage whose adapters are filled by name, as a training does, and return the keys of its own parts."""
    from megatron.core import dist_checkpointing

    retrofit_models.start(*layout)
    model = retrofit_models.build(ALIKE if alike else SETTINGS, hetereogenous_dist_checkpoint=not alike)
    retrofit_models.fill(model)
    path = Path(folder) / "iter_0000007"
    path.mkdir(parents=True, exist_ok=True)
    state = {"args": argparse.Namespace(**RUN), "model": model.sharded_state_dict()}
    dist_checkpointing.save(state, str(path))
    (Path(folder) / "latest_checkpointed_iteration.txt").write_text("7")
    own = set(named_adapters(model))
    assert own == set(retrofit_models.whole_names(model))
    # What tells adapters from the base in a checkpoint, of every parameter of a model.
    for name, _ in model.named_parameters():
        assert bool(ADAPTER_KEY.match(name)) == (name in set(named_locally(model)))
    return sorted(own)


def named_locally(model: Any) -> list[str]:
    """Return the names in a stage of what the plugin adds."""
    ids = {id(parameter) for parameter in named_adapters(model).values()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in ids]


def load(files: list[str], layout: tuple[int, int]) -> list[dict[str, Any]]:
    """Load files into a model of another layout; return the names taken, or the refusal, and what was changed."""
    retrofit_models.start(*layout)
    model = retrofit_models.build()
    outcomes = []
    for file in files:
        before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        try:
            names, refused = load_adapters(model, file), None
        except ConfigError as error:
            names, refused = [], str(error)
        after = model.state_dict()
        for name, parameter in retrofit_models.whole_names(model).items() if not refused else ():
            assert torch.equal(parameter, retrofit_models.value_of(name, parameter.shape)), name
        changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
        outcomes.append({"names": names, "refused": refused, "changed": changed, "own": named_locally(model)})
    return outcomes


def saved(folder: Path, layout: tuple[int, int], *, alike: bool) -> Path:
    """Return the folder of a checkpoint that was saved in a layout."""
    given = {"folder": str(folder / "saved"), "layout": layout, "alike": alike}
    call(save, given, max(layout), workdir=folder / "run").check()
    return folder / "saved"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A file of adapters from a checkpoint of two pipeline stages."""
    folder = tmp_path_factory.mktemp("stages")
    export_adapters(str(saved(folder, (1, 2), alike=False)), folder / "adapters.safetensors")
    return folder / "adapters.safetensors"


def assert_filled(file: Path, sizes: dict[str, int]) -> None:
    """Assert that a file holds all adapters of a whole model, each with its own value, and nothing else."""
    tensors = load_file(file)
    assert {name: tuple(t.shape) for name, t in tensors.items() if "gist_net." not in name} == {
        name: (size,) for name, size in sizes.items()
    }
    assert sum(name.startswith("gist_net.encoder.") for name in tensors) > 5
    for name, tensor in tensors.items():
        assert torch.equal(tensor, retrofit_models.value_of(name, tensor.shape)), name


def test_files_hold_the_adapters_of_all_stages_and_nothing_of_the_base(exported):
    assert_filled(exported, SIZES)


def test_stacked_layers_are_told_apart(tmp_path):
    names = export_adapters(str(saved(tmp_path, (2, 1), alike=True)), tmp_path / "out.safetensors", step=7)
    assert_filled(tmp_path / "out.safetensors", ALIKE_SIZES)
    assert names == sorted(load_file(tmp_path / "out.safetensors"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_go_into_models_of_any_layout(exported, layout, tmp_path):
    given = {"files": [str(exported)], "layout": layout}
    found = [only for [only] in call(load, given, max(layout), workdir=tmp_path).check().values]
    assert set().union(*(rank["names"] for rank in found)) == set(load_file(exported))
    for rank in found:
        assert rank["refused"] is None
        assert set(rank["changed"]) == set(rank["own"])


def changed_file(source: Path, out: Path, **changes: Any) -> Path:
    """Write a file with tensors left out (None), added or replaced."""
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    tensors = {**load_file(source), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, out, metadata)
    return out


BANDS = LAYER.format(3) + "score_biases.slow-bands.amplitude"
SLOPES = LAYER.format(0) + "score_biases.alibi-lora.up"
FAULTS = {
    "lacks": ({BANDS: None}, f"lacks {BANDS}", 1),
    "lacks of the first stage": ({SLOPES: None}, f"lacks {SLOPES}", 0),
    "surplus of a layer": (
        {LAYER.format(2) + "score_biases.slow-bands.amplitude": torch.zeros(8)},
        f"has what this run does not {LAYER.format(2)}score_biases.slow-bands.amplitude",
        1,
    ),
    "surplus of no layer": ({"gist_net.more": torch.zeros(2)}, "has what this run does not gist_net.more", 0),
    "more layers": (
        {LAYER.format(LAYERS) + "log_width_bias.factor": torch.zeros(1)},
        f"has what this run does not {LAYER.format(LAYERS)}log_width_bias.factor",
        0,
    ),
    "shape": ({BANDS: torch.zeros(12)}, f"has in another shape {BANDS} (12,) instead of (8,)", 1),
}


def test_files_that_do_not_fit_are_refused_by_the_stage_concerned(exported, tmp_path):
    files = [changed_file(exported, tmp_path / f"{name}.safetensors", **FAULTS[name][0]) for name in FAULTS]
    given = {"files": list(map(str, files)), "layout": (1, 2)}
    stages = call(load, given, 2, workdir=tmp_path / "run").check().values
    for number, (file, (_, said, stage)) in enumerate(zip(files, FAULTS.values(), strict=True)):
        found = stages[stage][number]
        assert said in found["refused"]
        assert f"--retrofit-adapters {file}" in found["refused"]
        assert "\n" not in found["refused"]
        assert found["changed"] == []


def test_files_that_hold_no_adapters_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--retrofit-adapters .*absent\.safetensors cannot be read"):
        read_adapters(tmp_path / "absent.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_adapters(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="adapters export"):
        read_adapters(tmp_path / "other.safetensors")


def test_settings_are_those_that_adapters_were_trained_with(exported):
    with safe_open(exported, framework="pt") as file:
        [about] = file.metadata().values()
    settings = json.loads(about)["settings"]
    assert json.loads(about)["checkpoint"] == "iter_0000007"
    assert settings == {name: value for name, value in RUN.items() if name not in ("train_iters", "data_path")}


def test_other_settings_are_refused_by_their_flags(exported):
    same = argparse.Namespace(**{**RUN, "train_iters": 9})
    check_adapters(same, exported)
    check_adapters(argparse.Namespace(**{**RUN, "retrofit": ["slow-bands", "alibi-lora"]}), exported)
    other = argparse.Namespace(**{**RUN, "retrofit_lora_length": 32, "slow_band_periods": (50.0, 500.0)})
    with pytest.raises(ConfigError) as refused:
        check_adapters(other, exported)
    assert "--retrofit-lora-length: checkpoint 16, this run 32" in str(refused.value)
    assert "--slow-band-periods: checkpoint [50.0, 400.0], this run [50.0, 500.0]" in str(refused.value)
    assert "rotary" not in str(refused.value)


def test_checkpoints_without_adapters_are_refused(tmp_path, exported, monkeypatch):
    with pytest.raises(ConfigError, match=r"--load .* holds no checkpoint"):
        export_adapters(str(tmp_path), tmp_path / "out.safetensors")
    with pytest.raises(ConfigError, match=r"--out .* cannot be written"):
        export_adapters(str(exported.parent / "saved"), tmp_path / "absent" / "out.safetensors")
    monkeypatch.setattr(adapters, "ADAPTER_KEY", re.compile("lens_net"))
    with pytest.raises(ConfigError, match="iter_0000007 holds no adapters"):
        export_adapters(str(exported.parent / "saved"), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the command says when it refuses."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_the_command_exports_and_shows(exported, tmp_path, capsys):
    out = tmp_path / "mine.safetensors"
    main(["export", "--load", str(exported.parent / "saved"), "--out", str(out)])
    said = capsys.readouterr().out
    assert f"{len(load_file(out))} tensors" in said
    assert str(out) in said
    assert out.read_bytes() == exported.read_bytes()
    main(["show", str(out)])
    said = capsys.readouterr().out
    for name in (BANDS, SLOPES, "retrofit_lora_length: 16", "slow_band_periods: [50.0, 400.0]", "float32"):
        assert name in said
    assert "--load" in refused(["export", "--load", str(tmp_path), "--out", str(out)], capsys)
    assert "cannot be read" in refused(["show", str(tmp_path / "absent")], capsys)
    assert "required" in refused(["export", "--out", str(out)], capsys)


def test_real_checkpoints_with_optimizers_are_read_by_key(small_run, tmp_path):
    """Of a training run: names like those of parameters, states of the optimizer among them."""
    out = tmp_path / "trained.safetensors"
    names = export_adapters(str(small_run.save_dir), out)
    assert names == [f"decoder.layers.{n}.self_attention.rotary.sigma_scale.log_scale" for n in (0, 1)]
    first, second = load_file(out).values()
    assert not torch.equal(first, second)
    earlier = tmp_path / "earlier.safetensors"
    export_adapters(str(small_run.save_dir), earlier, step=2)
    assert not torch.equal(load_file(earlier)[names[0]], first)
