"""Checkpoints of learned gists: resumed, reloaded in other layouts, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.full.test_checkpoints import (
    CP,
    DIST_OPT,
    END,
    MIDDLE,
    NO_STEP,
    PP,
    TP,
    TP_SP,
    damage,
    tensors,
    training_rows,
)
from tests.launch import TrainResult, train
from tests.small import (
    GRAD_NORM_TOLERANCE,
    LOSS_TOLERANCE,
    TOKENS_ONLY,
    largest,
    parse_only,
    refusal,
    small_flags,
    small_training,
)

GISTNET: dict[str, Any] = {
    "mc_gist_kind": "gistnet",
    "mc_gist_hidden_size": 16,
    "mc_loss_advantage": 0.5,
    "mc_loss_gist_rows": 0.5,
}
MOVING = {**GISTNET, "mc_gist_span_head": True}
SLOT = {**GISTNET, "mc_gist_pooling": "slot"}
WEIGHT = "gist_net.encoder.answer.weight"
OTHER_SHAPES = {
    "--mc-gist-kind": ({"mc_gist_kind": None, "mc_gist_hidden_size": None}, "gistnet", "mean"),
    "--mc-gist-layers": ({"mc_gist_layers": 3}, "2", "3"),
    "--mc-gist-hidden-size": ({"mc_gist_hidden_size": None}, "16", "32"),
    "--mc-gist-pooling": ({"mc_gist_pooling": "slot"}, "mean", "slot"),
    "--mc-gist-span-head": ({"mc_gist_span_head": True}, "False", "True"),
    "--mc-block-size": ({"mc_block_size": 16, "mc_source_length": 768}, "8", "16"),
}
"""Overrides, what the checkpoint has, and what the run asks for."""


@pytest.fixture(scope="module")
def through(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The small run with GistNet, uninterrupted, with checkpoints at its middle and its end."""
    folder = tmp_path_factory.mktemp("gistnet")
    return small_training(corpus, folder, fresh=True, save=folder / "checkpoints", **GISTNET).check()


@pytest.fixture(scope="module")
def means(small_run: TrainResult) -> Path:
    """The folder of the checkpoints of a run with mean gists."""
    assert small_run.save_dir is not None
    return small_run.save_dir


