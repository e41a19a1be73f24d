"""The command line that Megatron's parsers see."""

import os
from importlib.util import find_spec

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megacontext_megatron.argv import (
    APEX_EXTENSION,
    APEX_FLAGS,
    CPU_ENVIRONMENT,
    CPU_FLAG,
    CPU_FLAGS,
    ENCODING_FLAG,
    INSTEAD_OF_STOCK,
    LOCAL_FLAGS,
    REAL_ENCODING_FLAG,
    SPAN_FLAGS,
    STOCK_ENCODINGS,
    normalised,
    prepare_environment,
    value_of,
    wants_plugin,
)
from megacontext_megatron.config import ENCODINGS, ConfigError

ENCODING_WORDS = [
    [],
    [ENCODING_FLAG, "gaussian_rope"],
    [f"{ENCODING_FLAG}=gaussian_rope"],
    *([ENCODING_FLAG, name] for name in STOCK_ENCODINGS),
    [f"{ENCODING_FLAG}=rope"],
]
OTHER_WORDS = [
    ["--lr", "1e-3"],
    ["--lr=1e-3"],
    ["--data-path", "0.5", "a/b", "0.5", "gaussian_rope"],
    ["--exp-name", "gaussian_rope"],
    ["--wandb-exp-name=gaussian_rope"],
    ["--sequence-parallel"],
    ["--megacontext"],
    ["--mc-variants", "2"],
    ["--gaussian-rope-sides=k"],
    [CPU_FLAG],
    ["--transformer-impl", "local"],
    ["--transformer-impl=local"],
    ["--num-workers=3"],
    ["--distributed-backend", "gloo"],
    ["--no-rope-fusion"],
]


@st.composite
def command_lines(draw):
    """Draw a command line with at most one encoding, anywhere in it."""
    flags = draw(st.lists(st.sampled_from(OTHER_WORDS), max_size=6))
    flags.insert(draw(st.integers(0, len(flags))), draw(st.sampled_from(ENCODING_WORDS)))
    return [word for flag in flags for word in flag]


def stock(argv):
    """Return a command line with the encoding's name as Megatron is to see it."""
    words = [word.replace(f"{ENCODING_FLAG}=gaussian_rope", f"{ENCODING_FLAG}=rope") for word in argv]
    over_spans = not set(SPAN_FLAGS).isdisjoint(argv)
    for place, word in enumerate(argv[:-1]):
        if word == ENCODING_FLAG and (argv[place + 1] == "gaussian_rope" or over_spans):
            words[place + 1] = "rope"
    return words


@given(command_lines())
@example([])
def test_everything_the_user_wrote_stays_in_place(argv):
    given_words = list(argv)
    words = normalised(argv)
    assert argv == given_words
    assert words[: len(argv)] == stock(argv)


@given(command_lines())
def test_normalised_is_idempotent_and_keeps_the_real_encoding(argv):
    words = normalised(argv)
    assert normalised(words) == words
    assert wants_plugin(words) == wants_plugin(argv)
    encoding = value_of(argv, ENCODING_FLAG)
    real = value_of(words, REAL_ENCODING_FLAG)
    over_spans = encoding in STOCK_ENCODINGS and not set(SPAN_FLAGS).isdisjoint(argv)
    assert real == (encoding if encoding in ENCODINGS or over_spans else None)
    assert value_of(words, ENCODING_FLAG) in (None, *STOCK_ENCODINGS)


@given(command_lines())
def test_flags_are_added_once_and_only_where_missing(argv):
    words = normalised(argv)
    added = words[len(argv) :]
    if CPU_FLAG not in argv and value_of(argv, "--transformer-impl") is None:
        if find_spec(APEX_EXTENSION) is None and APEX_FLAGS[0] not in argv:
            assert added.pop() == APEX_FLAGS[0]
        assert added in ([], *([REAL_ENCODING_FLAG, name] for name in (*STOCK_ENCODINGS, *ENCODINGS)))
        return
    wanted = {flag for flag in (*LOCAL_FLAGS, *(CPU_FLAGS if CPU_FLAG in argv else ())) if flag.startswith("--")}
    given_flags = {word.split("=")[0] for word in argv}
    for flag in wanted:
        assert added.count(flag) == (flag not in given_flags)


