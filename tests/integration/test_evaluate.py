"""Evaluation of checkpoints, and the report of a run."""

# Faults are planted here by hand, and some libraries export less than they offer.
# pyright: reportAttributeAccessIssue=false, reportOptionalSubscript=false

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacontext_megatron.telemetry import report
from tests.launch import call
from tests.parity import TWO_RANKS
from tests.small import TOKENS_ONLY, command, small_training

TOLERANCE = 1e-5
SAMPLES = 8


def words(**flags: Any) -> list[str]:
    """Return flags as a command line; True is the bare flag."""
    return [
        word
        for name, value in flags.items()
        for word in ("--" + name.replace("_", "-"), *([] if value is True else [str(value)]))
    ]


def evaluated(folder: Path, workdir: Path, ranks: int = 1, **flags: Any) -> dict[str, Any]:
    """Evaluate a copy of the checkpoints in a folder and return what was written beside them."""
    own = workdir / "own"
    shutil.copytree(folder, own)
    given = words(cpu=True, load=own, **{"mc_eval_samples": SAMPLES, **flags})
    result = command("evaluate", given, ranks, workdir=workdir / "work").check()
    assert f"written to {own / 'evaluation.json'}" in result.log
    return {"log": result.log, **json.loads((own / "evaluation.json").read_text())}


@pytest.fixture(scope="module")
def evaluation(small_run, tmp_path_factory) -> dict[str, Any]:
    """The evaluation of the small run in one process."""
    return evaluated(small_run.save_dir, tmp_path_factory.mktemp("evaluation"))


def recompute(argv: list[str], samples: int) -> dict[str, Any]:
    """Return losses and hits of the last rows for each input and sample, one forward at a time, and the tokens."""
    import torch

    from megacontext_megatron.arguments import add_evaluation_arguments
    from megacontext_megatron.evaluate import FIXED_FLAGS, restored_arguments
    from megacontext_megatron.pretrain import prepare
    from megacontext_megatron.run import Run, parse
    from megacontext_megatron.spans.metadata import SpanMetadata
    from megacontext_megatron.spans.plan import plan_rows

    prepare([*argv, *FIXED_FLAGS])
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.training import get_model, initialize_megatron

    args, settings = parse(add_evaluation_arguments, restored_arguments(argv))
    initialize_megatron()
    run = Run(args, settings)
    model = get_model(run.model_provider, wrap_with_ddp=False)
    load_checkpoint(model, None, None)
    model[0].eval()
    context, raw = settings.context, run.datasets.held_out(samples)
    c, w, h = context.source_length, context.window, context.horizon
    alone = type(context)(window=w, source_length=c, block_size=8, recent_tokens=16, horizon=h, level2_prob=0.3)
    losses: dict[str, list[float]] = {"recency": [], "mixed": [], "full": []}
    hits: dict[str, list[float]] = {name: [] for name in losses}
    texts = []
    for sample in range(samples):
        item = raw[sample]
        text = torch.cat([item["tokens"], item["labels"][-1:]])
        texts.append(text.tolist())
        plan = plan_rows(alone, (settings.seed, 1, sample, 0))
        rows = {
            "recency": (torch.arange(c - w, c), torch.zeros(w, dtype=torch.int64)),
            "mixed": (torch.from_numpy(plan.start), torch.from_numpy(plan.level)),
            "full": (torch.arange(c), torch.zeros(c, dtype=torch.int64)),
        }
        for name, (start, level) in rows.items():
            spans = SpanMetadata.of_nodes(start[None], level[None], context.block_size)
            mask = torch.ones(len(start), len(start), dtype=torch.bool).triu(1)[None, None]
            with torch.no_grad():
                logits = model[0](input_ids=text[None, :-1], spans=spans, attention_mask=mask)
            loss = torch.nn.functional.cross_entropy(logits[0, -h:].double(), text[-h:])
            losses[name].append(loss.item())
            hits[name].append((logits[0, -h:].argmax(dim=-1) == text[-h:]).float().mean().item())
    return {"losses": losses, "hits": hits, "texts": texts}


