"""The whole objective in real trainings: every term, phases, both teachers, a cache from its command to a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megacontext_megatron.data.teacher_cache import TeacherManifest, as_bfloat16
from tests import recording
from tests.launch import TrainResult, train
from tests.small import TOKENS_ONLY, command, parse_only, refusal, small_flags

SAMPLES, H, C, K, HIDDEN, VOCABULARY = 24, 16, 512, 8, 32, 320
BATCH = 8
TERMS: dict[str, Any] = {
    "mc_gist_kind": "gistnet",
    "mc_loss_advantage": 0.3,
    "mc_loss_kl": 1.0,
    "mc_loss_contrast": 0.1,
    "mc_loss_pooling": 0.5,
    "mc_teacher": "cache",
}
ROUNDING = 2.0**-8
"""Relative, of a bf16 value."""


@dataclass(frozen=True)
class Taught:
    """A teacher's checkpoint and its cache for the small run."""

    corpus: Path
    checkpoint: Path
    cache: Path
    log: str

    def flags(self, **overrides: Any) -> list[str]:
        """Return the small run's command line with every term."""
        return small_flags(self.corpus, **{**TERMS, "mc_teacher_path": self.cache, **overrides})

    def train(self, workdir: Path, before: Callable[..., Any] | None = None, **overrides: Any) -> TrainResult:
        """Train the small run with every term."""
        return train(self.flags(**overrides), workdir=workdir, before=before).check()

    def array(self, name: str) -> torch.Tensor:
        """Return what the cache holds."""
        return as_bfloat16(np.load(self.cache / f"{name}.npy"))


def hidden_states(path: str) -> Callable[[], None]:
    """Record the final hidden states and logits of all rows that the first model call of this rank sees."""
    from megacontext_megatron.model.gpt import MegaContextGPTModel

    seen: list[np.ndarray] = []
    real = MegaContextGPTModel._outputs

    def record(self: Any, hidden: torch.Tensor, **given: Any) -> Any:
        if not seen:
            logits = given["output_layer"](hidden, weight=given["output_weight"])[0]
            seen.extend(each.float().cpu().numpy() for each in (hidden, logits))
        return real(self, hidden_states=hidden, **given)

    def outputs(self: Any, hidden_states: torch.Tensor, **given: Any) -> Any:
        return record(self, hidden_states, **given)

    MegaContextGPTModel._outputs = outputs
    return lambda: np.savez(path, hidden=seen[0], logits=seen[1])


def make_cache(
    checkpoint: Path | str, folder: Path, workdir: Path, *, before: Callable[..., Any] | None = None, **flags: Any
) -> Any:
    """Run the teacher command in one process."""
    given = {"cpu": True, "load": checkpoint, "mc_teacher_path": folder, "mc_teacher_samples": SAMPLES, **flags}
    words = [
        word
        for name, value in given.items()
        for word in (f"--{name.replace('_', '-')}", *([] if value is True else [value]))
    ]
    return command("teacher", words, workdir=workdir, before=before)


