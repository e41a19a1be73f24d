"""What the tests of refusals share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small import parse_only, refusal, small_flags, tree


@pytest.fixture
def place(tmp_path) -> Path:
    """An empty folder; nothing may appear in it."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture
def refused(corpus, place, tmp_path):
    """Check that command lines, which name folders to write to, are refused and leave the disk as it was."""

    def check(cases, world_size=1, **everywhere):
        written = {"save": place / "save", "tensorboard_dir": place / "tb", "data_cache_path": place / "cache"}
        lines = [small_flags(corpus, **{**written, **everywhere, **overrides}) for overrides, *_ in cases.values()]
        before = tree(corpus.parent), tree(place)
        outcomes = parse_only(lines, tmp_path / "work", world_size)
        for name, outcome in zip(cases, outcomes, strict=True):
            said = refusal(outcome)
            assert said.startswith("error: "), name
            for part in cases[name][1:]:
                assert part in said, name
        assert (tree(corpus.parent), tree(place)) == before

    return check
