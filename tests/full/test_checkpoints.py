"""Checkpoints in torch_dist form: resumed, reloaded in other layouts, missing, and damaged."""

# Faults are planted here by hand, and some libraries export less than they offer.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.launch import TrainResult, call, train
from tests.parity import CP, PP, TP, TP_SP
from tests.small import (
    GRAD_NORM_TOLERANCE,
    LOSS_TOLERANCE,
    MICRO_BATCHES,
    command,
    largest,
    parse_only,
    refusal,
    small_flags,
    small_training,
)

MIDDLE, END = 2, 4
SIGMA = "decoder.layers.self_attention.rotary.sigma_scale.log_scale"
TRACKER = "latest_checkpointed_iteration.txt"

NO_STEP = {
    "train_iters": MIDDLE,
    "save_interval": 1000,
    "eval_iters": 0,
    "use_checkpoint_opt_param_scheduler": True,
}
"""Overrides with which a run loads the checkpoint of the middle and saves it again."""
DIST_OPT = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}


def read_tensors(path: str) -> dict[str, tuple[str, list[int]]]:
    """Return the hash and shape of every tensor in a torch_dist checkpoint, read without Megatron."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {
        key: (hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16], list(value.shape))
        for key, value in state.items()
    }


def tensors(folder: Path, iteration: int, workdir: Path) -> dict[str, list[Any]]:
    """Return what `read_tensors` reads of one iteration in a folder of checkpoints."""
    path = folder / f"iter_{iteration:07d}"
    return call(read_tensors, {"path": str(path)}, workdir=workdir / "read").check().values[0]


def training_rows(result: TrainResult, rank: int = 0) -> list[dict[str, Any]]:
    """Return the rows of a rank's training micro-batches."""
    return result.values[rank]["training"]


@pytest.fixture(scope="module")
def saved(small_run) -> Path:
    """The folder of the small run's checkpoints."""
    return small_run.save_dir


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(small_run, corpus, saved, tmp_path):
    resumed = small_training(corpus, tmp_path, load=saved, ckpt_step=MIDDLE, save=tmp_path / "checkpoints").check()
    assert resumed.losses == small_run.losses[MIDDLE:]
    assert resumed.grad_norms == small_run.grad_norms[MIDDLE:]
    assert training_rows(resumed) == training_rows(small_run)[MIDDLE * MICRO_BATCHES :]
    assert resumed.metrics == small_run.metrics[MIDDLE:]
    assert [line["consumed_samples"] for line in resumed.metrics] == [24, 32]
    for tag in small_run.tags("mc/nll_last"):
        assert resumed.scalars(tag)[-1] == small_run.scalars(tag)[-1]
    expected = tensors(saved, END, tmp_path)
    assert tensors(tmp_path / "checkpoints", END, tmp_path) == expected
    assert expected[SIGMA][1] == [2, 2]
    assert expected[f"optimizer.state.exp_avg.{SIGMA}"][1] == [2, 2]
    assert expected[SIGMA] != tensors(saved, MIDDLE, tmp_path)[SIGMA]


@pytest.mark.full
@pytest.mark.parametrize("there", [TP, TP_SP, PP, CP, {}], ids=["tp", "sp", "pp", "cp", "dp"])
def test_a_checkpoint_survives_another_layout_and_goes_on_there(small_run, corpus, tmp_path, there):
    saved = small_run.save_dir
    whole = tensors(saved, MIDDLE, tmp_path)
    moved, back = tmp_path / "moved", tmp_path / "back"
    small_training(corpus, tmp_path / "there", 2, load=saved, ckpt_step=MIDDLE, save=moved, **NO_STEP, **there).check()
    assert tensors(moved, MIDDLE, tmp_path) == whole
    small_training(corpus, tmp_path / "back", load=moved, save=back, **NO_STEP).check()
    assert tensors(back, MIDDLE, tmp_path) == whole
    on = {"eval_iters": 0}
    there_on = small_training(corpus, tmp_path / "on", 2, load=saved, ckpt_step=MIDDLE, **on, **there).check()
    assert largest(there_on.losses, small_run.losses[MIDDLE:]) <= LOSS_TOLERANCE
    assert largest(there_on.grad_norms, small_run.grad_norms[MIDDLE:]) <= GRAD_NORM_TOLERANCE
    back_on = small_training(corpus, tmp_path / "home", load=back, **on).check()
    assert back_on.losses == small_run.losses[MIDDLE:]


