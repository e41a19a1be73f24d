"""What a checkpoint with learned gists fixes for runs that start from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.small import parse_only, refusal, small_flags, small_training

LEARNED = {"mc_gist_kind": "gistnet", "mc_gist_layers": 1, "mc_gist_pooling": "slot"}
MEAN = dict.fromkeys(LEARNED)
DEFAULT_WIDTH = "32"
"""That of the small model: the flag is not given."""

FIXED: dict[str, tuple[dict[str, Any], str, str]] = {
    "--mc-gist-kind": (MEAN, "gistnet", "mean"),
    "--mc-gist-layers": ({"mc_gist_layers": 2}, "1", "2"),
    "--mc-gist-hidden-size": ({"mc_gist_hidden_size": 16}, DEFAULT_WIDTH, "16"),
    "--mc-gist-pooling": ({"mc_gist_pooling": "mean"}, "slot", "mean"),
    "--mc-gist-span-head": ({"mc_gist_span_head": True}, "False", "True"),
}


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory) -> Path:
    """A checkpoint with learned gists."""
    folder = tmp_path_factory.mktemp("learned")
    once = {"train_iters": 1, "save_interval": 1, "eval_iters": 0, "save": folder / "saved"}
    return small_training(corpus, folder, **once, **LEARNED).check().save_dir or folder


def test_gists_of_another_kind_are_refused_by_the_name_of_each_setting(corpus, saved, tmp_path):
    lines = [small_flags(corpus, load=saved, **{**LEARNED, **changed}) for changed, _, _ in FIXED.values()]
    same = small_flags(corpus, load=saved, **LEARNED)
    written_out = small_flags(corpus, load=saved, **LEARNED, mc_gist_hidden_size=DEFAULT_WIDTH)
    *outcomes, kept, width = parse_only([*lines, same, written_out], tmp_path)
    for (flag, (_, was, now)), outcome in zip(FIXED.items(), outcomes, strict=True):
        assert f"{flag}: checkpoint {was}, this run {now}" in refusal(outcome)
    assert kept["code"] == width["code"] == 0, kept["err"] + width["err"]


def test_only_weights_that_are_there_can_be_taken_over(corpus, small_run, saved, tmp_path):
    lines = [small_flags(corpus, load=saved, finetune=True, **{**LEARNED, **each}) for each, _, _ in FIXED.values()]
    from_mean = small_flags(corpus, load=small_run.save_dir, finetune=True, **LEARNED)
    to_mean, *others, added = parse_only([*lines, from_mean], tmp_path)
    # means need no weights
    assert to_mean["code"] == 0, to_mean["err"]
    assert "> finetuning with another --mc-gist-kind: checkpoint gistnet, this run mean" in to_mean["out"]
    for (flag, (_, was, now)), outcome in zip(list(FIXED.items())[1:], others, strict=True):
        said = refusal(outcome)
        assert f"{flag}: checkpoint {was}, this run {now}" in said
        assert "--finetune" not in said
    assert "--mc-gist-kind: checkpoint mean, this run gistnet" in refusal(added)


def test_checkpoint_arguments_restore_gists(corpus, saved, tmp_path):
    bare = small_flags(corpus, load=saved, use_checkpoint_args=True)
    typed, mean = small_flags(corpus, load=saved, **LEARNED), [*bare, "--mc-gist-kind", "mean"]
    restored, expected, other = parse_only([bare, typed, mean], tmp_path)
    assert restored["code"] == 0, restored["err"]
    assert "kind='gistnet'" in restored["settings"]
    assert restored["settings"] == expected["settings"]
    assert "--mc-gist-kind: checkpoint gistnet, this run mean" in refusal(other)
