"""Settings that no plan can honour are refused by a sentence that names the flags."""

import ast
import dataclasses
import inspect
import itertools
import re
import traceback
from typing import Any

import pytest

from megacontext_megatron import config
from megacontext_megatron.arguments import ContextFlags
from megacontext_megatron.config import ConfigError, ContextConfig, GistConfig

GOOD: dict[str, Any] = {"window": 256, "source_length": 512}

REFUSED = [
    ({"block_size": 1}, ["--mc-block-size 1"]),
    ({"block_size": 0}, ["--mc-block-size 0"]),
    ({"block_size": -32}, ["--mc-block-size -32"]),
    ({"source_length": 500}, ["--mc-source-length 500", "--mc-block-size 32", "480 and 512"]),
    ({"source_length": 224}, ["--mc-source-length 224", "--seq-length 256"]),
    ({"source_length": 0}, ["--mc-source-length 0", "--seq-length 256"]),
    ({"horizon": 0}, ["--mc-horizon 0", "--mc-recent-tokens 128"]),
    ({"horizon": 129}, ["--mc-horizon 129", "--mc-recent-tokens 128"]),
    ({"recent_tokens": 32, "horizon": 64}, ["--mc-horizon 64", "--mc-recent-tokens 32"]),
    ({"recent_tokens": 257}, ["--mc-recent-tokens 257", "288", "--seq-length 256"]),
    ({"window": 127}, ["--mc-recent-tokens 128", "--seq-length 127"]),
    ({"window": -1}, ["--mc-recent-tokens 128", "--seq-length -1"]),
    ({"variants": 0}, ["--mc-variants 0"]),
    ({"variants": -2}, ["--mc-variants -2"]),
    ({"level2_prob": -0.1}, ["--mc-level2-prob -0.1"]),
    ({"level2_prob": 1.5}, ["--mc-level2-prob 1.5"]),
    ({"level2_prob": float("nan")}, ["--mc-level2-prob nan"]),
    ({"max_level": 0}, ["--mc-max-level 0"]),
    ({"max_level": 3}, ["--mc-max-level 3"]),
    ({"plan": "heuristic", "variants": 3}, ["--mc-plan heuristic", "--mc-variants 3"]),
    ({"source_length": 288, "recent_tokens": 256}, ["--mc-recent-tokens 256", "--mc-source-length 288"]),
    ({"plan": "recency", "variants": 2}, ["--mc-plan recency", "--mc-variants 2"]),
    ({"source_length": 256}, ["--mc-source-length 256", "--seq-length 256", "--mc-plan recency"]),
    ({"window": 500}, ["--mc-source-length 512", "--seq-length 500", "--mc-plan recency"]),
    (
        {"window": 160, "source_length": 8192, "max_level": 1},
        ["--seq-length 160", "--mc-source-length 8192", "--mc-recent-tokens 128", "--mc-max-level 1"],
    ),
    (
        {"window": 129, "source_length": 2048},
        ["--seq-length 129", "--mc-source-length 2048", "--mc-recent-tokens 128", "--mc-max-level 2"],
    ),
]
GISTS_REFUSED = [
    ({"layers": 0}, ["--mc-gist-layers 0"]),
    ({"layers": -1}, ["--mc-gist-layers -1"]),
    ({"hidden_size": 0}, ["--mc-gist-hidden-size 0", "multiple of 4"]),
    ({"hidden_size": 66}, ["--mc-gist-hidden-size 66", "multiple of 4"]),
    ({"hidden_size": 388}, ["--mc-gist-hidden-size 388", "multiple of 6"]),
]
ENOUGH_ROWS = re.compile(r"the fewest rows reachable are about (\d+)")


def refusal(settings: dict[str, Any]) -> ConfigError:
    """Return the error with which settings are refused."""
    with pytest.raises(ConfigError) as caught:
        ContextConfig(**(GOOD | settings))
    return caught.value


def gist_refusal(settings: dict[str, Any]) -> ConfigError:
    """Return the error with which settings of GistNet are refused."""
    with pytest.raises(ConfigError) as caught:
        GistConfig(hidden=64, kind="gistnet", **settings)
    return caught.value


