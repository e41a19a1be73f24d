"""Text becomes the ids of the tokenizer that was asked for, and EOD is where it should be."""

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers

from megacontext_megatron.config import ConfigError
from megacontext_megatron.data.manifest import read_manifest
from tests.unit.corpora import (
    FILES,
    IN_ORDER,
    build,
    documents,
    texts,
    write_bpe,
    write_files,
    write_folder,
    write_tokenizer,
)

LATIN_1 = "caf\u00e9".encode("latin-1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of text."""
    return write_folder(tmp_path / "text")


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Return an output prefix in a folder that does not exist yet."""
    return str(tmp_path / "out" / "corpus")


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a trained tokenizer."""
    return write_bpe(tmp_path_factory.mktemp("tokenizer"))


def test_huggingface_round_trip(folder: Path, prefix: str, tokenizer_json: Path) -> None:
    """Texts come back whole, and EOD stands only where a document ends."""
    build(folder, prefix, tokenizer=str(tokenizer_json))
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    eod = tokenizer.token_to_id("<|endoftext|>")
    assert eod is not None
    found = documents(prefix)
    assert [document.index(eod) for document in found] == [len(document) - 1 for document in found]
    decoded = [tokenizer.decode(document[:-1], skip_special_tokens=False) for document in found]
    assert decoded == [FILES[name].decode() for name in IN_ORDER]


def test_large_vocabulary_takes_int32(folder: Path, prefix: str, tmp_path: Path) -> None:
    """Ids above 65499 survive."""
    vocabulary = {f"w{i}": i for i in range(70_000)} | {"<|endoftext|>": 70_000}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = write_files(tmp_path / "words", {"a.txt": b"w1 w69999 other"})
    build(source, prefix, tokenizer=str(tmp_path))
    assert documents(prefix) == [[1, 69_999, 0, 70_000]]
    assert IndexedDataset(prefix).index.dtype == np.int32


def test_text_that_is_not_utf8(
    tmp_path: Path, prefix: str, tokenizer_json: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes take it as it is; a Hugging Face tokenizer leaves it out and says so."""
    source = write_files(tmp_path / "text", {"a.txt": LATIN_1, "b.txt": b"one"})
    build(source, prefix)
    assert texts(prefix) == [LATIN_1, b"one"]
    assert "a.txt" not in capsys.readouterr().err
    build(source, f"{prefix}_bpe", tokenizer=str(tokenizer_json))
    assert len(documents(f"{prefix}_bpe")) == 1
    assert capsys.readouterr().err.startswith(f"left out 1 documents that are not UTF-8: {source / 'a.txt'}\n")


@pytest.mark.parametrize(
    ("config", "eod_token", "expected"),
    [
        (None, None, 2),
        ("{}", None, 2),
        ('{"eos_token": "</s>"}', None, 1),
        ('{"eos_token": {"content": "</s>", "special": true}}', None, 1),
        ('{"eos_token": "</s>"}', "w", 0),
    ],
)
def test_eod_of_a_huggingface_tokenizer(folder: Path, prefix: str, config: str, eod_token: str, expected: int) -> None:
    """The flag wins over the configured eos_token, that over <|endoftext|>."""
    model = write_tokenizer(folder / "model", ["w", "</s>", "<|endoftext|>"], config)
    build(folder, prefix, tokenizer=str(model), eod_token=eod_token)
    assert {document[-1] for document in documents(prefix)} == {expected}


def test_unknown_eod(folder: Path, prefix: str, tmp_path: Path) -> None:
    """A tokenizer without a known EOD is usable only without EOD."""
    model = write_tokenizer(tmp_path / "model", ["w", "v"])
    with pytest.raises(ConfigError, match="--eod-token"):
        build(folder, prefix, tokenizer=str(model))
    with pytest.raises(ConfigError, match="--eod-token x is not in the vocabulary"):
        build(folder, prefix, tokenizer=str(model), eod_token="x")
    build(folder, prefix, tokenizer=str(model), append_eod=False)
    manifest = read_manifest(prefix)
    assert manifest is not None
    assert manifest.tokenizer.eod_id is None


@pytest.mark.parametrize("name", ["missing", "a.txt", ""])
def test_unusable_tokenizer(folder: Path, prefix: str, name: str) -> None:
    """A path without a tokenizer.json, or with something else in it, is refused by name."""
    with pytest.raises(ConfigError, match=rf"--tokenizer {folder / name}"):
        build(folder, prefix, tokenizer=str(folder / name))
