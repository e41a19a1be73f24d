"""The manifest beside a `.bin/.idx` pair: which tokenizer made it, from what, with which hashes."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megacontext_megatron.config import ConfigError

FORMAT_VERSION = 1
BYTE_EOD_ID = 256
BYTE_VOCAB_SIZE = 257


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    """The tokenizer that made a data set.

    Attributes:
        kind: `byte` (ids 0 to 255 are the bytes, 256 is EOD) or `huggingface`.
        sha256: of the `tokenizer.json`; None for `byte`.
        vocab_size: largest id plus one, the EOD included.
        eod_id: id that ends a document; None if none was appended and none is known.
    """

    kind: str
    sha256: str | None
    vocab_size: int
    eod_id: int | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `PREFIX.manifest.json` records.

    Attributes:
        format_version: of this file's layout and of the rules by which text becomes tokens.
        tokenizer: the tokenizer that made the data set.
        documents: number of documents.
        tokens: number of tokens, EODs included.
        bin_sha256: of `PREFIX.bin`.
        idx_sha256: of `PREFIX.idx`.
        inputs_sha256: of the input files, the tokenizer and the settings together.
        created_by: package and version that wrote it.
    """

    format_version: int
    tokenizer: TokenizerRecord
    documents: int
    tokens: int
    bin_sha256: str
    idx_sha256: str
    inputs_sha256: str
    created_by: str


@dataclass(frozen=True, kw_only=True)
class TrainingTokenizer:
    """The tokenizer flags of a run.

    Attributes:
        tokenizer_type: `--tokenizer-type`.
        tokenizer_model: `--tokenizer-model`.
        vocab_size: `--vocab-size`, before padding; None if not given.
        eod_id: `--null-tokenizer-eod-id` for NullTokenizer; for a Hugging Face tokenizer the EOD
            of the tokenizer that the run built, or None before it is built.
    """

    tokenizer_type: str | None
    tokenizer_model: str | None = None
    vocab_size: int | None = None
    eod_id: int | None = None


def manifest_path(prefix: str) -> Path:
    """Return where the manifest of the data set at `prefix` lies."""
    return Path(f"{prefix}.manifest.json")


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error


def write_manifest(prefix: str, manifest: Manifest) -> None:
    """Write the manifest of the data set at `prefix`, replacing an older one in one step."""
    path = manifest_path(prefix)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def read_manifest(prefix: str) -> Manifest | None:
    """Read the manifest of the data set at `prefix`.

    Returns:
        None if there is no manifest, as for data sets of Megatron's own `preprocess_data`.

    Raises:
        ConfigError: the manifest is unreadable, incomplete, or of another format version.
    """
    path = manifest_path(prefix)
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a readable manifest ({error})") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{path} has format version {version}, this release reads {FORMAT_VERSION}; build the data set again"
        )
    tokenizer = TokenizerRecord(**_typed_fields(path, TokenizerRecord, raw.get("tokenizer")))
    return Manifest(**{**_typed_fields(path, Manifest, raw), "tokenizer": tokenizer})


def _typed_fields(path: Path, kind: type, raw: object) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} lacks its {kind.__name__} part; build the data set again")
    values = {}
    for field in fields(kind):
        value = raw.get(field.name)
        expected = dict if field.type is TokenizerRecord else field.type
        if not isinstance(value, expected) or isinstance(value, bool):  # type: ignore[arg-type]
            raise ConfigError(f"{path} has {value!r} for {field.name!r}; build the data set again")
        values[field.name] = value
    return values


def find_tokenizer_json(model: str | None, flag: str) -> Path:
    """Return the `tokenizer.json` that a path names.

    Args:
        model: a `tokenizer.json` under any name, or a folder that holds one.
        flag: the flag the path came from, for the message.

    Raises:
        ConfigError: there is no such file.
    """
    path = Path(model) if model else None
    if path is not None and path.is_dir():
        path = path / "tokenizer.json"
    if path is None or not path.is_file():
        raise ConfigError(f"{flag} {model or '(not given)'} must be a tokenizer.json or a folder that holds one")
    return path


