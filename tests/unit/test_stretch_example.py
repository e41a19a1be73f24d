"""The stretch example: what its sequences hold, which commands it runs, and what its report says of given numbers."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from examples.stretch import report, sequences
from examples.stretch.__main__ import parser, recipe_of
from examples.stretch.commands import Commands
from examples.stretch.recipe import (
    HELD_OUT,
    LONG_COPY,
    LORA,
    METHODS,
    NONE,
    ORDERING,
    SLOW,
    TASKS,
    TIERS,
    ZERO_SHOT,
    Recipe,
    adapter_flags,
    base_flags,
    cells,
    evaluation_flags,
    stretch_flags,
    training_flags,
)
from examples.stretch.sequences import NOISE, OFFSET, PERIODS, SYMBOLS
from examples.stretch.verdicts import decide, standard_error, values, verdicts
from megacontext_megatron.config import ConfigError
from megacontext_megatron.encoding_flags import RetrofitFlags, RotaryFlags

CPU, GPU = TIERS["cpu"], TIERS["gpu"]
COUNT, LENGTH = 400, 256


def generator(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_copied_token_is_that_of_the_offset_unless_noise_fell():
    bodies = sequences.offset_copy(COUNT, LENGTH, generator())
    equal = bodies[:, OFFSET:] == bodies[:, :-OFFSET]
    # Noise draws the same symbol once in SYMBOLS times; six standard deviations.
    expected = 1 - NOISE * (1 - 1 / SYMBOLS)
    assert abs(equal.mean() - expected) < 6 * math.sqrt(expected * (1 - expected) / equal.size)
    assert abs((bodies[:, OFFSET + 1 :] == bodies[:, : -OFFSET - 1]).mean() - 1 / SYMBOLS) < 0.01
    assert set(np.unique(bodies)) == set(range(SYMBOLS))


def period_of(body: np.ndarray) -> int:
    """Return the shortest period of a body."""
    return next(period for period in range(1, len(body)) if (body[period:] == body[:-period]).all())


def test_repeated_patterns_have_every_period_and_are_random():
    bodies = sequences.repeat(COUNT, LENGTH, generator())
    found = {period_of(body) for body in bodies}
    assert found == set(range(PERIODS[0], PERIODS[1] + 1))
    first = bodies[:, : PERIODS[0]]
    assert abs((first[:, 1:] == first[:, :-1]).mean() - 1 / SYMBOLS) < 0.03


def test_a_mixture_holds_both_laws_in_turns():
    bodies = sequences.mixture(7, LENGTH, generator())
    assert bodies.shape == (7, LENGTH)
    assert all(period_of(body) <= PERIODS[1] for body in bodies[1::2])
    assert all((body[OFFSET:] == body[:-OFFSET]).mean() > 0.8 for body in bodies[::2])


def test_what_a_long_copy_repeats_lies_beyond_the_length_of_training():
    trained = 64
    bodies = sequences.long_copy(COUNT, 4 * trained, generator(), trained)
    found = {period_of(body) for body in bodies}
    assert min(found) == trained + 1
    assert max(found) == 2 * trained


def test_long_copies_of_text_are_its_passages():
    text = np.arange(1000, dtype=np.int32)
    bodies = sequences.long_copy(20, 256, generator(), 64, text)
    assert (np.diff(bodies[:, :65], axis=1) == 1).all()
    assert len({int(body[0]) for body in bodies}) > 10


def test_the_end_of_an_ordering_follows_from_the_latest_step_only():
    bodies = sequences.ordering(COUNT, LENGTH, generator(), first=97) - 97
    followed_otherwise = 0
    for body in bodies:
        assert set(body.tolist()) == set(range(SYMBOLS))
        for place in range(LENGTH - SYMBOLS, LENGTH):
            earlier = np.flatnonzero(body[: place - 1] == body[place - 1])
            followers = body[earlier + 1]
            assert followers[-1] == body[place]
            followed_otherwise += int((followers != body[place]).sum() > (followers == body[place]).sum())
    # The first order says something else, and says it more often, wherever the orders differ.
    assert followed_otherwise > 0.9 * COUNT * SYMBOLS
    assert (bodies[:, : -2 * SYMBOLS - 1].reshape(COUNT, -1)[:, SYMBOLS:] == bodies[:, : -3 * SYMBOLS - 1]).all()


def test_samples_of_a_stream_have_their_bodies_as_labels(tmp_path: Path):
    bodies = sequences.repeat(5, 32, generator())
    sequences.write(tmp_path / "data" / "some", bodies, SYMBOLS + 1)
    read = sequences.read_tokens(str(tmp_path / "data" / "some"))
    assert len(read) == 5 * 32 + 1
    for number, body in enumerate(bodies):
        sample = read[number * 32 : number * 32 + 33]
        assert (sample[1:] == body).all()
    assert read[0] == bodies[0, 0]


def test_bodies_follow_from_the_seed():
    again = [sequences.mixture(8, 64, generator(seed)) for seed in (1, 1, 2)]
    assert (again[0] == again[1]).all()
    assert (again[0] != again[2]).any()


def test_the_last_tokens_are_256_or_a_quarter_of_a_short_base():
    assert (CPU.last(HELD_OUT), GPU.last(HELD_OUT)) == (16, 256)
    assert {recipe.last(task) for recipe in (CPU, GPU) for task in TASKS} == {SYMBOLS}


@pytest.mark.parametrize("tier", TIERS)
def test_all_contexts_of_a_tier_are_compared_on_the_same_labels(tier):
    recipe = TIERS[tier]
    for data, length in ((HELD_OUT, recipe.longest), (LONG_COPY, 4 * recipe.length), (ORDERING, 4 * recipe.length)):
        flags = [evaluation_flags(recipe, cell) for cell in cells(recipe) if cell.data == data]
        shared = {"mc_source_length": length, "mc_horizon": recipe.last(data), "mc_eval_samples": recipe.evaluated}
        assert flags
        assert all(flag | shared | {"mc_plan": "recency"} == flag for flag in flags)
        assert all(recipe.evaluated % int(str(flag["micro_batch_size"])) == 0 for flag in flags)


def test_a_base_is_megatrons_rope_and_every_step_has_as_many_tokens():
    own = {field.name for group in (RotaryFlags, RetrofitFlags) for field in dataclasses.fields(group)}
    for recipe in TIERS.values():
        base = {**base_flags(recipe), **training_flags(recipe, 1)}
        assert base["position_embedding_type"] == "rope"
        assert not [name for name in base if name in own or name.startswith(("mc_", "megacontext", "gaussian"))]
        for factor in (1, recipe.adapted):
            flags = training_flags(recipe, 1, factor)
            sizes = [int(str(flags[name])) for name in ("seq_length", "global_batch_size", "micro_batch_size")]
            assert sizes[0] * sizes[1] == recipe.length * recipe.batch
            assert sizes[1] % sizes[2] == 0
            assert sizes[0] * sizes[2] <= recipe.micro_tokens


def test_methods_differ_in_their_rule_alone():
    assert stretch_flags(CPU, NONE, 4) == {}
    assert stretch_flags(CPU, "ntk", 4) == {"rope_stretch": 4, "rope_stretch_rule": "ntk"}
    assert stretch_flags(CPU, "yarn", 8)["rope_original_length"] == CPU.length
    added = {method: adapter_flags(CPU, method, LORA, Path("base")) for method in METHODS}
    assert added[NONE]["retrofit"] == [LORA]
    assert added["yarn"]["retrofit"] == ["stretch", LORA]
    shared = {"retrofit_lora_length": CPU.length, "pretrained_checkpoint": "base"}
    assert all(each | shared == each for each in added.values())
    assert adapter_flags(GPU, "yarn", SLOW, Path("base"))["slow_band_periods"] == ["6827", "68267", "682667", "6826667"]


def test_cells_measure_every_method_at_every_length_and_after_adapters():
    found = cells(CPU)
    assert len({cell.name for cell in found}) == len(found)
    zero_shot = {(cell.method, cell.factor) for cell in found if (cell.adapters, cell.data) == (ZERO_SHOT, HELD_OUT)}
    assert zero_shot == {(NONE, 1), *((method, factor) for method in METHODS for factor in (2, 4, 8))}
    adapted = {(cell.method, cell.factor) for cell in found if (cell.adapters, cell.data) == (LORA, HELD_OUT)}
    assert adapted == {(method, 4) for method in METHODS}
    tasks = {(cell.data, cell.adapters, cell.method) for cell in found if cell.data != HELD_OUT}
    assert tasks == {(t, a, m) for t in TASKS for a in (ZERO_SHOT, LORA) for m in CPU.task_methods}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("warmup=300", "less than steps"),
        ("adapted=3", "one of factors"),
        ("batch=30", "multiple of adapted"),
        ("length=40", "multiple of 16"),
        ("evaluated=40", "multiple of all micro-batches"),
        ("colour=3", "no field"),
        ("steps=many", "NAME=NUMBER"),
    ],
)
def test_what_cannot_be_trained_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        recipe_of(parser().parse_args(["--out", "x", "--set", change]))


def test_the_command_line_changes_the_recipe():
    options = parser().parse_args(["--out", "x", "--set", "adapter_rate=3e-3", "factors=2,4", "--", "--seed", "7"])
    recipe = recipe_of(options)
    assert (recipe.adapter_rate, recipe.factors, options.extra) == (0.003, (2, 4), ["--seed", "7"])


def test_a_failed_command_names_its_log(tmp_path: Path):
    log = tmp_path / "log"
    with pytest.raises(ConfigError, match=f"nothing ended with 1: read {log}"):
        Commands(cpu=False)("nothing", ["--flag", "1"], log)
    lines = log.read_text().splitlines()
    assert lines[0] == "python -m megacontext_megatron.nothing --flag 1"
    assert "No module named" in lines[-1]


AT_2T = {NONE: 1.3, "linear": 2.0, "ntk": 1.0, "yarn": 0.99}


def records(changes=None, seeds=(1, 2, 3)):
    """Return made-up records of all cells: losses grow with contexts and by a hundredth of the seed, and adapters help.

    `changes` are losses by (method, factor, adapters, seed).
    """
    changes = changes or {}
    made = []
    for seed in seeds:
        for cell in cells(CPU):
            loss = AT_2T[cell.method] * (1 + cell.factor) / 3 + seed / 100 - 0.2 * (cell.adapters != ZERO_SHOT)
            loss = changes.get((cell.method, cell.factor, cell.adapters, seed), loss)
            made.append({"seed": seed, **dataclasses.asdict(cell), "loss": loss, "accuracy": 0.5, "error": 0.01})
    return made


def test_standard_errors_are_of_the_mean_over_seeds():
    # Of 1, 2 and 3 the deviation is 1.
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert standard_error([1.0]) is None
    assert report.shown({1: 1.0, 2: 2.0, 3: 3.0}) == "2.0000 ± 0.5774"
    assert (report.shown({1: 1.0}), report.shown({})) == ("1.0000", "-")


def test_a_difference_must_exceed_three_errors_of_the_paired_seeds():
    left, right = {1: 1.0, 2: 2.0, 3: 3.0}, {1: 1.1, 2: 2.2, 3: 3.3}
    # Differences of -0.1, -0.2 and -0.3: their mean is 2 sqrt(3) = 3.46 errors of it, though seeds differ by more.
    found = decide("", left, right, "beyond")
    assert found is not None
    assert (found.mean, found.error) == (pytest.approx(-0.2), pytest.approx(0.1 / math.sqrt(3)))
    assert found.holds is True
    wider = decide("", left, {1: 1.02, 2: 2.2, 3: 3.38}, "beyond")
    assert wider is not None
    assert (wider.holds, wider.reversed_seeds) == (False, ())
    assert decide("", {1: 1.0}, {2: 1.0}, "below") is None


def test_no_worse_is_within_three_errors_above():
    near = decide("", {1: 1.0, 2: 2.2, 3: 3.2}, {1: 1.1, 2: 2.0, 3: 3.0}, "within")
    assert near is not None
    assert (near.holds, near.reversed_seeds) == (True, (2, 3))
    far = decide("", {1: 1.20, 2: 2.21, 3: 3.22}, {1: 1.0, 2: 2.0, 3: 3.0}, "within")
    assert far is not None
    assert (far.holds, far.reversed_seeds) == (False, (1, 2, 3))


def test_one_seed_decides_nothing_that_needs_an_error():
    single = decide("it", {1: 1.0}, {1: 2.0}, "beyond")
    assert single is not None
    assert (single.holds, single.error) == (None, None)
    assert str(single) == "it: undecided, needs two seeds (difference -1.0000)"
    below = decide("it", {1: 1.0}, {1: 2.0}, "below")
    assert below is not None
    assert below.holds is True


def test_all_claims_hold_of_an_order_as_expected():
    found = verdicts(records(), 4)
    assert len(found) == 3 + len(METHODS)
    assert all(verdict.holds for verdict in found)
    assert not any(verdict.reversed_seeds for verdict in found)


def test_a_reversed_order_is_reported_with_its_seeds():
    reversed_ = records({("ntk", 2, ZERO_SHOT, 3): 1.5, ("linear", 4, LORA, 2): 9.0})
    found = {verdict.claim: verdict for verdict in verdicts(reversed_, 4)}
    ntk = found["at 2T: NTK below none by more than 3 standard errors"]
    assert (ntk.holds, ntk.reversed_seeds) == (False, (3,))
    assert str(ntk).endswith("does NOT hold (difference -0.1433 ± 0.1567; reversed in seeds 3)")
    linear = found["at 4T: linear after alibi-lora below its zero-shot value"]
    assert (linear.holds, linear.reversed_seeds) == (False, (2,))
    assert found["at 2T: none below linear by more than 3 standard errors"].holds


def test_the_report_states_all_figures_and_writes_them(tmp_path: Path):
    table = report.write(tmp_path, CPU, records())
    lines = table.splitlines()
    assert "| zero-shot | T | 2T | 4T | 8T |" in lines
    assert "| none | 0.8867 ± 0.0058 | 1.3200 ± 0.0058 | 2.1867 ± 0.0058 | 3.9200 ± 0.0058 |" in lines
    assert "| ntk | - | 1.0200 ± 0.0058 | 1.6867 ± 0.0058 | 3.0200 ± 0.0058 |" in lines
    assert "| ntk | 1.6867 ± 0.0058 | 1.4867 ± 0.0058 | -0.2000 ± 0.0000 | - |" in lines
    assert "| long-copy | none | 2.1867 ± 0.0058 | 1.9867 ± 0.0058 | 0.5000 ± 0.0000 | 0.5000 ± 0.0000 |" in lines
    assert sum(line.startswith("- at ") for line in lines) == 7
    assert "last 16 tokens, T = 64" in lines[0]
    found = json.loads((tmp_path / report.RESULTS_FILE).read_text())
    assert values(found["records"], "yarn", 8) == values(records(), "yarn", 8)
    assert [verdict["holds"] for verdict in found["verdicts"]] == [True] * 7
    assert (tmp_path / report.TABLE_FILE).read_text() == table
    pytest.importorskip("matplotlib")
    assert (tmp_path / report.FIGURE_FILE).stat().st_size > 10_000


def test_an_unfinished_table_has_dashes():
    some = [each for each in records(seeds=(1,)) if each["method"] == NONE and each["adapters"] == ZERO_SHOT]
    lines = list(report.lines(Recipe(), some))
    assert "| none | 0.8767 | 1.3100 | 2.1767 | 3.9100 |" in lines
    assert "| yarn | - | - | - | - |" in lines
    assert not any(line.startswith("- at ") for line in lines)
