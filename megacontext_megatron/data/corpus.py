"""Build Megatron's indexed data set from text: `python -m megacontext_megatron.data.corpus`."""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from megacontext_megatron.config import ConfigError
from megacontext_megatron.data.indexed import check_indexed_dataset
from megacontext_megatron.data.manifest import (
    FORMAT_VERSION,
    TokenizerRecord,
    file_sha256,
    manifest_path,
    read_manifest,
)
from megacontext_megatron.data.sources import (
    FOLDER_SUFFIXES,
    STDLIB,
    STDLIB_SUFFIXES,
    Document,
    SourceFile,
    find_files,
    read_documents,
)
from megacontext_megatron.data.tokenizing import load_tokenizer
from megacontext_megatron.data.writing import NewDataset, new_datasets, write_documents

_SKIPPED_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """What to build.

    Attributes:
        inputs: files, folders, or `stdlib`.
        output_prefix: path of the data set without `.bin` and `.idx`.
        tokenizer: `byte`, or a `tokenizer.json`, or a folder that holds one.
        json_key: key of the text in a line of JSONL.
        suffixes: endings, with their dot, of the files to take from folders; None for the
            defaults.
        held_out: fraction of the documents that goes to `PREFIX_valid`, the rest to
            `PREFIX_train`; 0 for one data set at `PREFIX`.
        append_eod: end each document with EOD.
        eod_token: EOD of a Hugging Face tokenizer; None to find it.
        max_bytes: stop before the document that would pass this many bytes of text.
        overwrite: replace data sets that exist.

    Raises:
        ConfigError: a value is out of range.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: str = "byte"
    json_key: str = "text"
    suffixes: tuple[str, ...] | None = None
    held_out: float = 0.0
    append_eod: bool = True
    eod_token: str | None = None
    max_bytes: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check each value by itself."""
        if not 0.0 <= self.held_out < 1.0:
            raise ConfigError(f"--held-out {self.held_out} must be a fraction from 0 up to below 1")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError(f"--max-bytes {self.max_bytes} must be at least 1")
        if not Path(self.output_prefix).name or self.output_prefix.endswith(("/", os.sep)):
            raise ConfigError(f"--output-prefix {self.output_prefix} must end in a file name")

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The data sets to build: `PREFIX`, or `PREFIX_train` and `PREFIX_valid`."""
        if self.held_out == 0.0:
            return (self.output_prefix,)
        return (f"{self.output_prefix}_train", f"{self.output_prefix}_valid")


def build_corpus(settings: CorpusSettings) -> bool:
    """Build the data sets, unless they are there already, made of the same text.

    Everything is written beside the destination under a temporary name and renamed at the end, so
    an interrupted build leaves what was there.

    Returns:
        Whether anything was written; False if all was up to date.

    Raises:
        ConfigError: the input or the tokenizer cannot be used, nothing is left to write, or a
            different data set exists and `overwrite` is off.
    """
    tokenizer = load_tokenizer(settings.tokenizer, settings.eod_token, append_eod=settings.append_eod)
    files = find_files(settings.inputs, settings.suffixes)
    inputs_sha256 = _hash_inputs(files, tokenizer.record, settings)
    if all(_is_up_to_date(prefix, inputs_sha256) for prefix in settings.prefixes):
        return False
    if not settings.overwrite:
        _refuse_existing(settings.prefixes)
    parent = Path(settings.output_prefix).parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=parent) as folder:
        unfinished = [str(Path(folder, Path(prefix).name)) for prefix in settings.prefixes]
        with (
            new_datasets(unfinished, tokenizer.record.vocab_size) as datasets,
            closing(_limited(files, settings)) as documents,
        ):
            skipped = write_documents(
                datasets,
                documents,
                tokenizer,
                append_eod=settings.append_eod,
                held_out=settings.held_out,
            )
            _report_skipped(skipped)
            _refuse_empty(datasets, settings)
            for dataset in datasets:
                dataset.finish(tokenizer.record, inputs_sha256)
        for source, destination in zip(unfinished, settings.prefixes, strict=True):
            _move(source, destination)
    return True


def _files_of(prefix: str) -> tuple[Path, Path, Path]:
    return manifest_path(prefix), Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def _move(source: str, destination: str) -> None:
    # The manifest goes first: it holds the hash of the index, which comes last, so a data set
    # caught between two renames is recognised as unfinished.
    for old, new in zip(_files_of(source), _files_of(destination), strict=True):
        os.replace(old, new)


def _hash_inputs(files: Iterable[SourceFile], record: TokenizerRecord, settings: CorpusSettings) -> str:
    described = {
        "format_version": FORMAT_VERSION,
        "tokenizer": asdict(record),
        "json_key": settings.json_key,
        "held_out": settings.held_out,
        "append_eod": settings.append_eod,
        "max_bytes": settings.max_bytes,
        "files": [(source.name, file_sha256(source.path)) for source in files],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _is_up_to_date(prefix: str, inputs_sha256: str) -> bool:
    _, data_path, index_path = _files_of(prefix)
    try:
        manifest = read_manifest(prefix)
        if manifest is None or manifest.inputs_sha256 != inputs_sha256:
            return False
        check_indexed_dataset(prefix)
        return file_sha256(index_path) == manifest.idx_sha256 and file_sha256(data_path) == manifest.bin_sha256
    except ConfigError:
        return False


def _refuse_existing(prefixes: Iterable[str]) -> None:
    for prefix in prefixes:
        for path in _files_of(prefix):
            if path.exists():
                raise ConfigError(
                    f"{path} exists and was not made from this input with these settings: choose "
                    "another --output-prefix, or replace it with --overwrite"
                )


def _refuse_empty(datasets: Iterable[NewDataset], settings: CorpusSettings) -> None:
    for dataset, prefix in zip(datasets, settings.prefixes, strict=True):
        if dataset.documents == 0:
            flags = f"--input {' '.join(settings.inputs)}"
            flags += f" --held-out {settings.held_out}" if settings.held_out else ""
            flags += f" --max-bytes {settings.max_bytes}" if settings.max_bytes else ""
            raise ConfigError(f"{flags} leaves no document for {prefix}")


def _report_skipped(skipped: list[str]) -> None:
    if skipped:
        names = skipped[:_SKIPPED_SHOWN] + ["..."] * (len(skipped) > _SKIPPED_SHOWN)
        message = f"left out {len(skipped)} documents that are not UTF-8: {', '.join(names)}"
        print(message, file=sys.stderr)


def _limited(files: Sequence[SourceFile], settings: CorpusSettings) -> Generator[Document]:
    console = Console(stderr=True)
    total = sum(source.path.stat().st_size for source in files)
    limit = total if settings.max_bytes is None else settings.max_bytes
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    text_bytes = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=min(total, limit))
        for document in read_documents(files, settings.json_key):
            text_bytes += len(document.text)
            if settings.max_bytes is not None and text_bytes > limit:
                return
            yield document
            bar.advance(task, document.bytes_read)


def _suffix(text: str) -> str:
    return "." + text.lower().lstrip(".")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megacontext_megatron.data.corpus",
        description="Turn text files, folders or JSONL into Megatron's PREFIX.bin and PREFIX.idx. "
        "Quick when repeated: data sets made from the same input are kept.",
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        dest="inputs",
        help="text files; .jsonl, .ndjson or .json files, one document a line; folders, searched "
        f"recursively; or the word {STDLIB}: the text of this Python's standard library "
        f"(./{STDLIB} for a folder of that name)",
    )
    add("--output-prefix", required=True, metavar="PREFIX", help="path without .bin and .idx")
    add(
        "--tokenizer",
        default="byte",
        metavar="byte|PATH",
        help="byte (default), or a tokenizer.json, or a folder that holds one",
    )
    add("--json-key", default="text", metavar="KEY", help="key of the text in JSONL (text)")
    add(
        "--suffixes",
        nargs="+",
        type=_suffix,
        metavar="SUFFIX",
        help=f"files to take from folders ({' '.join(FOLDER_SUFFIXES)}; of the standard library "
        f"{' '.join(STDLIB_SUFFIXES)})",
    )
    add(
        "--held-out",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="put this fraction of the files (of JSONL: of the lines) into PREFIX_valid and the "
        "rest into PREFIX_train, chosen by a hash of the name (of JSONL: of the text)",
    )
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token (default: yes)",
    )
    add("--eod-token", metavar="TOKEN", help="that token, if the tokenizer's files do not say")
    add(
        "--max-bytes",
        type=int,
        metavar="N",
        help="stop before the document that would pass N bytes of text",
    )
    add("--overwrite", action="store_true", help="replace data sets made from something else")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Build the data sets that the command line asks for and print what they hold.

    Exits with 2 and one sentence on standard error when the request cannot be honoured.
    """
    parser = make_parser()
    flags = vars(parser.parse_args(argv))
    flags["inputs"] = tuple(flags["inputs"])
    flags["suffixes"] = tuple(flags["suffixes"]) if flags["suffixes"] else None
    try:
        settings = CorpusSettings(**flags)
        written = build_corpus(settings)
    except (ConfigError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted before the data sets were complete\n")
    for prefix in settings.prefixes:
        manifest = read_manifest(prefix)
        assert manifest is not None
        state = "written" if written else "up to date"
        print(f"{prefix}: {state}, {manifest.documents:,} documents, {manifest.tokens:,} tokens")


if __name__ == "__main__":
    main()
