"""Refusals of data sets that Megatron could not read, and silence for those it can."""

import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megacontext_megatron.config import ConfigError
from megacontext_megatron.data.indexed import check_indexed_dataset

DTYPES = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.float64, np.float32, np.uint16]
HEADER_BYTES = 34


def write_dataset(prefix: Path, lengths: Sequence[int], dtype: type = np.uint16, *, multimodal: bool = False) -> str:
    """Write documents of the given lengths with Megatron's builder and return the prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=multimodal)
    for length in lengths:
        builder.add_item(torch.arange(length) % 100)
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Return a small good data set of three documents."""
    return write_dataset(tmp_path / "corpus", [5, 3, 4])


def refusal(prefix: str) -> str:
    """Return the message with which the data set at `prefix` is refused."""
    with pytest.raises(ConfigError) as caught:
        check_indexed_dataset(prefix)
    return str(caught.value)


def overwrite(path: str, offset: int, raw: bytes) -> None:
    """Replace the bytes of a file from `offset` on."""
    content = bytearray(Path(path).read_bytes())
    content[offset : offset + len(raw)] = raw
    Path(path).write_bytes(content)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multimodal", [False, True])
def test_every_token_type_passes(tmp_path: Path, dtype: type, multimodal: bool) -> None:
    """What Megatron's builder writes is accepted, and Megatron reads it."""
    prefix = write_dataset(tmp_path / "corpus", [5, 0, 4], dtype, multimodal=multimodal)
    check_indexed_dataset(prefix)
    dataset = IndexedDataset(prefix, multimodal=multimodal)
    assert dataset.sequence_lengths.tolist() == [5, 0, 4]


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_size_follows_the_dtype(tmp_path: Path, dtype: type) -> None:
    """One byte less than lengths times the size of the dtype is refused for every dtype."""
    prefix = write_dataset(tmp_path / "corpus", [7, 2], dtype)
    data = Path(f"{prefix}.bin")
    assert data.stat().st_size == 9 * DType.size(dtype)
    data.write_bytes(data.read_bytes()[:-1])
    assert f"{prefix}.bin is truncated" in refusal(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file(prefix: str, suffix: str) -> None:
    """A missing half of the pair is named."""
    Path(prefix + suffix).unlink()
    assert f"{prefix}{suffix} does not exist" in refusal(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_folder_in_place_of_a_file(prefix: str, suffix: str) -> None:
    """A folder of that name is no data set."""
    Path(prefix + suffix).unlink()
    Path(prefix + suffix).mkdir()
    assert f"{prefix}{suffix} does not exist" in refusal(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_prefix_given_with_its_suffix(prefix: str, suffix: str) -> None:
    """The message tells how the prefix is meant."""
    assert refusal(prefix + suffix) == f"--data-path takes the prefix {prefix}, without {suffix}"


def test_every_truncation_of_the_index(prefix: str) -> None:
    """No shorter index is accepted, wherever it was cut."""
    index = Path(f"{prefix}.idx")
    whole = index.read_bytes()
    for size in range(len(whole)):
        index.write_bytes(whole[:size])
        assert f"{prefix}.idx is truncated" in refusal(prefix), size
    index.write_bytes(whole)
    check_indexed_dataset(prefix)


def test_every_truncation_of_the_data(prefix: str) -> None:
    """No shorter data file is accepted, wherever it was cut."""
    data = Path(f"{prefix}.bin")
    whole = data.read_bytes()
    for size in range(len(whole)):
        data.write_bytes(whole[:size])
        assert f"{prefix}.bin is truncated" in refusal(prefix), size
    data.write_bytes(whole)
    check_indexed_dataset(prefix)


@pytest.mark.parametrize("raw", [b"PK\x03\x04", b"MMIDIDX\x01\x00" + bytes(90), b"\x00" * 102])
def test_foreign_index(prefix: str, raw: bytes) -> None:
    """A file of another kind is called that, not truncated."""
    Path(f"{prefix}.idx").write_bytes(raw)
    assert f"{prefix}.idx is not a Megatron index" in refusal(prefix)


def test_other_version(prefix: str) -> None:
    """Only version 1 is read."""
    overwrite(f"{prefix}.idx", 9, struct.pack("<Q", 2))
    assert f"{prefix}.idx has index version 2" in refusal(prefix)


@pytest.mark.parametrize("code", [0, 9, 255])
def test_unknown_token_type(prefix: str, code: int) -> None:
    """A dtype code Megatron does not know is refused."""
    overwrite(f"{prefix}.idx", 17, bytes([code]))
    assert f"{prefix}.idx names the unknown token dtype code {code}" in refusal(prefix)


def test_trailing_bytes(prefix: str) -> None:
    """An index longer than its counts is refused unless the rest can be the modes."""
    with open(f"{prefix}.idx", "ab") as stream:
        stream.write(b"\x00")
    assert f"{prefix}.idx is corrupt" in refusal(prefix)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_train_on(tmp_path: Path, lengths: list[int]) -> None:
    """Data sets without documents or without tokens are refused."""
    prefix = write_dataset(tmp_path / "corpus", lengths)
    assert f"{prefix}.idx holds no" in refusal(prefix)


@pytest.mark.parametrize("boundaries", [0, 1])
def test_sequences_without_a_document(prefix: str, boundaries: int) -> None:
    """An index whose sequences belong to no document is refused."""
    overwrite(f"{prefix}.idx", 26, struct.pack("<Q", boundaries))
    index = Path(f"{prefix}.idx")
    index.write_bytes(index.read_bytes()[: HEADER_BYTES + 36 + 8 * boundaries])
    assert f"{prefix}.idx holds no documents" in refusal(prefix)


@pytest.mark.parametrize(
    ("offset", "raw"),
    [
        (HEADER_BYTES + 8, struct.pack("<i", -4)),
        (HEADER_BYTES + 12 + 16, struct.pack("<q", -2)),
        (HEADER_BYTES + 36 + 24, struct.pack("<q", 2)),
    ],
    ids=["length", "offset", "boundary"],
)
def test_tables_that_contradict_each_other(prefix: str, offset: int, raw: bytes) -> None:
    """Negative places, or boundaries that do not end at the last sequence, are refused."""
    overwrite(f"{prefix}.idx", offset, raw)
    assert f"{prefix}.idx is corrupt" in refusal(prefix)


@pytest.mark.parametrize("scheme", ["s3://bucket/corpus", "msc://profile/corpus"])
def test_object_storage_is_left_to_megatron(scheme: str) -> None:
    """Prefixes that are no local paths are not looked for on the local disk."""
    check_indexed_dataset(scheme)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    dtype=st.sampled_from(DTYPES),
    suffix=st.sampled_from([".idx", ".bin"]),
    kept=st.floats(0.0, 1.0, exclude_max=True),
)
def test_any_truncation_of_any_dataset(lengths: list[int], dtype: type, suffix: str, kept: float) -> None:
    """Whatever the data set, its whole is accepted and its cut is refused by name."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_dataset(Path(folder, "corpus"), lengths, dtype)
        check_indexed_dataset(prefix)
        path = Path(prefix + suffix)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(kept * len(whole))])
        assert f"{path} is truncated" in refusal(prefix)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 101), value=st.integers(0, 255))
def test_any_changed_byte_of_the_index(position: int, value: int) -> None:
    """A damaged index is refused in one sentence or still ends inside the data file."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_dataset(Path(folder, "corpus"), [5, 3, 4])
        overwrite(f"{prefix}.idx", position, bytes([value]))
        try:
            check_indexed_dataset(prefix)
        except ConfigError as error:
            message = str(error)
        else:
            message = None
            dataset = IndexedDataset(prefix)
            last = len(dataset) - 1
            assert len(dataset[last]) == dataset.sequence_lengths[last]
        assert message is None or f"{prefix}." in message