def weights(stored: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return what a checkpoint holds of GistNet: its weights and the state of their optimizer."""
    return {key: value for key, value in stored.items() if "gist_net." in key}


@pytest.mark.full
@pytest.mark.parametrize("flags", [GISTNET, MOVING, SLOT], ids=["gistnet", "span head", "slot"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    corpus: Path, tmp_path: Path, flags: dict[str, Any]
) -> None:
    whole = small_training(corpus, tmp_path / "whole", fresh=True, save=tmp_path / "saved", **flags).check()
    again = {"load": tmp_path / "saved", "ckpt_step": MIDDLE, "save": tmp_path / "again"}
    resumed = small_training(corpus, tmp_path / "on", **again, **flags).check()
    assert resumed.losses == whole.losses[MIDDLE:]
    assert resumed.grad_norms == whole.grad_norms[MIDDLE:]
    assert resumed.metrics == whole.metrics[MIDDLE:]
    expected = tensors(tmp_path / "saved", END, tmp_path)
    assert tensors(tmp_path / "again", END, tmp_path) == expected
    found, earlier = weights(expected), weights(tensors(tmp_path / "saved", MIDDLE, tmp_path))
    assert found[WEIGHT][1] == found[f"optimizer.state.exp_avg.{WEIGHT}"][1] == [32, 16]
    assert not [key for key in found if found[key] == earlier[key]]


@pytest.mark.full
@pytest.mark.parametrize("there", [TP, TP_SP, PP, CP, {}], ids=["tp", "sp", "pp", "cp", "dp"])
def test_a_checkpoint_survives_another_layout_and_goes_on_there(
    through: TrainResult, corpus: Path, tmp_path: Path, there: dict[str, Any]
) -> None:
    assert through.save_dir is not None
    whole = tensors(through.save_dir, MIDDLE, tmp_path)
    assert WEIGHT in whole
    start: dict[str, Any] = {"load": through.save_dir, "ckpt_step": MIDDLE, **GISTNET}
    moved, back = tmp_path / "moved", tmp_path / "back"
    small_training(corpus, tmp_path / "there", 2, **{"save": moved, **start, **NO_STEP, **there}).check()
    assert tensors(moved, MIDDLE, tmp_path) == whole
    small_training(corpus, tmp_path / "home", load=moved, save=back, **NO_STEP, **GISTNET).check()
    assert tensors(back, MIDDLE, tmp_path) == whole
    there_on = small_training(corpus, tmp_path / "on", 2, **{"eval_iters": 0, **start, **there}).check()
    assert largest(there_on.losses, through.losses[MIDDLE:]) <= LOSS_TOLERANCE
    assert largest(there_on.grad_norms, through.grad_norms[MIDDLE:]) <= GRAD_NORM_TOLERANCE
    back_on = small_training(corpus, tmp_path / "home on", load=back, eval_iters=0, **GISTNET).check()
    assert back_on.losses == through.losses[MIDDLE:]


@pytest.mark.full
def test_the_distributed_optimizer_takes_it_from_data_to_pipeline_ranks_and_back(corpus: Path, tmp_path: Path) -> None:
    first, moved, back = (tmp_path / name for name in ("first", "moved", "back"))
    sharded = {**DIST_OPT, **GISTNET, "eval_iters": 0}
    whole = small_training(corpus, tmp_path / "whole", 2, fresh=True, save=first, **sharded).check()
    start: dict[str, Any] = {"load": first, "ckpt_step": MIDDLE}
    in_stages = small_training(corpus, tmp_path / "on", 2, **{**start, **sharded, **PP}).check()
    assert largest(in_stages.losses, whole.losses[MIDDLE:]) <= LOSS_TOLERANCE
    assert largest(in_stages.grad_norms, whole.grad_norms[MIDDLE:]) <= GRAD_NORM_TOLERANCE
    still = {**sharded, **NO_STEP}
    small_training(corpus, tmp_path / "there", 2, **{"save": moved, **start, **still, **PP}).check()
    small_training(corpus, tmp_path / "home", 2, load=moved, save=back, **still).check()
    expected = tensors(first, MIDDLE, tmp_path)
    assert f"optimizer.state.exp_avg.{WEIGHT}" in expected
    assert tensors(moved, MIDDLE, tmp_path) == expected
    assert tensors(back, MIDDLE, tmp_path) == expected


@pytest.mark.full
@pytest.mark.parametrize(
    "layout",
    [
        {"use_distributed_optimizer": True, "bf16": True},
        {"bf16": True, **TP_SP},
        {"use_distributed_optimizer": True, **TP_SP, **MOVING},
    ],
    ids=["dp-half", "sp-half", "sp-moving"],
)
def test_a_layout_resumes_itself_bit_for_bit(corpus: Path, tmp_path: Path, layout: dict[str, Any]) -> None:
    quick = {**GISTNET, **layout, "eval_iters": 0}
    whole = small_training(corpus, tmp_path / "whole", 2, fresh=True, save=tmp_path / "saved", **quick).check()
    resumed = small_training(corpus, tmp_path / "on", 2, load=tmp_path / "saved", ckpt_step=MIDDLE, **quick).check()
    assert resumed.losses == whole.losses[MIDDLE:]
    assert resumed.grad_norms == whole.grad_norms[MIDDLE:]


@pytest.mark.full
def test_a_curriculum_goes_on_where_it_was(corpus: Path, tmp_path: Path) -> None:
    """In the middle of a stage and at the beginning of one, without any state of its own."""
    grown = {**GISTNET, "mc_curriculum": ["0:128", "8:256", "24:512"], "eval_iters": 0}
    whole = small_training(corpus, tmp_path / "whole", fresh=True, save=tmp_path / "saved", **grown).check()
    resumed = small_training(corpus, tmp_path / "on", load=tmp_path / "saved", ckpt_step=MIDDLE, **grown).check()
    assert resumed.losses == whole.losses[MIDDLE:]
    batches = len(training_rows(whole)) // END
    assert training_rows(resumed) == training_rows(whole)[MIDDLE * batches :]
    covered = [min(start[0] for start in rows["start"][1::2]) for rows in training_rows(whole)]
    assert [512 - first for first in covered[::batches]] == [
        pytest.approx(tokens, abs=7) for tokens in (128, 256, 256, 512)
    ]


@pytest.mark.full
def test_a_resume_with_another_gistnet_is_refused_by_the_name_of_each(
    through: TrainResult, corpus: Path, tmp_path: Path
) -> None:
    """With --finetune as well, but for mean gists, which need no weights."""
    common = {**GISTNET, "load": through.save_dir}
    cases = [{**common, **overrides} for overrides, _, _ in OTHER_SHAPES.values()]
    lines = [small_flags(corpus, **case, **more) for more in ({}, {"finetune": True}) for case in cases]
    outcomes = parse_only(lines, tmp_path)
    for number, (flag, (_, was, now)) in enumerate(OTHER_SHAPES.items()):
        difference = f"{flag}: checkpoint {was}, this run {now}"
        assert difference in refusal(outcomes[number])
        tuned = outcomes[len(OTHER_SHAPES) + number]
        if flag == "--mc-gist-kind":
            assert tuned["code"] == 0, tuned["err"]
            assert f"finetuning with another {difference}" in tuned["out"]
        else:
            assert difference in refusal(tuned)


@pytest.mark.full
def test_checkpoints_of_mean_gists_have_no_gistnet_to_load(means: Path, corpus: Path, tmp_path: Path) -> None:
    lines = [small_flags(corpus, load=means, **GISTNET, **more) for more in ({}, {"finetune": True})]
    for outcome in parse_only(lines, tmp_path):
        assert "--mc-gist-kind: checkpoint mean, this run gistnet" in refusal(outcome)


@pytest.mark.full
def test_checkpoint_arguments_restore_gistnet(through: TrainResult, corpus: Path, tmp_path: Path) -> None:
    """Without a word of it on the command line; what is typed stays, and is refused where it differs."""
    again = {"load": through.save_dir, "use_checkpoint_args": True}
    # The objective is no property of a checkpoint.
    losses = {name: value for name, value in GISTNET.items() if name.startswith("mc_loss_")}
    lines = [small_flags(corpus, **again, **losses, **more) for more in ({}, {"mc_gist_pooling": "slot"})]
    restored, typed = parse_only([*lines, small_flags(corpus, **GISTNET)], tmp_path)[:2]
    [expected] = parse_only([small_flags(corpus, **GISTNET)], tmp_path)
    assert restored["code"] == 0, restored["err"]
    assert restored["settings"] == expected["settings"]
    assert "--mc-gist-pooling: checkpoint mean, this run slot" in refusal(typed)


@pytest.mark.full
@pytest.mark.parametrize("how", ["dropped", "renamed"])
def test_a_lost_weight_stops_the_run(through: TrainResult, corpus: Path, tmp_path: Path, how: str) -> None:
    flags = small_flags(corpus, load=through.save_dir, ckpt_step=MIDDLE, **GISTNET)
    result = train(flags, workdir=tmp_path, before=damage, before_kwargs={"key": WEIGHT, "how": how})
    assert result.returncode != 0
    assert result.error == f"RuntimeError: the checkpoint did not provide the plugin's parameters {WEIGHT}"


@pytest.mark.full
def test_half_precision_keeps_gistnet_exact_through_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    half = {**MOVING, "bf16": True, "eval_iters": 0}
    whole = small_training(corpus, tmp_path / "whole", fresh=True, save=tmp_path / "saved", **half).check()
    resumed = small_training(corpus, tmp_path / "on", load=tmp_path / "saved", ckpt_step=MIDDLE, **half).check()
    assert resumed.losses == whole.losses[MIDDLE:]
    assert resumed.grad_norms == whole.grad_norms[MIDDLE:]


def test_gist_flags_without_contexts_are_refused(corpus: Path, tmp_path: Path) -> None:
    [outcome] = parse_only([small_flags(corpus, **TOKENS_ONLY, mc_gist_kind="gistnet")], tmp_path)
    assert refusal(outcome) == "error: --mc-gist-kind has no effect without --megacontext."