def read_documents(prefix: str) -> list[list[int]]:
    """Return the documents of an indexed data set."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(prefix)
    return [data[index].tolist() for index in range(len(data))]


@pytest.fixture(scope="module")
def recomputed(small_run, tmp_path_factory) -> dict[str, Any]:
    """The same numbers, computed sample by sample."""
    argv = words(cpu=True, load=small_run.save_dir, mc_eval_samples=SAMPLES)
    folder = tmp_path_factory.mktemp("recomputed")
    return call(recompute, {"argv": argv, "samples": SAMPLES}, workdir=folder).check().values[0]


@pytest.fixture(scope="module")
def documents(corpus, tmp_path_factory) -> list[list[int]]:
    """The corpus by document."""
    return call(read_documents, {"prefix": str(corpus)}, workdir=tmp_path_factory.mktemp("read")).check().values[0]


def test_evaluation_is_the_mean_over_samples_of_each_input(evaluation, recomputed):
    means = {name: sum(values) / SAMPLES for name, values in recomputed["losses"].items()}
    for name, mean in means.items():
        assert evaluation[name] == pytest.approx(mean, rel=TOLERANCE)
    # the three inputs differ, so that none can stand in for another
    assert len({round(mean, 4) for mean in means.values()}) == 3
    assert evaluation["advantage_delta"] == pytest.approx(means["mixed"] - means["recency"], abs=TOLERANCE)
    assert evaluation["substitution_delta"] == pytest.approx(means["mixed"] - means["full"], abs=TOLERANCE)
    assert evaluation["mc/adv_delta_mean"] == evaluation["advantage_delta"]
    assert evaluation["mc/delta_sub/16"] == evaluation["substitution_delta"]
    for name, hits in recomputed["hits"].items():
        assert evaluation["accuracy"][name] == pytest.approx(sum(hits) / SAMPLES, rel=TOLERANCE)
        assert evaluation["errors"]["accuracy"][name] == pytest.approx(standard_error(hits), rel=TOLERANCE)
        assert evaluation["errors"][name] == pytest.approx(standard_error(recomputed["losses"][name]), rel=TOLERANCE)
    # samples are paired
    deltas = [m - r for m, r in zip(*(recomputed["losses"][name] for name in ("mixed", "recency")), strict=True)]
    assert evaluation["errors"]["advantage_delta"] == pytest.approx(standard_error(deltas), rel=TOLERANCE)
    shape = {"iteration": 4, "samples": SAMPLES, "source_length": 512, "window": 64, "horizon": 16}
    assert {name: evaluation[name] for name in shape} == shape
    for name in ("recency", "mixed", "full"):
        assert f"{evaluation[name]:.4f}" in evaluation["log"]


def standard_error(values: list[float]) -> float:
    """Return the standard error of a mean."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def swap_gists() -> None:
    """Let mixed contexts have the gists of the sample beside their own, in micro-batches of two."""
    from megacontext_megatron.context import assembly

    real = assembly.gists_of

    def swapped(*args: Any) -> Any:
        return [level._replace(vectors=level.vectors.flip(1)) for level in real(*args)]

    assembly.gists_of = swapped


def test_shuffled_gists_are_of_another_sample(small_run, evaluation, tmp_path):
    assert evaluation["shuffled_across_samples"] is True
    assert evaluation["shuffled_delta"] == pytest.approx(evaluation["shuffled"] - evaluation["mixed"], abs=TOLERANCE)
    assert evaluation["mc/shuffled_gist_dnll"] == evaluation["shuffled_delta"]
    assert abs(evaluation["shuffled_delta"]) > 10 * TOLERANCE
    assert set(evaluation["accuracy"]) == {"recency", "mixed", "full", "shuffled"}


def unshuffled_places(levels: Any, context: Any) -> Any:
    """Give every gist the vector of the sample beside its own, at the same place."""
    return [level._replace(vectors=level.vectors.flip(1)) for level in levels]


def shuffle_by_flip() -> None:
    """Let evaluate shuffle as `unshuffled_places` does."""
    from megacontext_megatron.model import measures

    measures.shuffled_gists = unshuffled_places