@pytest.mark.full
def test_the_distributed_optimizer_goes_from_data_to_pipeline_ranks_and_back(corpus, tmp_path):
    first, moved, back = (tmp_path / name for name in ("first", "moved", "back"))
    quick = {**DIST_OPT, "eval_iters": 0}
    whole = small_training(corpus, tmp_path / "dp", 2, fresh=True, save=first, **quick).check()
    resumed = small_training(corpus, tmp_path / "dp2", 2, load=first, ckpt_step=MIDDLE, **quick).check()
    assert resumed.losses == whole.losses[MIDDLE:]
    for rank in range(2):
        assert training_rows(resumed, rank) == training_rows(whole, rank)[MIDDLE * MICRO_BATCHES // 2 :]
    in_stages = small_training(corpus, tmp_path / "pp", 2, load=first, ckpt_step=MIDDLE, **quick, **PP).check()
    assert largest(in_stages.losses, whole.losses[MIDDLE:]) <= LOSS_TOLERANCE
    assert largest(in_stages.grad_norms, whole.grad_norms[MIDDLE:]) <= GRAD_NORM_TOLERANCE
    still = {**DIST_OPT, **NO_STEP}
    small_training(corpus, tmp_path / "there", 2, load=first, ckpt_step=MIDDLE, save=moved, **still, **PP).check()
    small_training(corpus, tmp_path / "home", 2, load=moved, save=back, **still).check()
    expected = tensors(first, MIDDLE, tmp_path)
    assert f"optimizer.state.exp_avg.{SIGMA}" in expected
    assert tensors(moved, MIDDLE, tmp_path) == expected
    assert tensors(back, MIDDLE, tmp_path) == expected


@pytest.mark.full
@pytest.mark.parametrize(
    "layout",
    [
        {"use_distributed_optimizer": True},
        {"use_distributed_optimizer": True, "bf16": True},
        {**DIST_OPT, "bf16": True},
        {**DIST_OPT, **PP, "num_layers": 4, "num_layers_per_virtual_pipeline_stage": 1},
        {"bf16": True, **TP_SP},
    ],
    ids=["dp", "dp-half", "reshardable-half", "virtual-stages", "sp-half"],
)
def test_a_layout_resumes_itself_bit_for_bit(corpus, tmp_path, layout):
    quick = {**layout, "eval_iters": 0}
    whole = small_training(corpus, tmp_path / "whole", 2, fresh=True, save=tmp_path / "saved", **quick).check()
    resumed = small_training(corpus, tmp_path / "on", 2, load=tmp_path / "saved", ckpt_step=MIDDLE, **quick).check()
    assert resumed.losses == whole.losses[MIDDLE:]
    assert resumed.grad_norms == whole.grad_norms[MIDDLE:]


@pytest.mark.full
def test_an_optimizer_sharded_over_data_ranks_does_not_load_into_stages(corpus, tmp_path):
    plain = {"use_distributed_optimizer": True, "eval_iters": 0}
    small_training(corpus, tmp_path / "dp", 2, save=tmp_path / "saved", **plain).check()
    result = small_training(corpus, tmp_path / "pp", 2, load=tmp_path / "saved", **plain, **PP, train_iters=6)
    assert result.returncode != 0
    assert "not supported for DistributedOptimizer" in result.error


@pytest.mark.full
def test_finetuning_starts_a_new_run_from_the_weights(small_run, corpus, saved, tmp_path):
    other = {"gaussian_rope_sides": "k", "mc_variants": 4, "micro_batch_size": 4, "mc_source_length": 256}
    start = {"load": saved, "finetune": True, "eval_iters": 0, "train_iters": 2, "save": tmp_path / "tuned"}
    tuned = small_training(corpus, tmp_path, **start, **other).check()
    assert "finetuning with another --gaussian-rope-sides: checkpoint qk, this run k" in tuned.log
    assert [(line["iteration"], line["consumed_samples"]) for line in tuned.metrics] == [(1, 8), (2, 16)]
    # the weights were taken over: an untrained model's loss is far above a trained one's
    assert tuned.losses[0] < small_run.losses[-1] + 0.3 < small_run.losses[0]
    assert len(training_rows(tuned)[0]["start"]) == 4


def test_missing_checkpoints_are_refused(corpus, saved, tmp_path):
    words = {"broken": "soon", "gone": "7", "empty": None, "foreign": "3", "release": "release"}
    broken, gone, empty, foreign, release = (tmp_path / f"at-{name}" for name in words)
    for folder, word in zip((broken, gone, empty, foreign, release), words.values(), strict=True):
        folder.mkdir()
        if word is not None:
            (folder / TRACKER).write_text(word)
    (foreign / "iter_0000003" / "mp_rank_00").mkdir(parents=True)
    nothing = tmp_path / "nothing"
    cases = {
        str(nothing): {"load": nothing},
        str(empty): {"load": empty},
        f"--load {empty}": {"load": empty, "save": empty, "finetune": True},
        f"--load  {empty}": {"load": empty, "save": empty, "use_checkpoint_args": True},
        f"--load   {empty}": {"load": empty, "save": empty, "exit_on_missing_checkpoint": True},
        f"--load    {empty}": {"load": empty, "save": empty, "ckpt_step": 2},
        f"--pretrained-checkpoint {empty}": {"load": nothing, "save": nothing, "pretrained_checkpoint": empty},
        "--ckpt-step 3": {"load": saved, "ckpt_step": 3},
        "--ckpt-step 0": {"load": saved, "ckpt_step": 0},
        "--ckpt-step 5": {"pretrained_checkpoint": saved, "ckpt_step": 5},
        str(broken / TRACKER): {"load": broken},
        str(gone / "iter_0000007"): {"load": gone},
        str(gone / TRACKER): {"pretrained_checkpoint": gone},
        "is not a torch_dist checkpoint": {"load": foreign},
        "--ckpt-step 2": {"load": release, "ckpt_step": 2},
        str(release / "release"): {"load": release},
    }
    outcomes = parse_only([small_flags(corpus, **overrides) for overrides in cases.values()], tmp_path / "work")
    for named, outcome in zip(cases, outcomes, strict=True):
        assert " ".join(named.split()) in refusal(outcome)
    assert not nothing.exists()
    assert not list(empty.iterdir())


def test_a_first_launch_that_saves_where_it_loads_from_is_let_through(corpus, saved, tmp_path):
    own = tmp_path / "own"
    # the working folder may hold checkpoints that no flag names
    (tmp_path / TRACKER).write_text("7")
    first, first_tuned, beside_another = parse_only(
        [
            small_flags(corpus, load=own, save=own),
            small_flags(corpus, load=own, save=own, pretrained_checkpoint=saved),
            small_flags(corpus, pretrained_checkpoint=saved, gaussian_rope_sides="k"),
        ],
        tmp_path,
    )
    assert first["code"] == first_tuned["code"] == beside_another["code"] == 0
    assert f"name {own}, which holds no checkpoint yet: starting a new run" in first["out"]
    assert "starting a new run" not in first_tuned["out"]
    assert "finetuning with another --gaussian-rope-sides" in beside_another["out"]


@pytest.mark.full
def test_a_job_that_loads_from_where_it_saves_starts_then_resumes(small_run, corpus, tmp_path):
    own = {"load": tmp_path / "own", "save": tmp_path / "own", "eval_iters": 0}
    first = small_training(corpus, tmp_path / "1", fresh=True, exit_interval=MIDDLE, **own).check()
    second = small_training(corpus, tmp_path / "2", **own).check()
    assert first.losses + second.losses == small_run.losses
    assert [line["iteration"] for line in second.metrics] == [1, 2, 3, 4]


@pytest.mark.full
def test_a_pretrained_checkpoint_starts_a_run_that_resumes_itself(corpus, saved, tmp_path):
    stopped = {"eval_iters": 0, "exit_interval": MIDDLE}
    tuned = small_training(corpus, tmp_path / "tuned", load=saved, finetune=True, **stopped).check()
    own = {"load": tmp_path / "own", "save": tmp_path / "own", "pretrained_checkpoint": saved, "eval_iters": 0}
    first = small_training(corpus, tmp_path / "1", exit_interval=MIDDLE, **own).check()
    assert len(first.losses) == MIDDLE
    assert first.losses == tuned.losses
    assert [line["consumed_samples"] for line in first.metrics] == [8, 16]
    second = small_training(corpus, tmp_path / "2", **own).check()
    assert [line["iteration"] for line in second.metrics[2:]] == [3, 4]
    other = small_flags(corpus, **{**own, "mc_variants": 1})
    assert "--mc-variants: checkpoint 2, this run 1" in refusal(parse_only([other], tmp_path / "3")[0])


def damage(key: str, how: str) -> None:
    """Let the state that Megatron read from a checkpoint lose a key, or hold it under another name."""
    from megatron.training import checkpointing

    real = checkpointing._load_base_checkpoint

    def damaged(*args: Any, rank0: bool = False, **kwargs: Any) -> Any:
        state, *rest = real(*args, rank0=rank0, **kwargs)
        if not rank0 and state is not None:
            value = state["model"].pop(key)
            if how == "renamed":
                state["model"][key + "_old"] = value
        return state, *rest

    checkpointing._load_base_checkpoint = damaged


def leave_out() -> None:
    """Let the model name no positional parameters to Megatron's checkpoints."""
    from megacontext_megatron.model.gpt import MegaContextGPTModel

    real = MegaContextGPTModel.sharded_state_dict

    def without(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {key: value for key, value in real(self, *args, **kwargs).items() if "log_scale" not in key}

    MegaContextGPTModel.sharded_state_dict = without


@pytest.mark.parametrize("how", ["dropped", "renamed"])
def test_a_lost_positional_parameter_stops_the_run(corpus, saved, tmp_path, how):
    key = "decoder.layers.1.self_attention.rotary.sigma_scale.log_scale"
    flags = small_flags(corpus, load=saved, ckpt_step=MIDDLE)
    result = train(flags, workdir=tmp_path, before=damage, before_kwargs={"key": key, "how": how})
    assert result.returncode != 0
    assert result.error == f"RuntimeError: the checkpoint did not provide the plugin's parameters {key}"
    assert "iteration        3/" not in result.log


@pytest.mark.full
def test_positional_parameters_that_are_not_asked_for_stop_the_run(corpus, saved, tmp_path):
    flags = small_flags(corpus, load=saved, ckpt_step=MIDDLE, no_load_optim=True)
    result = train(flags, workdir=tmp_path, before=leave_out)
    assert result.returncode != 0
    assert "did not provide the plugin's parameters decoder.layers.0." in result.error
    assert "decoder.layers.1." in result.error


@pytest.mark.full
def test_a_checkpoint_that_lacks_positional_parameters_does_not_load(corpus, tmp_path):
    quick = {"no_save_optim": True, "eval_iters": 0}
    flags = small_flags(corpus, save=tmp_path / "saved", **quick)
    train(flags, workdir=tmp_path / "save", before=leave_out).check()
    assert SIGMA not in tensors(tmp_path / "saved", MIDDLE, tmp_path)
    flags = small_flags(corpus, load=tmp_path / "saved", ckpt_step=MIDDLE, **quick)
    result = train(flags, workdir=tmp_path / "load")
    assert result.returncode != 0
    assert "log_scale" in result.log
    assert "iteration        3/" not in result.log


@pytest.mark.full
def test_half_precision_keeps_positional_parameters_exact_through_a_checkpoint(corpus, tmp_path):
    half = {"bf16": True, "eval_iters": 0}
    whole = small_training(corpus, tmp_path / "whole", fresh=True, save=tmp_path / "saved", **half).check()
    resumed = small_training(corpus, tmp_path / "on", load=tmp_path / "saved", ckpt_step=MIDDLE, **half).check()
    assert resumed.losses == whole.losses[MIDDLE:]


@pytest.mark.full
def test_evaluation_refuses_to_run_without_its_checkpoint(tmp_path):
    result = command("evaluate", ["--cpu", "--load", tmp_path / "nothing"], workdir=tmp_path / "work")
    assert result.returncode == 2
    assert f"error: --load {tmp_path / 'nothing'} holds no checkpoint" in result.log
