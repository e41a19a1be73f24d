"""Documents of examples.far_recall: what they hold, who can know the answers, and how Megatron cuts them."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.tokenizers import MegatronTokenizer

from examples.command_line import words
from examples.far_recall.__main__ import experiment_of, parser
from examples.far_recall.bound import bag_bound
from examples.far_recall.documents import documents, write_dataset
from examples.far_recall.recipe import TIERS, arms, training_flags
from examples.far_recall.report import RESULTS, draw_curves, print_table, summarise, write_results
from examples.far_recall.task import Task
from examples.far_recall.training import Experiment, Outcome
from megacontext_megatron.config import ConfigError
from megacontext_megatron.spans.plan import plan_rows

COUNT = 64
TASKS = {"-".join(name): task for name, (task, _) in TIERS.items()}
BY_CONTENT = [name for name, task in TASKS.items() if task.ask == "content"]
BY_DISTANCE = [name for name, task in TASKS.items() if task.ask == "distance"]


def drawn(task: Task, count: int = COUNT, seed: int = 1) -> np.ndarray:
    return documents(task, count, np.random.default_rng(seed))


def is_value(task: Task, tokens: np.ndarray) -> np.ndarray:
    return (tokens >= task.first_value) & (tokens < task.first_noise)


@pytest.mark.parametrize("name", BY_CONTENT)
@pytest.mark.parametrize("copies", [1, 2])
def test_every_query_is_answered_in_one_block_beyond_the_newest_window(name, copies):
    task = dataclasses.replace(TASKS[name], copies=(copies,))
    far = (task.far_blocks.start * task.block_size, task.far_blocks.stop * task.block_size)
    assert far[1] <= task.source_length - task.window
    for document in drawn(task):
        queries = document[-task.query_tokens :].reshape(task.queries, task.answer_tokens, 2)
        symbols = queries[..., 0] - task.query_symbols.start - task.keys * np.arange(task.answer_tokens)
        assert (symbols == symbols[:, :1]).all()
        assert len(set(symbols[:, 0].tolist())) == task.queries
        for key, answer in zip(symbols[:, 0], queries[..., 1], strict=True):
            places = np.flatnonzero(document[: -task.query_tokens] == key)
            assert len(places) == copies
            assert (far[0] <= places).all()
            assert (places < far[1]).all()
            assert len({*(places // task.block_size), *((places + task.answer_tokens) // task.block_size)}) == 1
            for place in places:
                assert document[place + 1 : place + 1 + task.answer_tokens].tolist() == answer.tolist()


@pytest.mark.parametrize("name", BY_CONTENT)
def test_a_needles_block_holds_one_key_and_its_distractors_and_others_hold_noise(name):
    task = TASKS[name]
    far = drawn(task)[:, : -task.recent_tokens]
    assert (far < task.query_symbols.start).all()
    per_block = far.reshape(COUNT, -1, task.block_size)
    copies = (per_block < task.first_value).sum(axis=2)
    assert (np.isin(copies, (0, *task.copies))).all()
    assert ((copies > 0).sum(axis=1) == task.needles).all()
    for number in task.copies:
        # A document writes all its needles equally often.
        assert set((copies == number).sum(axis=1)) <= {0, task.needles}
        assert (copies == number).any()
    values = is_value(task, per_block).sum(axis=2)
    assert (values == copies * task.answer_tokens + task.distractors * (copies > 0)).all()


@pytest.mark.parametrize("name", BY_CONTENT)
def test_needles_lie_anywhere_in_the_far_blocks_and_in_their_blocks(name):
    task = dataclasses.replace(TASKS[name], copies=(1,))
    far = drawn(task, 2048)[:, : -task.recent_tokens]
    places = np.nonzero(far < task.first_value)[1]
    for bins, size in (
        (places // task.block_size - task.far_blocks.start, len(task.far_blocks)),
        (places % task.block_size, task.block_size - task.answer_tokens),
    ):
        counts = np.bincount(bins, minlength=size)
        assert len(counts) == size
        # Six standard deviations of a count.
        assert np.abs(counts - len(places) / size).max() < 6 * np.sqrt(len(places) / size)


@pytest.mark.parametrize("name", BY_CONTENT)
def test_contexts_hold_every_far_block_as_a_gist_but_one_for_each_at_level_2(name):
    task = TASKS[name]
    seen: set[int] = set()
    for sample in range(50):
        plan = plan_rows(task.context, (1, 1, sample, 0))
        blocks = np.unique(plan.start[plan.level == 0] // task.block_size)
        as_tokens = np.isin(blocks, task.far_blocks).sum()
        assert as_tokens <= (plan.level == 2).sum()
        seen |= set(plan.level.tolist())
    assert seen == set(range(task.max_level + 1))


@pytest.mark.parametrize("name", BY_DISTANCE)
def test_an_answer_by_distance_is_the_symbol_so_many_tokens_back(name):
    task = TASKS[name]
    documents_ = drawn(task)
    for document in documents_:
        for asks in range(task.source_length - task.query_tokens, task.source_length, 2):
            assert document[asks] in task.query_symbols
            reach = task.distance(int(document[asks]) - task.query_symbols.start)
            assert document[asks + 1] == document[asks - reach]
            assert 0 <= asks - reach < task.source_length - task.recent_tokens
    blocks = documents_[:, : -task.recent_tokens].reshape(COUNT, -1, task.block_size)
    assert (blocks == blocks[..., :1]).all()
    assert is_value(task, blocks).all()


@pytest.mark.parametrize("name", BY_DISTANCE)
def test_contexts_asked_by_distance_mix_tokens_and_gists_where_answers_lie(name):
    task = TASKS[name]
    plan = plan_rows(task.context, (1, 1, 0, 0))
    far = plan.start < task.source_length - task.context.protected_tokens
    assert task.context.dropped_tokens == 0
    assert {0, 1} <= set(plan.level[far].tolist())


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_uniform(name):
    task = TASKS[name]
    documents_ = drawn(task, 1024)
    rows, places = np.nonzero(np.isin(documents_, task.query_symbols))
    answers = documents_[rows, places + 1]
    assert len(answers) == 1024 * task.queries * task.answer_tokens
    counts = np.bincount(answers - task.first_value, minlength=task.values)
    assert len(counts) == task.values
    assert np.abs(counts - len(answers) / task.values).max() < 6 * np.sqrt(len(answers) / task.values)


@pytest.mark.parametrize("name", TASKS)
def test_documents_follow_from_the_seed(name):
    task = TASKS[name]
    assert (drawn(task, 4) == drawn(task, 4)).all()
    assert (drawn(task, 4) != drawn(task, 4, seed=2)).any()


@pytest.fixture(scope="module")
def tokenizer():
    task = TASKS["cpu-content"]
    with warnings.catch_warnings():
        # Says that Transformer Engine and Apex are missing, which no data set needs.
        warnings.simplefilter("ignore")
        return MegatronTokenizer.from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
            metadata_path={"library": "null-text"}, vocab_size=task.vocabulary, eod_id=task.end_of_document
        )


def test_megatrons_samples_are_the_documents(tokenizer, tmp_path: Path):
    task = TASKS["cpu-content"]
    write_dataset(tmp_path / "data" / "train", task, COUNT, seed=3)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=task.source_length,
        blend_per_split=[([str(tmp_path / "data" / "train")], None), None, None],
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # More samples than documents, so that Megatron goes through them more than once.
    sizes: Any = [3 * COUNT, None, None]
    train, *_ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    assert isinstance(train, GPTDataset)
    written = {document.tobytes() for document in drawn(task, seed=3)}
    assert len(written) == COUNT
    read = [train[index]["tokens"].numpy().astype(np.int32) for index in range(3 * COUNT)]
    assert all(sample.tobytes() in written for sample in read)
    assert len({sample.tobytes() for sample in read}) == COUNT
    # The one label that belongs to another document is never asked for.
    assert all(sample[-1] not in task.query_symbols for sample in read)


def test_the_bound_of_bags_is_what_a_best_guess_reaches():
    # One distractor of two symbols: they agree half of the time, and else the guess is right half of the time.
    task = dataclasses.replace(Task(), values=2, distractors=1)
    assert bag_bound(task) == pytest.approx(0.75, abs=0.005)
    assert bag_bound(dataclasses.replace(task, distractors=0)) == 1.0
    # Of many symbols no two agree: one in four at first, one in three of what is left behind a known first token.
    many = dataclasses.replace(Task(), values=100_000, distractors=2, answer_tokens=2, queries=4)
    assert bag_bound(many, samples=500) == pytest.approx((1 / 4 + 1 / 3) / 2, abs=0.005)
    assert bag_bound(Task()) == pytest.approx(0.337, abs=0.002)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": 9}, "repeat an answer"),
        ({"answer_tokens": 3}, "need 48 tokens"),
        ({"needles": 20}, "as many keys"),
        ({"distractors": 7}, "cannot hold"),
        ({"copies": (1, 3)}, "cannot hold"),
        ({"copies": (0, 1)}, "cannot hold"),
        ({"ask": "distance"}, "at least 2 distances"),
    ],
)
def test_impossible_documents_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(Task(), **change)


@pytest.mark.parametrize("name", TIERS)
def test_arms_differ_in_what_they_read_and_in_nothing_else(name):
    task, recipe = TIERS[name]
    known = arms(task, recipe)
    lines = {arm: training_flags(task, recipe, found, seed=1) for arm, found in known.items()}
    own = {"seq_length", "max_position_embeddings", "micro_batch_size", "mc_plan", "mc_level2_prob"}
    own |= {"mc_gist_kind", "mc_gist_layers", "mc_gist_hidden_size"}
    own |= {"gaussian_rope_sigma", "gaussian_rope_learnable_sigma"}
    shared = [{k: v for k, v in line.items() if k not in own} for line in lines.values()]
    assert all(line == shared[0] for line in shared)
    longer = {arm for arm, line in lines.items() if line["seq_length"] != task.window}
    assert longer <= {"full"}


def test_the_command_line_changes_task_and_recipe():
    changes = ["steps=70", "init_std=0.2", "needles=9", "copies=1,2"]
    options = parser().parse_args(["--out", "x", "--set", *changes, "--", "--bf16"])
    experiment = experiment_of(options)
    assert (experiment.recipe.steps, experiment.recipe.init_std) == (70, 0.2)
    assert (experiment.task.needles, experiment.task.copies) == (9, (1, 2))
    assert experiment.extra == ("--bf16",)
    with pytest.raises(ConfigError, match="colour"):
        experiment_of(parser().parse_args(["--out", "x", "--set", "colour=3"]))
    assert words({"a_b": True, "c": 1.5, "d": (2, 3)}) == ["--a-b", "--c", "1.5", "--d", "2", "3"]


def test_results_name_every_arm_by_the_model_it_reads(tmp_path: Path, capsys):
    task, recipe = TIERS["cpu", "content"]
    experiment = Experiment(task=task, recipe=recipe, out=tmp_path)
    known = arms(task, recipe)
    runs = {
        (name, seed): Outcome(
            curve=[(10, 3.0), (20, 1.0 + seed)],
            evaluation={"accuracy": {"recency": 0.1, "mixed": 0.9, "shuffled": 0.2}, "recency": 2.5, "mixed": 0.4},
            seconds=1.0,
        )
        for name, arm in known.items()
        if arm.trained_as is None
        for seed in (1, 2)
    }
    results = {result.arm: result for result in summarise(experiment, known, runs, [1, 2])}
    assert {name: result.accuracy for name, result in results.items()} == {
        "gistnet": [0.9, 0.9],
        "mean": [0.9, 0.9],
        "recency": [0.1, 0.1],
        "full": [0.1, 0.1],
        "shuffled": [0.2, 0.2],
    }
    assert results["gistnet"].nats == [0.4, 0.4]
    assert results["gistnet"].trained_to == [2.0, 3.0]
    assert results["shuffled"].nats == [None, None]
    assert [results[name].rows for name in ("full", "mean")] == [task.source_length, task.window]
    found = write_results(experiment, list(results.values()), runs)
    assert found["references"]["chance"] == 1 / task.values
    assert json.loads((tmp_path / RESULTS).read_text())["curves"]["mean-2"] == [[10, 3.0], [20, 3.0]]
    print_table(experiment, list(results.values()))
    assert "shuffled" in capsys.readouterr().out
    assert draw_curves(experiment, runs).stat().st_size > 0