def test_shuffling_is_what_the_model_does(small_run, tmp_path):
    # the same exchange, once as the control of evaluate and once inside the model
    own = tmp_path / "own"
    shutil.copytree(small_run.save_dir, own)
    found = []
    for inputs, before in (("shuffled", shuffle_by_flip), ("mixed", swap_gists)):
        given = words(cpu=True, load=own, mc_eval_samples=SAMPLES, mc_eval_inputs=inputs)
        command("evaluate", given, workdir=tmp_path / inputs, before=before).check()
        found.append(json.loads((own / "evaluation.json").read_text())[inputs])
    assert found[0] == found[1]


@pytest.mark.full
def test_one_sample_at_a_time_is_said_to_be_shuffled_alone(corpus, tmp_path):
    one: dict[str, Any] = {
        "mc_variants": 1,
        "micro_batch_size": 1,
        "train_iters": 1,
        "save_interval": 1,
        "eval_iters": 0,
    }
    small_training(corpus, tmp_path / "train", save=tmp_path / "saved", **one).check()
    found = evaluated(tmp_path / "saved", tmp_path, mc_eval_inputs="shuffled")
    assert found["shuffled_across_samples"] is False
    assert "shuffled gists are of other places of the same sample" in found["log"]


def test_evaluation_reads_held_out_text(recomputed, documents):
    # of 18 documents, the split of 90, 5, 5 gives one to validation
    held_out = {len(documents) * 90 // 100}
    for text in recomputed["texts"]:
        assert len(text) == 512 + 1
        pieces = bytes(min(token, 255) for token in text).split(b"\xff")
        piece = max(pieces, key=len)
        assert {index for index, document in enumerate(documents) if piece in bytes(document[:-1])} == held_out


@pytest.mark.parametrize("source", ["checkpoint", "typed"])
def test_the_bigram_baseline_learns_from_training_text_and_predicts_the_same_targets(
    small_run, documents, corpus, tmp_path, source
):
    # data that are typed replace those of the checkpoint, and are here the same for training and validation
    typed = {} if source == "checkpoint" else {"train_data_path": corpus, "valid_data_path": corpus}
    found = evaluated(small_run.save_dir, tmp_path, mc_eval_bigram=True, **typed)
    argv = words(cpu=True, load=small_run.save_dir, mc_eval_samples=SAMPLES, **typed)
    again = call(recompute, {"argv": argv, "samples": SAMPLES}, workdir=tmp_path / "again").check().values[0]
    learned = documents[: len(documents) * 90 // 100] if source == "checkpoint" else documents
    counts = np.zeros((320, 320))
    tokens = [token for document in learned for token in document]
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    nll = []
    for text in again["texts"]:
        for before, after in zip(text[-17:-1], text[-16:], strict=True):
            nll.append(-np.log((counts[before, after] + 1) / (counts[before].sum() + 320)))
    assert found["bigram"] == pytest.approx(np.mean(nll), rel=1e-9)
    assert found["recency"] == pytest.approx(np.mean(again["losses"]["recency"]), rel=TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("name", TWO_RANKS)
def test_evaluation_is_the_same_in_every_layout(evaluation, small_run, tmp_path, name):
    found = evaluated(small_run.save_dir, tmp_path, 2, **TWO_RANKS[name])
    for key in ("recency", "mixed", "full", "shuffled", "advantage_delta", "substitution_delta"):
        assert found[key] == pytest.approx(evaluation[key], rel=TOLERANCE, abs=TOLERANCE)
    for key, value in evaluation["accuracy"].items():
        assert found["accuracy"][key] == pytest.approx(value, rel=TOLERANCE)
    assert found["errors"]["accuracy"] == pytest.approx(evaluation["errors"]["accuracy"], rel=TOLERANCE)
    assert found["samples"] == evaluation["samples"]


@pytest.mark.full
def test_evaluation_counts_the_samples_it_took(small_run, recomputed, tmp_path):
    found = evaluated(small_run.save_dir, tmp_path, mc_eval_samples=SAMPLES, micro_batch_size=6)
    assert found["samples"] == 6
    assert found["recency"] == pytest.approx(sum(recomputed["losses"]["recency"][:6]) / 6, rel=TOLERANCE)


def test_evaluation_refuses_what_it_cannot_evaluate(small_run, corpus, tmp_path):
    cases = {
        "--load is needed": words(cpu=True),
        "--mc-eval-samples 1 is less": words(cpu=True, load=small_run.save_dir, mc_eval_samples=1),
        "there is no held-out data": words(cpu=True, load=small_run.save_dir, split="100,0,0"),
        "--mc-eval-bigram needs training data": words(
            cpu=True, load=small_run.save_dir, mc_eval_bigram=True, valid_data_path=corpus
        ),
        "--mc-max-level: checkpoint 2": words(cpu=True, load=small_run.save_dir, mc_max_level=1, mc_source_length=256),
        f"{tmp_path / 'nothing'} holds no checkpoint": words(cpu=True, load=tmp_path / "nothing"),
    }
    for expected, argv in cases.items():
        result = command("evaluate", argv, workdir=tmp_path / "work")
        assert result.returncode == 2, result.log
        (line,) = (line for line in result.log.splitlines() if "error: " in line)
        assert line.startswith("error: ")
        assert expected in line
    assert not (small_run.save_dir / "evaluation.json").exists()


def test_the_report_writes_a_table_and_a_figure(small_run, evaluation, tmp_path, capsys):
    for name in ("metrics.jsonl",):
        shutil.copy(small_run.save_dir / name, tmp_path)
    report.main([str(tmp_path)])
    without = capsys.readouterr().out
    held_out = {**{key: value for key, value in evaluation.items() if key != "log"}, "bigram": 4.5678}
    (tmp_path / "evaluation.json").write_text(json.dumps(held_out))
    report.main([str(tmp_path)])
    shown = capsys.readouterr().out
    first, last = small_run.metrics[0], small_run.metrics[-1]
    for text in (without, shown):
        assert f"{first['lm loss']:.3f} -> {last['lm loss']:.3f}" in text
        assert f"{100 * last['mc/frac_level/1']:.1f} %" in text
        assert f"{last['mc/lod_loss/2']:.3f}" in text
        assert f"{last['mc/pos/sigma_mean/2']:.2f} tokens" in text
        assert "8.0" in text
    for key, value in held_out["accuracy"].items():
        label = {"full": "all tokens as rows", "shuffled": "shuffled gists"}.get(key, key)
        (line,) = (line for line in shown.splitlines() if f"held-out accuracy, last 16 rows: {label}" in line)
        assert f"{100 * value:.1f} %" in line
    for key in ("recency", "mixed", "full", "shuffled", "bigram", "advantage_delta", "shuffled_delta"):
        assert f"{held_out[key]:.3f} nats" in shown
        assert f"{held_out[key]:.3f} nats" not in without
    figure = tmp_path / "training.png"
    assert f"figure: {figure}" in shown.replace("\n", "")
    from matplotlib import image

    pixels = image.imread(figure)
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 2 * pixels.shape[0]
    assert pixels.std() > 0.05


def test_the_report_names_the_file_it_misses(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    assert stop.value.code == 2
    assert f"{tmp_path / 'metrics.jsonl'} is missing" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("encoding", ["rope", "gaussian_rope"])
def test_a_run_of_tokens_alone_is_evaluated_and_reported(corpus, tmp_path, capsys, encoding):
    quick = {"position_embedding_type": encoding, "train_iters": 2, "eval_iters": 0, "save": tmp_path / "saved"}
    small_training(corpus, tmp_path / "train", **{**TOKENS_ONLY, **quick}).check()
    found = evaluated(tmp_path / "saved", tmp_path)
    assert found["recency"] > 0
    assert found["mixed"] is found["full"] is found["advantage_delta"] is found["substitution_delta"] is None
    report.main([str(tmp_path / "own")])
    shown = capsys.readouterr().out
    assert f"{found['recency']:.3f} nats" in shown
    assert "all tokens as rows" not in shown
    assert (tmp_path / "own" / "training.png").exists()
