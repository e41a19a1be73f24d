"""Markers, the hypothesis profile, and what the whole session shares."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests import zygote_client
from tests.corpus import write_corpus
from tests.launch import call

if TYPE_CHECKING:
    from tests.launch import TrainResult
    from tests.parity import References

MARKERS = {
    "full": "slow layouts: only with --full",
    "gpu": "needs a GPU",
    "multigpu": "needs two GPUs",
}

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --full."""
    parser.addoption("--full", action="store_true", help="also run the tests marked full")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers; without a GPU, let Triton interpret its kernels, in the ranks too."""
    import torch

    if not torch.cuda.is_available():
        # Read when a kernel is defined, so before the package is imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what was not asked for and what this machine cannot run."""
    skip = dict.fromkeys(MARKERS, False)
    skip["full"] = not config.getoption("--full")
    if any(item.get_closest_marker(name) for item in items for name in ("gpu", "multigpu")):
        import torch

        skip["gpu"] = torch.cuda.device_count() < 1
        skip["multigpu"] = torch.cuda.device_count() < 2
    for item in items:
        for name in MARKERS:
            if skip[name] and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=MARKERS[name]))


@pytest.fixture(scope="session", autouse=True)
def _end_of_ranks() -> Iterator[None]:
    yield
    zygote_client.shutdown()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path prefix of a byte-level .bin/.idx of about 300 kB, EOD 256, for ``--data-path``."""
    folder = tmp_path_factory.mktemp("corpus")
    call(write_corpus, {"prefix": str(folder / "stdlib")}, workdir=folder).check()
    return folder / "stdlib"


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> "References":
    """The one-process runs that layouts are compared with, each made when it is first needed.

    They read the corpus cut into paragraphs, so that most samples hold ends of documents.
    """
    from tests.parity import References

    folder = tmp_path_factory.mktemp("references")
    call(write_corpus, {"prefix": str(folder / "paragraphs"), "separator": "\n\n"}, workdir=folder).check()
    return References(folder / "paragraphs", folder)


@pytest.fixture(scope="session")
def small_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> "TrainResult":
    """Return the small run, uninterrupted, with checkpoints at its middle and its end."""
    from tests.small import small_training

    folder = tmp_path_factory.mktemp("small")
    return small_training(corpus, folder, fresh=True, save=folder / "checkpoints").check()