@pytest.mark.parametrize(
    ("error", "named"),
    [
        *((refusal(settings), named) for settings, named in REFUSED),
        *((gist_refusal(settings), named) for settings, named in GISTS_REFUSED),
    ],
    ids=str,
)
def test_refusals_name_the_flags(error: ConfigError, named: list[str]):
    for part in named:
        assert part in str(error)
    assert str(error).endswith(".")


def test_every_refusal_is_tried():
    tree = ast.parse(inspect.getsource(config))
    written = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Raise)}
    errors = [refusal(settings) for settings, _ in REFUSED] + [gist_refusal(settings) for settings, _ in GISTS_REFUSED]
    assert {traceback.extract_tb(error.__traceback__)[-1].lineno for error in errors} == written


@pytest.mark.parametrize("settings", [{"layers": 0, "hidden_size": 65}, {"hidden_size": 0}])
def test_mean_gists_have_no_shape_to_refuse(settings: dict[str, Any]):
    assert not GistConfig(hidden=64, **settings).learned


@pytest.mark.parametrize(("width", "heads"), [(4, 4), (64, 4), (256, 4), (320, 5), (512, 8), (1024, 16)])
def test_gist_heads_have_64_channels_or_are_four(width: int, heads: int):
    config = GistConfig(hidden=2048, kind="gistnet", hidden_size=width)
    assert (config.heads, config.learned) == (heads, True)


def test_flags_in_refusals_exist():
    flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(ContextFlags)} | {"--seq-length"}
    for settings, _ in REFUSED:
        assert set(re.findall(r"--[a-z][a-z0-9-]*", str(refusal(settings)))) <= flags


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recent_tokens": 97, "horizon": 97},
        {"horizon": 128},
        {"horizon": 1, "recent_tokens": 1},
        {"variants": 2, "plan": "heuristic"},
        {"variants": 3, "plan": "mix"},
        {"level2_prob": 0.0},
        {"level2_prob": 1.0},
        {"max_level": 1},
        {"plan": "recency"},
        {"plan": "recency", "source_length": 256},
        {"window": 481},
        {"window": 270},
    ],
)
def test_possible_contexts_are_accepted(settings: dict[str, Any]):
    assert dataclasses.asdict(ContextConfig(**(GOOD | settings))).items() >= (GOOD | settings).items()


def test_the_rows_a_refusal_asks_for_are_enough():
    tried = 0
    for k, blocks, recent, level in itertools.product((2, 3, 5), (4, 9, 26), (1, 3, 6), (1, 2)):
        shape: dict[str, Any] = {
            "source_length": k * blocks,
            "block_size": k,
            "recent_tokens": recent,
            "max_level": level,
            "horizon": 1,
        }
        for window in range(1, k * blocks):
            try:
                ContextConfig(window=window, **shape)
            except ConfigError as error:
                found = ENOUGH_ROWS.search(str(error))
                # Where nothing may collapse at all, more rows alone do not help.
                if found and k * blocks - int(found.group(1)) >= k - 1:
                    context = ContextConfig(window=int(found.group(1)), **shape)
                    assert context.fewest_rows() == context.window
                    tried += 1
    assert tried > 200


@pytest.mark.parametrize(("recent", "protected"), [(1, 32), (32, 32), (33, 64), (128, 128), (130, 160)])
def test_protected_tail_ends_at_a_block_edge(recent: int, protected: int):
    assert ContextConfig(**GOOD, recent_tokens=recent, horizon=1).protected_tokens == protected


@pytest.mark.parametrize("window", [2, 7, 64, 2048])
def test_a_run_without_megacontext_has_tokens_only(window: int):
    context = ContextConfig.tokens_only(window)
    assert (context.window, context.source_length, context.variants) == (window, window, 1)
    assert context.plan == "recency"
    assert 1 <= context.horizon <= window


def test_settings_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ContextConfig(**GOOD).window = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"variants": 2}, ["--mc-plan recency", "--mc-variants 2"]),
        ({"variants": 0}, ["--mc-variants 0"]),
        ({"horizon": 0}, ["--mc-horizon 0"]),
        ({"horizon": 300}, ["--mc-horizon 300"]),
        ({"level2_prob": 2.0}, ["--mc-level2-prob 2.0"]),
    ],
)
def test_a_recency_context_as_long_as_its_source_is_checked_too(settings: dict[str, Any], named: list[str]):
    message = str(refusal({"source_length": 256, "plan": "recency"} | settings))
    for part in named:
        assert part in message
