"""The real-text example: which documents it takes, what its report says, and the whole of it at a tiny size."""

import dataclasses
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from examples.command_line import words
from examples.real_text import report
from examples.real_text.__main__ import main
from examples.real_text.documents import Corpus, build
from examples.real_text.recipe import ARMS, FULL, GISTNET, MEAN, Recipe, evaluation_flags, training_flags
from megacontext_megatron.config import ConfigError
from megacontext_megatron.data.indexed import check_indexed_dataset

ROOT = Path(__file__).parents[2]
LENGTH = 256
CORPUS = Corpus(
    prefix="corpus/text",
    least_bytes=4096,
    train_documents=90,
    valid_documents=10,
    train_tokens=900_000,
    valid_tokens=100_000,
    too_short=7,
    repeated=1,
)
LOSSES = {
    MEAN: {"recency": 1.30, "mixed": 1.28, "shuffled": 1.31, "full": 1.5},
    GISTNET: {"recency": 1.30, "mixed": 1.25, "shuffled": 1.32, "full": 1.4},
    FULL: {"recency": 1.20, "newest": 1.22},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return a folder of long files of the standard library, two too short ones, and a copy of a long one."""
    folder = tmp_path_factory.mktemp("text")
    library = Path(sysconfig.get_path("stdlib"))
    names = ("ast", "bisect", "calendar", "cmd", "copy", "csv", "enum", "fnmatch", "glob", "heapq", "inspect", "json")
    long = [library / f"{name}.py" for name in names if (library / f"{name}.py").is_file()]
    (folder / "below").mkdir()
    for path in long:
        (folder / "below" / path.name).write_bytes(path.read_bytes())
    (folder / "again.py").write_bytes(long[0].read_bytes())
    (folder / "short.py").write_bytes(b"#" * (LENGTH - 1))
    (folder / "just.txt").write_bytes(b"$" * LENGTH)
    (folder / "other.bin").write_bytes(b"%" * 9999)
    return folder


def test_only_long_documents_are_taken_each_once_and_held_out_by_file(text, tmp_path):
    corpus = build([str(text)], tmp_path, LENGTH, held_out=0.4)
    taken = [path for path in text.rglob("*.*") if path.suffix in (".py", ".txt") and path.name not in ("short.py",)]
    assert (corpus.too_short, corpus.repeated) == (1, 1)
    assert corpus.train_documents + corpus.valid_documents == len(taken) - 1
    sizes = sum(path.stat().st_size + 1 for path in taken if path.name != "again.py")
    assert corpus.train_tokens + corpus.valid_tokens == sizes
    held_out, kept = (Path(f"{prefix}.bin").read_bytes() for prefix in (corpus.valid, corpus.train))
    for prefix in (corpus.valid, corpus.train):
        check_indexed_dataset(prefix)
    # every byte is two in the data, and a document of one byte is known among all others
    assert (b"$\0" * LENGTH in held_out) + (b"$\0" * LENGTH in kept) == 1
    assert b"#\0" * (LENGTH - 1) not in held_out + kept
    with pytest.raises(ConfigError, match="no file has 1000000 bytes; lower --source-length"):
        build([str(text)], tmp_path / "none", 1_000_000, held_out=0.4)


def test_arms_read_the_same_tokens_in_as_many_steps():
    recipe = Recipe()
    flags = {arm: training_flags(recipe, arm, 1, CORPUS, Path("save")) for arm in ARMS}
    samples = {
        arm: int(str(each["global_batch_size"])) // int(str(each.get("mc_variants", 1))) for arm, each in flags.items()
    }
    assert set(samples.values()) == {recipe.samples}
    assert {(each["train_iters"], each["mc_source_length"], each["seed"]) for each in flags.values()} == {
        (1200, 4096, 1)
    }
    assert flags[FULL]["seq_length"] == 4096
    assert recipe.trained_rows(FULL) == recipe.raw_tokens == 1200 * 32768
    assert recipe.trained_rows(MEAN) == recipe.trained_rows(GISTNET) == recipe.raw_tokens // 2
    differing = {name for name in flags[MEAN] if flags[MEAN][name] != flags[GISTNET][name]}
    assert differing == {"mc_gist_kind"}
    assert "--train-data-path 1.0 corpus/text_train" in " ".join(words(flags[MEAN]))


def test_evaluations_are_of_whole_micro_batches_that_the_text_fills():
    flags = evaluation_flags(Recipe(), MEAN, CORPUS, Path("save"))
    assert (flags["micro_batch_size"], flags["mc_eval_samples"]) == (8, 24)
    with pytest.raises(ConfigError, match=r"holds 6 samples of 16384 tokens, less than the 8 of a micro-batch"):
        evaluation_flags(Recipe(source_length=16384, batch_tokens=8 * 16384), FULL, CORPUS, Path("save"))
    with pytest.raises(ConfigError, match="--batch-tokens 32768 must be a multiple of --source-length 4064"):
        Recipe(source_length=4064)


def results(seeds=(1, 2, 3)):
    """Return results whose losses rise by a hundredth with each seed, in the order in which they are read."""
    return [
        {
            "arm": arm,
            "seed": seed,
            "recipe": Recipe().as_dict(),
            "corpus": dataclasses.asdict(CORPUS),
            **{"parameters": 25_000_000, "steps": 1200, "raw_tokens": 39_321_600, "rows": 19_660_800},
            **{"step_ms": 40.0, "seconds": 90.0},
            "evaluation": {
                **{key: value + seed / 100 * (key == "mixed") for key, value in LOSSES[arm].items()},
                **{"horizon": 64, "samples": 1024, "errors": {"mixed": 0.005}},
            },
        }
        for arm in ARMS
        for seed in seeds
    ]


def test_the_gap_closed_is_of_the_way_from_recency_to_all_rows():
    assert report.gap_closed(results(), GISTNET) == pytest.approx({1: 0.4, 2: 0.3, 3: 0.2})
    assert report.gap_closed(results(), MEAN) == pytest.approx({1: 0.1, 2: 0.0, 3: -0.1})
    without = [{**one, "evaluation": {"recency": 1.30}} if one["arm"] == FULL else one for one in results()]
    assert report.gap_closed(without, GISTNET) == {}
    assert report.relative_substitution(results(), GISTNET)[1] == pytest.approx(1.26 / 1.4 - 1)


def test_the_table_states_what_was_compared(tmp_path):
    lines = list(report.table_lines(results()))
    assert "| GistNet: mixed | 1024 | 4096 | 3 | 1.2700 ± 0.0100 | 0.0050 |" in lines
    assert "| trained on all rows | 4096 | 4096 | 3 | 1.2000 ± 0.0000 |  |" in lines
    assert "| trained on all rows: newest rows | 1024 | 1024 | 3 | 1.2200 ± 0.0000 |  |" in lines
    assert "| gistnet | 25,000,000 | 1,200 | 19,660,800 | 39,321,600 | 40 | 90 |" in lines
    assert any(line.startswith("- gap closed by GistNet: 30.0 ± 10.0 %") for line in lines)
    single = list(report.table_lines(results(seeds=(1,))))
    assert "| GistNet: mixed | 1024 | 4096 | 1 | 1.2600 | 0.0050 |" in single
    report.draw(results(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_request_that_cannot_be_honoured_is_refused_before_anything_runs(text, tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--seeds", "1"]) == 2
    assert "--input is needed" in capsys.readouterr().err
    assert main(["--input", str(text), "--out", str(tmp_path), "--source-length", "100"]) == 2
    assert "must be a multiple" in capsys.readouterr().err


@pytest.mark.full
def test_the_pipeline_trains_evaluates_and_reports_every_arm(text, tmp_path):
    sizes = {"source-length": LENGTH, "rows": 64, "block-size": 8, "recent-tokens": 16, "horizon": 16, "layers": 1}
    sizes |= {"hidden": 32, "heads": 4, "steps": 4, "batch-tokens": 2 * LENGTH, "evaluated": 4, "held-out": 0.4}
    command = [sys.executable, "-m", "examples.real_text", "--cpu", "--input", str(text), "--out", str(tmp_path)]
    command += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command += ["--seeds", "1", "--jobs", "2"]
    done = subprocess.run([*command, "--", "--mc-guards", "off"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / report.RESULTS_FILE).read_text())
    losses = found["summary"][0]["losses"]
    assert [list(by_seed) for by_seed in losses.values()] == [["1"]] * len(report.INPUTS)
    assert all(1 < by_seed["1"] < 7 for by_seed in losses.values())
    assert {run["evaluation"]["samples"] for run in found["runs"]} == {4}
    assert {run["corpus"]["too_short"] for run in found["runs"]} == {1}
    parameters = {run["arm"]: run["parameters"] for run in found["runs"]}
    assert parameters[MEAN] == parameters[FULL] < parameters[GISTNET]
    assert f"## {LENGTH} bytes in 64 rows" in done.stdout
    assert done.stdout.count("| 1 |") == len(report.INPUTS)
    assert (tmp_path / report.FIGURE_FILE).is_file()
    assert not list(tmp_path.rglob("iter_*"))
    again = subprocess.run(
        [*command, "--", "--mc-guards", "off"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert again.stdout.count(": kept") == len(ARMS)
