"""Find text on disk and read it as documents: one per text file, one per line of JSONL."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megacontext_megatron.config import ConfigError

STDLIB = "stdlib"
STDLIB_SUFFIXES = (".py", ".rst", ".txt")
FOLDER_SUFFIXES = (".jsonl", ".md", ".py", ".rst", ".txt")
_JSONL_SUFFIXES = (".json", ".jsonl", ".ndjson")
_FOREIGN_FOLDERS = ("__pycache__", "dist-packages", "site-packages")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One input file.

    Attributes:
        path: where it lies.
        name: its path below the input it was found in, with `/`; the same on every machine.
    """

    path: Path
    name: str

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a document of its own."""
        return self.path.suffix.lower() in _JSONL_SUFFIXES


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document of a source file.

    Attributes:
        place: the file, for JSONL with its line number, for messages.
        text: its bytes, UTF-8 if it comes from JSONL, as they are on disk otherwise.
        split_key: what decides whether it is held out.
        bytes_read: size of the file or line it came from.
    """

    place: str
    text: bytes
    split_key: bytes
    bytes_read: int

    def is_held_out(self, fraction: float) -> bool:
        """Return whether the document is in the validation part, by a hash of its `split_key`."""
        digest = hashlib.sha256(self.split_key).digest()
        return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def find_files(inputs: Sequence[str], suffixes: Sequence[str] | None = None) -> list[SourceFile]:
    """List the files that the inputs name, each once.

    Args:
        inputs: files, taken whatever their suffix; folders, searched recursively in sorted order,
            without hidden entries, `site-packages` and `dist-packages`; or `stdlib` for the
            standard library of the running Python.
        suffixes: endings, with their dot, of the files to take from folders; None for
            `FOLDER_SUFFIXES`, for the standard library `STDLIB_SUFFIXES`.

    Raises:
        ConfigError: an input does not exist or gives no file.
    """
    found: dict[Path, SourceFile] = {}
    for name in inputs:
        for source in _files_of(name, suffixes):
            found.setdefault(source.path.resolve(), source)
    return list(found.values())


def _files_of(name: str, suffixes: Sequence[str] | None) -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib") if name == STDLIB else name)
    if name != STDLIB and root.is_file():
        return [SourceFile(path=root, name=root.name)]
    if not root.is_dir():
        raise ConfigError(f"--input {name}: {root} is neither a file nor a folder")
    wanted = tuple(suffixes or (STDLIB_SUFFIXES if name == STDLIB else FOLDER_SUFFIXES))
    files = [
        SourceFile(path=path, name=path.relative_to(root).as_posix())
        for path in _walk(root)
        if path.suffix.lower() in wanted and path.is_file()
    ]
    if not files:
        raise ConfigError(f"--input {name}: no file below {root} ends in {' '.join(wanted)}; see --suffixes")
    return sorted(files, key=lambda source: source.name)


def _walk(root: Path) -> Iterator[Path]:
    for folder, children, names in os.walk(root):
        children[:] = [child for child in children if not child.startswith(".") and child not in _FOREIGN_FOLDERS]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def read_documents(files: Sequence[SourceFile], json_key: str) -> Iterator[Document]:
    """Read the documents of the files in order, empty ones left out.

    A text file is held out by its name. A line of JSONL is held out by its text, so a line that
    occurs twice is never on both sides.

    Args:
        files: what to read.
        json_key: key of the text in a line of JSONL.

    Raises:
        ConfigError: a file cannot be read, or a line of JSONL is not an object with text under
            `json_key`. The message names file and line.
    """
    for source in files:
        try:
            yield from _read_lines(source, json_key) if source.is_jsonl else _read_whole(source)
        except OSError as error:
            raise ConfigError(f"{source.path} cannot be read ({error.strerror})") from error


def _read_whole(source: SourceFile) -> Iterator[Document]:
    text = source.path.read_bytes()
    if text:
        yield Document(
            place=str(source.path),
            text=text,
            split_key=os.fsencode(source.name),
            bytes_read=len(text),
        )


def _read_lines(source: SourceFile, json_key: str) -> Iterator[Document]:
    with source.path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.isspace():
                continue
            place = f"{source.path}:{number}"
            text = _parse_line(line, json_key, place)
            if text:
                yield Document(place=place, text=text, split_key=text, bytes_read=len(line))


def _parse_line(line: bytes, json_key: str, place: str) -> bytes:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON, one document a line ({error})") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{place} is not a JSON object, one document a line")
    if json_key not in record:
        raise ConfigError(
            f"{place} has no key {json_key!r}, only {', '.join(map(repr, record)) or 'none'}; "
            "choose one with --json-key"
        )
    text = record[json_key]
    if not isinstance(text, str):
        raise ConfigError(f"{place} has no text under {json_key!r} but {type(text).__name__}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place} holds a lone surrogate under {json_key!r}") from error
