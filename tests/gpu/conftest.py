"""What the tests on GPUs share."""

import pytest

from tests.corpus import write_corpus
from tests.gpu.matrix import Matrix
from tests.gpu.reporting import Report
from tests.launch import call


@pytest.fixture(scope="session")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Return the runs of this session; they read the corpus cut into paragraphs."""
    folder = tmp_path_factory.mktemp("matrix")
    call(write_corpus, {"prefix": str(folder / "paragraphs"), "separator": "\n\n"}, workdir=folder).check()
    return Matrix(folder / "paragraphs", folder, Report())