def test_cpu_fills_in_whole_flags_around_what_was_given():
    words = normalised([CPU_FLAG, "--num-workers=3", "--distributed-backend", "ucc"])
    assert words[:4] == [CPU_FLAG, "--num-workers=3", "--distributed-backend", "ucc"]
    for flag, value in (("--transformer-impl", "local"), ("--attention-backend", "unfused")):
        assert value_of(words, flag) == value
    assert "--num-workers" not in words
    assert "gloo" not in words
    assert "0" not in words


@pytest.mark.parametrize("name", [*INSTEAD_OF_STOCK, "rotary", "gaussian-rope", "Gaussian_Rope", ""])
@pytest.mark.parametrize("joined", [False, True])
def test_unknown_encoding_is_refused_by_flag_and_name(name, joined):
    argv = ["--lr", "1", *([f"{ENCODING_FLAG}={name}"] if joined else [ENCODING_FLAG, name])]
    with pytest.raises(ConfigError, match=f"^{ENCODING_FLAG} {name} is ") as refusal:
        normalised(argv)
    assert all(choice in str(refusal.value) for choice in (*STOCK_ENCODINGS, *ENCODINGS))


def test_encoding_without_a_value_is_left_to_the_parser():
    assert normalised(["--lr", "1", ENCODING_FLAG])[:3] == ["--lr", "1", ENCODING_FLAG]


@pytest.mark.parametrize("first", ["rope", "none", "gaussian_rope"])
def test_last_encoding_wins(first):
    words = normalised([ENCODING_FLAG, first, "--lr", "1", f"{ENCODING_FLAG}=gaussian_rope"])
    assert value_of(words, REAL_ENCODING_FLAG) == "gaussian_rope"
    assert "gaussian_rope" not in words[:5]


def test_overridden_encoding_is_one_that_megatron_knows():
    words = normalised([ENCODING_FLAG, "gaussian_rope", "--lr", "1", ENCODING_FLAG, "rope"])
    named = [words[place + 1] for place, word in enumerate(words) if word == ENCODING_FLAG]
    assert set(named) <= set(STOCK_ENCODINGS)
    assert value_of(words, REAL_ENCODING_FLAG) is None


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--a", "1", "--a", "2"], "2"),
        (["--a=1", "--a", "2"], "2"),
        (["--a", "1", "--a="], ""),
        (["--a=x=y"], "x=y"),
        (["--ab", "1", "--ab=2"], None),
        (["1", "--a"], None),
    ],
)
def test_value_of_reads_as_argparse_does(argv, expected):
    assert value_of(argv, "--a") == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], False),
        (["--lr", "1", ENCODING_FLAG, "rope"], False),
        (["--exp-name", "gaussian_rope"], False),
        ([ENCODING_FLAG, "gaussian_rope"], True),
        ([f"{ENCODING_FLAG}=gaussian_rope"], True),
        (["--megacontext"], True),
        (["--mc-variants=2"], True),
        (["--gaussian-rope-phase", "exact"], True),
        ([CPU_FLAG], True),
        (["--cpu-offloading"], False),
    ],
)
def test_wants_plugin_only_for_what_stock_megatron_does_not_know(argv, expected):
    assert wants_plugin(argv) is expected


def test_environment_is_filled_in_for_cpu_runs_only(monkeypatch):
    monkeypatch.setattr(os, "environ", {"GLOO_SOCKET_IFNAME": "eth7"})
    prepare_environment(["--lr", "1"])
    assert os.environ == {"GLOO_SOCKET_IFNAME": "eth7"}
    prepare_environment(["--lr", "1", CPU_FLAG])
    assert os.environ == {**CPU_ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth7"}
