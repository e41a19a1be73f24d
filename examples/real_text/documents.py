"""The text: files of at least as many bytes as a context stands for, and the byte-level data sets made of them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megacontext_megatron.config import ConfigError
from megacontext_megatron.data.corpus import CorpusSettings, build_corpus
from megacontext_megatron.data.manifest import Manifest, read_manifest
from megacontext_megatron.data.sources import SourceFile, find_files

SUFFIXES = (".md", ".pl", ".pm", ".pod", ".py", ".rst", ".txt", ".vim")


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The data sets `PREFIX_train` and `PREFIX_valid`, and how many files were too short or there twice.

    Tokens are bytes, and an end of document for each file.
    """

    prefix: str
    least_bytes: int
    train_documents: int
    valid_documents: int
    train_tokens: int
    valid_tokens: int
    too_short: int
    repeated: int

    @property
    def train(self) -> str:
        """The prefix of the training data."""
        return f"{self.prefix}_train"

    @property
    def valid(self) -> str:
        """The prefix of the held-out data."""
        return f"{self.prefix}_valid"


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Files of at least so many bytes, each content once, and how many were left out for either reason."""

    files: tuple[SourceFile, ...]
    too_short: int
    repeated: int


def select(files: Iterable[SourceFile], least_bytes: int) -> Selection:
    """Return the files of at least `least_bytes` bytes, the first of those with the same content."""
    seen: set[bytes] = set()
    kept, short, repeated = [], 0, 0
    for source in files:
        if source.path.stat().st_size < least_bytes:
            short += 1
            continue
        digest = hashlib.sha256(source.path.read_bytes()).digest()
        if digest in seen:
            repeated += 1
            continue
        seen.add(digest)
        kept.append(source)
    return Selection(files=tuple(kept), too_short=short, repeated=repeated)


def build(
    inputs: Sequence[str], folder: Path, least_bytes: int, *, held_out: float, suffixes: Sequence[str] = SUFFIXES
) -> Corpus:
    """Make the data sets of all text below `inputs` in `folder`; a fraction `held_out` of the files is held out.

    Raises ConfigError where no file is long enough, or none of them is left for one of the two data sets.
    """
    selection = select(find_files(inputs, suffixes), least_bytes)
    if not selection.files:
        raise ConfigError(f"--input {' '.join(inputs)}: no file has {least_bytes} bytes; lower --source-length.")
    text = folder / "text"
    shutil.rmtree(text, ignore_errors=True)
    for source in selection.files:
        # a folder for each content's origin keeps names apart that several inputs have
        origin = str(source.path.resolve()).removesuffix(source.name)
        link = text / hashlib.sha256(origin.encode()).hexdigest()[:8] / source.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source.path.resolve())
    prefix = str(folder / "text-bytes")
    build_corpus(
        CorpusSettings(
            inputs=(str(text),), output_prefix=prefix, suffixes=tuple(suffixes), held_out=held_out, overwrite=True
        )
    )
    train, valid = (_manifest(f"{prefix}_{part}") for part in ("train", "valid"))
    return Corpus(
        prefix=prefix,
        least_bytes=least_bytes,
        train_documents=train.documents,
        valid_documents=valid.documents,
        train_tokens=train.tokens,
        valid_tokens=valid.tokens,
        too_short=selection.too_short,
        repeated=selection.repeated,
    )


def _manifest(prefix: str) -> Manifest:
    found = read_manifest(prefix)
    assert found is not None
    return found