@pytest.fixture(scope="module")
def taught(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    """Return a teacher, trained a little on the small run's contexts, and its cache."""
    folder = tmp_path_factory.mktemp("teacher")
    flags = small_flags(corpus, save=folder / "checkpoints", mc_gist_kind="gistnet", lr=1e-2)
    train(flags, workdir=folder / "train").check()
    result = make_cache(folder / "checkpoints", folder / "taught", folder / "work").check()
    return Taught(corpus=corpus, checkpoint=folder / "checkpoints", cache=folder / "taught", log=result.log)


def test_the_command_writes_what_it_says(taught: Taught):
    sizes = {"logits": SAMPLES * H * VOCABULARY * 2, "states": SAMPLES * C // K * HIDDEN * 2, "digests": SAMPLES * 4}
    listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    assert f"{SAMPLES} samples, {sum(sizes.values()):,} bytes ({listed})" in taught.log
    manifest = TeacherManifest.read(taught.cache)
    assert (manifest.samples, manifest.iteration, manifest.seed) == (SAMPLES, 4, 1234)
    assert manifest.data == (str(taught.corpus),)
    assert Path(manifest.checkpoint) == taught.checkpoint / "iter_0000004"
    assert taught.array("logits").shape == (SAMPLES, H, VOCABULARY)
    assert taught.array("states").shape == (SAMPLES, C // K, HIDDEN)


def test_logits_are_of_the_last_rows_and_states_of_their_blocks(taught: Taught, tmp_path: Path):
    """Recorded at the model's output, for the samples of the first micro-batch; in other batches they are the same."""
    make_cache(taught.checkpoint, tmp_path / "again", tmp_path / "work", before=recorded, mc_teacher_samples=3).check()
    seen = np.load(tmp_path / "work" / "seen.npz")
    hidden, logits = (torch.from_numpy(seen[name]) for name in ("hidden", "logits"))
    assert hidden.shape[:2] == (C, 2)
    for sample in range(2):
        for block in range(C // K):
            expected = sum(hidden[block * K + i, sample] for i in range(K)) / K
            found = taught.array("states")[sample, block].float()
            torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=1e-6)
        found = taught.array("logits")[sample].float()
        torch.testing.assert_close(found, logits[C - H :, sample, :VOCABULARY], rtol=ROUNDING, atol=1e-6)
    again = as_bfloat16(np.load(tmp_path / "again" / "logits.npy")).float()
    torch.testing.assert_close(again, taught.array("logits")[:3].float(), rtol=ROUNDING, atol=1e-6)


def recorded() -> Callable[[], None]:
    """Record into the rank's folder."""
    return hidden_states("seen.npz")


@pytest.mark.full
def test_two_ranks_write_one_cache(taught: Taught, tmp_path: Path):
    """An odd number of samples, which the last step does not fill."""
    words = ["--cpu", "--load", taught.checkpoint, "--mc-teacher-path", tmp_path / "two", "--mc-teacher-samples", "7"]
    command("teacher", words, 2, workdir=tmp_path / "work").check()
    for name in ("logits", "states"):
        found = as_bfloat16(np.load(tmp_path / "two" / f"{name}.npy")).float()
        torch.testing.assert_close(found, taught.array(name)[:7].float(), rtol=ROUNDING, atol=1e-6)


@pytest.fixture(scope="module")
def trained(taught: Taught, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Return a run with every term whose gists pool first, with checkpoints at its middle and its end."""
    folder = tmp_path_factory.mktemp("student")
    phases = {"mc_phase": "pooling-then-substitution", "mc_pooling_samples": 2 * BATCH}
    return taught.train(folder / "work", recording.gist_gradients, save=folder / "saved", train_iters=6, **phases)


def test_every_term_is_trained_and_logged(trained: TrainResult):
    terms = {name: trained.scalars(f"mc/term/{name}") for name in ("advantage", "kl", "contrast", "pooling")}
    assert {len(values) for values in terms.values()} == {6}
    assert all(np.isfinite(values).all() for values in terms.values())
    assert min(terms["kl"]) > 0
    assert min(terms["advantage"]) >= 0
    assert 0 < max(terms["contrast"]) < 0.2
    assert 0 < min(terms["pooling"]) < max(terms["pooling"]) < 4
    assert trained.losses[-1] < trained.losses[0]


def test_a_terms_weight_lowers_it(taught: Taught, tmp_path: Path):
    """Against the same steps, from the teacher's weights, of a run that only watches the terms."""
    watched: dict[str, Any] = {f"mc_loss_{name}": 1e-9 for name in ("kl", "pooling", "contrast", "advantage")}
    watched |= {"load": taught.checkpoint, "finetune": True}
    heavy = {"kl": 100.0, "pooling": 10.0, "contrast": 100.0}
    without = taught.train(tmp_path / "watched", **watched)
    for name, weight in heavy.items():
        result = taught.train(tmp_path / name, **{**watched, f"mc_loss_{name}": weight})
        found, expected = (run.scalars(f"mc/term/{name}") for run in (result, without))
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
        assert found[-1] < expected[-1], name


def test_in_the_pooling_phase_gists_learn_from_pooling_alone(taught: Taught, trained: TrainResult, tmp_path: Path):
    """Other terms change nothing of GistNet's first gradient, and all of it when the phase is over."""
    flags = {"train_iters": 3, "lr_decay_iters": 6, "mc_loss_kl": None, "mc_loss_advantage": None}
    alone = taught.train(
        tmp_path / "alone", recording.gist_gradients, mc_phase="pooling", mc_loss_contrast=None, **flags
    )
    both = taught.train(tmp_path / "both", recording.gist_gradients, **flags)
    [phased], [pooled], [substituted] = trained.values, alone.values, both.values
    assert phased[0].keys() == pooled[0].keys() == substituted[0].keys()
    moving = [name for name, values in phased[0].items() if np.abs(values).max() > 0]
    assert moving
    for name in moving:
        np.testing.assert_array_equal(phased[0][name], pooled[0][name])
        assert np.abs(np.subtract(substituted[0][name], pooled[0][name])).max() > 0
    # The third step is the first of the other phase.
    assert any(np.abs(np.subtract(phased[2][name], pooled[2][name])).max() > 0 for name in moving)


def test_a_resumed_run_hears_the_same_teacher(taught: Taught, trained: TrainResult, tmp_path: Path):
    phases = {"mc_phase": "pooling-then-substitution", "mc_pooling_samples": 2 * BATCH}
    resumed = taught.train(tmp_path, load=trained.save_dir, ckpt_step=2, train_iters=6, **phases)
    assert resumed.losses == trained.losses[2:]
    for name in ("kl", "pooling"):
        assert resumed.scalars(f"mc/term/{name}") == trained.scalars(f"mc/term/{name}")[2:]


def test_both_teachers_say_the_same(taught: Taught, tmp_path: Path):
    """Where the teacher's weights are the model's own, a second forward is the cache but for its rounding."""
    start = {"load": taught.checkpoint, "finetune": True, "train_iters": 1}
    start |= {"mc_loss_pooling": None, "mc_loss_contrast": None, "mc_loss_advantage": None}
    cached = taught.train(tmp_path / "cached", **start)
    forward = taught.train(tmp_path / "forward", mc_teacher="forward", mc_teacher_path=None, **start)
    [one], [other] = (run.scalars("mc/term/kl") for run in (cached, forward))
    assert abs(one - other) < ROUNDING * other
    assert other > 1e-3
    assert cached.losses == forward.losses


@pytest.mark.full
def test_a_model_of_tokens_alone_may_teach(taught: Taught, tmp_path: Path):
    """Trained on all C tokens as rows, with the contexts of the run that will learn given by flags."""
    plain = {**TOKENS_ONLY, "seq_length": C, "max_position_embeddings": C, "save": tmp_path / "plain"}
    train(small_flags(taught.corpus, **plain), workdir=tmp_path / "train").check()
    context = {
        "megacontext": True,
        "seq_length": 64,
        "mc_source_length": C,
        "mc_block_size": K,
        "mc_horizon": H,
        "mc_recent_tokens": 16,
    }
    make_cache(tmp_path / "plain", tmp_path / "taught", tmp_path / "work", **context).check()
    other = TeacherManifest.read(tmp_path / "taught")
    shared = ("source_length", "block_size", "horizon", "vocabulary", "data", "samples")
    manifest = TeacherManifest.read(taught.cache)
    assert [getattr(other, name) for name in shared] == [getattr(manifest, name) for name in shared]
    digests = [np.load(folder / "digests.npy").tolist() for folder in (tmp_path / "taught", taught.cache)]
    assert digests[0] == digests[1]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "horizon": ({"mc_horizon": 8}, "--mc-horizon"),
    "source": ({"mc_source_length": 448}, "--mc-source-length"),
    "seed": ({"seed": 1}, "--seed"),
    "split": ({"split": "80,10,10"}, "--split"),
    "vocabulary": ({"vocab_size": 336}, "--vocab-size"),
    "hidden size": ({"hidden_size": 64}, "--hidden-size"),
    "too few": ({"train_iters": 7}, "--mc-teacher-samples 28"),
    "absent": ({"mc_teacher_path": "nowhere"}, "holds no teacher cache"),
}


def test_a_run_with_another_cache_than_its_own_is_refused(taught: Taught, tmp_path: Path):
    kinds = [*REFUSED.values(), ({"hidden_size": 64, "mc_loss_pooling": None}, "")]
    outcomes = parse_only([taught.flags(**overrides) for overrides, _ in kinds], tmp_path)
    for (_, words), outcome in zip(REFUSED.values(), outcomes, strict=False):
        assert words in refusal(outcome)
    # A wider teacher may teach logits.
    assert outcomes[-1]["code"] == 0


def test_another_text_stops_the_run(taught: Taught, tmp_path: Path):
    """As where the data's files were replaced under the same name."""
    cache = tmp_path / "taught"
    cache.mkdir()
    for path in taught.cache.iterdir():
        (cache / path.name).write_bytes(path.read_bytes())
    digests = np.load(cache / "digests.npy")
    digests[1] += 1
    np.save(cache / "digests.npy", digests)
    result = train(taught.flags(mc_teacher_path=cache), workdir=tmp_path / "work")
    assert "was made of another text than this run's raw sample 1" in result.error


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "exists": ({}, "exists: remove it"),
    "no samples": ({"mc_teacher_samples": 0}, "--mc-teacher-samples"),
    "no model": ({"checkpoint": "nowhere"}, "--load nowhere holds no checkpoint"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_the_command_refuses(taught: Taught, tmp_path: Path, name: str):
    flags, words = UNFIT[name]
    folder = taught.cache if name == "exists" else tmp_path / "new"
    before = json.loads((taught.cache / "manifest.json").read_text())
    given = {"checkpoint": taught.checkpoint, **flags}
    result = make_cache(folder=folder, workdir=tmp_path / "work", **given)
    assert result.returncode == 2
    assert words in result.error
    assert json.loads((taught.cache / "manifest.json").read_text()) == before


def test_the_command_refuses_to_split_the_model(taught: Taught, tmp_path: Path):
    words = ["--cpu", "--load", taught.checkpoint, "--mc-teacher-path", tmp_path / "new", "--mc-teacher-samples", "2"]
    words += ["--tensor-model-parallel-size", "2"]
    result = command("teacher", words, 2, workdir=tmp_path / "work")
    assert result.returncode == 2
    assert "--tensor-model-parallel-size 2 is not supported here" in result.log
