"""The manifest, and the refusal to train on another tokenizer's data."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megacontext_megatron.config import ConfigError
from megacontext_megatron.data.manifest import (
    Manifest,
    TrainingTokenizer,
    check_tokenizer,
    manifest_path,
    read_manifest,
    write_manifest,
)
from tests.unit.corpora import build, write_tokenizer

BYTE_RUN = TrainingTokenizer(tokenizer_type="NullTokenizer", vocab_size=320, eod_id=256)


def build_named(tmp_path: Path, name: str, **settings: Any) -> str:
    """Build a data set of one short text and return its prefix."""
    text = tmp_path / "text.txt"
    text.write_text("some text")
    build(text, str(tmp_path / name), **settings)
    return str(tmp_path / name)


@pytest.fixture
def byte_prefix(tmp_path: Path) -> str:
    """Return a data set of bytes."""
    return build_named(tmp_path, "bytes")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return the folder of a tokenizer."""
    return write_tokenizer(tmp_path / "model", ["w", "</s>", "<|endoftext|>"])


@pytest.fixture
def word_prefix(tmp_path: Path, model: Path) -> str:
    """Return a data set made by that tokenizer."""
    return build_named(tmp_path, "words", tokenizer=str(model))


def known(prefix: str) -> Manifest:
    """Read a manifest that must be there."""
    manifest = read_manifest(prefix)
    assert manifest is not None
    return manifest


def test_round_trip(byte_prefix: str, word_prefix: str, tmp_path: Path) -> None:
    """What is written is read back, and nothing else is left beside it."""
    for prefix in (byte_prefix, word_prefix):
        copy = str(tmp_path / "copy" / "name")
        Path(copy).parent.mkdir(exist_ok=True)
        write_manifest(copy, known(prefix))
        assert read_manifest(copy) == known(prefix)
        assert [path.name for path in Path(copy).parent.iterdir()] == ["name.manifest.json"]


def test_no_manifest(tmp_path: Path) -> None:
    """Data sets of other tools have none."""
    assert read_manifest(str(tmp_path / "none")) is None
    check_tokenizer([str(tmp_path / "none")], BYTE_RUN)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"{}", b'{"format_version": 2}'])
def test_foreign_manifest(byte_prefix: str, raw: bytes) -> None:
    """A file that is no manifest of this format is refused by name."""
    manifest_path(byte_prefix).write_bytes(raw)
    with pytest.raises(ConfigError, match=rf"^{byte_prefix}\.manifest\.json "):
        read_manifest(byte_prefix)


@pytest.mark.parametrize("part", [None, "tokenizer"])
def test_every_field_is_needed(byte_prefix: str, part: str | None) -> None:
    """A manifest without one of its fields, or with another type in it, is refused by name."""
    whole = json.loads(manifest_path(byte_prefix).read_bytes())
    names = list(whole[part] if part else whole)
    assert names
    for name in names:
        for value in ({}, True, 1.5, []):
            damaged = json.loads(json.dumps(whole))
            (damaged[part] if part else damaged)[name] = value
            manifest_path(byte_prefix).write_text(json.dumps(damaged))
            with pytest.raises(ConfigError, match=rf"^{byte_prefix}\.manifest\.json "):
                read_manifest(byte_prefix)


@pytest.mark.parametrize(
    "run",
    [
        BYTE_RUN,
        dataclasses.replace(BYTE_RUN, vocab_size=257),
        dataclasses.replace(BYTE_RUN, vocab_size=257, eod_id=None),
        dataclasses.replace(BYTE_RUN, vocab_size=None),
    ],
)
def test_bytes_and_the_null_tokenizer(byte_prefix: str, run: TrainingTokenizer) -> None:
    """Bytes are trained with NullTokenizer, EOD 256 and room for 257 ids."""
    check_tokenizer([byte_prefix], run)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "x"}, "--tokenizer-type"),
        ({"tokenizer_type": None}, "--tokenizer-type"),
        ({"eod_id": 255}, "--null-tokenizer-eod-id 256"),
        ({"eod_id": None}, "--null-tokenizer-eod-id 256"),
        ({"vocab_size": 256}, "--vocab-size 257 or more"),
    ],
)
def test_bytes_and_another_tokenizer(byte_prefix: str, changes: dict, flag: str) -> None:
    """The refusal names the data set and the flag."""
    with pytest.raises(ConfigError, match=flag) as caught:
        check_tokenizer([byte_prefix], dataclasses.replace(BYTE_RUN, **changes))
    assert f"{byte_prefix}.bin" in str(caught.value)


def test_the_same_huggingface_tokenizer(word_prefix: str, model: Path, tmp_path: Path) -> None:
    """A copy of the tokenizer.json is the same tokenizer, as file or in a folder."""
    copy = tmp_path / "renamed.json"
    copy.write_bytes((model / "tokenizer.json").read_bytes())
    for path in (model, model / "tokenizer.json", copy):
        run = TrainingTokenizer(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(path), eod_id=2)
        check_tokenizer([word_prefix], run)
        check_tokenizer([word_prefix], dataclasses.replace(run, eod_id=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_type": "NullTokenizer"}, "--tokenizer-type"),
        ({"tokenizer_model": None}, "--tokenizer-model"),
        ({"tokenizer_model": "{folder}/missing"}, "--tokenizer-model"),
        ({"tokenizer_model": "{folder}/other"}, "--tokenizer-model"),
        ({"eod_id": 1}, "--eod-token"),
        ({"vocab_size": 2}, "--vocab-size 3 or more"),
    ],
)
def test_another_huggingface_tokenizer(
    word_prefix: str, model: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    """Another tokenizer.json, EOD or vocabulary is refused, naming the flag."""
    write_tokenizer(tmp_path / "other", ["w", "</s>", "<|endoftext|>", "more"])
    changes = {k: v.format(folder=tmp_path) if type(v) is str else v for k, v in changes.items()}
    run = TrainingTokenizer(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(model))
    check_tokenizer([word_prefix], run)
    with pytest.raises(ConfigError, match=message):
        check_tokenizer([word_prefix], dataclasses.replace(run, **changes))


def test_blend_of_two_tokenizers(byte_prefix: str, word_prefix: str) -> None:
    """Both data sets are named."""
    with pytest.raises(ConfigError, match="--data-path can only blend") as caught:
        check_tokenizer([byte_prefix, word_prefix], BYTE_RUN)
    assert f"{byte_prefix}.manifest.json" in str(caught.value)
    assert f"{word_prefix}.manifest.json" in str(caught.value)


def test_blend_with_two_ends_of_document(tmp_path: Path, word_prefix: str, model: Path) -> None:
    """The same tokenizer.json with two EODs is refused even while the run's EOD is unknown."""
    other = build_named(tmp_path, "other", tokenizer=str(model), eod_token="</s>")
    run = TrainingTokenizer(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(model))
    check_tokenizer([other], run)
    with pytest.raises(ConfigError, match=r"EOD 2.*EOD 1"):
        check_tokenizer([word_prefix, other], run)


def test_manifest_of_another_index(tmp_path: Path, byte_prefix: str, word_prefix: str) -> None:
    """A data set caught between the renames of a build is recognised."""
    write_manifest(byte_prefix, known(build_named(tmp_path, "without", append_eod=False)))
    with pytest.raises(ConfigError, match=rf"^{byte_prefix}\.idx is not the one"):
        check_tokenizer([byte_prefix], BYTE_RUN)