def check_tokenizer(prefixes: Sequence[str], run: TrainingTokenizer) -> None:
    """Refuse to train on a data set that another tokenizer made.

    Data sets without a manifest pass: nothing is known about them.

    Args:
        prefixes: the data sets of the run, training, validation and test together.
        run: the run's tokenizer flags.

    Raises:
        ConfigError: two data sets disagree, a data set was not made by the run's tokenizer, or an
            `.idx` is not the one its manifest describes.
    """
    known: list[tuple[str, TokenizerRecord]] = []
    for prefix in dict.fromkeys(prefixes):
        manifest = read_manifest(prefix)
        if manifest is not None:
            _check_describes_index(prefix, manifest)
            known.append((prefix, manifest.tokenizer))
    for prefix, record in known[1:]:
        if record != known[0][1]:
            raise ConfigError(
                f"{manifest_path(known[0][0])} records {_describe(known[0][1])} but "
                f"{manifest_path(prefix)} records {_describe(record)}: --data-path can only blend "
                "data sets of one tokenizer"
            )
    for prefix, record in known:
        check = _check_byte if record.kind == "byte" else _check_huggingface
        check(prefix, record, run)


def _check_describes_index(prefix: str, manifest: Manifest) -> None:
    if file_sha256(f"{prefix}.idx") != manifest.idx_sha256:
        raise ConfigError(
            f"{prefix}.idx is not the one that {manifest_path(prefix)} describes: build the data "
            "set again with --overwrite, or delete the manifest if another tool wrote the data set"
        )


def _describe(record: TokenizerRecord) -> str:
    digest = f" with sha256 {record.sha256[:12]}" if record.sha256 else ""
    return f"the {record.kind} tokenizer{digest} (vocabulary {record.vocab_size}, EOD {record.eod_id})"


def _check_byte(prefix: str, record: TokenizerRecord, run: TrainingTokenizer) -> None:
    eod_id = run.eod_id
    if eod_id is None and run.vocab_size is not None:
        # Megatron's NullTokenizer takes the last id when --null-tokenizer-eod-id is not given.
        eod_id = run.vocab_size - 1
    if run.tokenizer_type == "NullTokenizer" and eod_id == record.eod_id:
        _check_vocab_size(prefix, record, run)
        return
    raise ConfigError(
        f"{prefix}.bin was made by {_describe(record)}, the run has --tokenizer-type "
        f"{run.tokenizer_type} with EOD {eod_id}: use --tokenizer-type NullTokenizer --vocab-size "
        f"{record.vocab_size} (or more) --null-tokenizer-eod-id {record.eod_id}"
    )


def _check_huggingface(prefix: str, record: TokenizerRecord, run: TrainingTokenizer) -> None:
    made_by = f"{prefix}.bin was made by {_describe(record)}"
    if run.tokenizer_type != "HuggingFaceTokenizer":
        raise ConfigError(
            f"{made_by}, the run has --tokenizer-type {run.tokenizer_type}: use --tokenizer-type "
            "HuggingFaceTokenizer with --tokenizer-model naming the folder of that tokenizer.json"
        )
    path = find_tokenizer_json(run.tokenizer_model, "--tokenizer-model")
    digest = file_sha256(path)
    if digest != record.sha256:
        raise ConfigError(
            f"{made_by}, but {path} of --tokenizer-model has sha256 {digest[:12]}: use the "
            "tokenizer.json the data set was made with, or build the data set again"
        )
    if None not in (run.eod_id, record.eod_id) and run.eod_id != record.eod_id:
        raise ConfigError(
            f"{made_by}, but the run's tokenizer ends documents with id {run.eod_id}: set "
            f"eos_token in {path.with_name('tokenizer_config.json')}, or build the data set again "
            "with another --eod-token"
        )
    _check_vocab_size(prefix, record, run)


def _check_vocab_size(prefix: str, record: TokenizerRecord, run: TrainingTokenizer) -> None:
    if run.vocab_size is not None and run.vocab_size < record.vocab_size:
        raise ConfigError(
            f"--vocab-size {run.vocab_size} is too small for {prefix}.bin, which holds ids up to "
            f"{record.vocab_size - 1}: use --vocab-size {record.vocab_size} or more"
        )
