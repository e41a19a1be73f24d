"""Write documents into new `.bin/.idx` pairs with Megatron's own builder, and their manifests."""

import importlib.metadata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from megacontext_megatron.config import ConfigError
from megacontext_megatron.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    TokenizerRecord,
    file_sha256,
    write_manifest,
)
from megacontext_megatron.data.sources import Document
from megacontext_megatron.data.tokenizing import CorpusTokenizer

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

_BATCH_BYTES = 4 * 2**20
_BATCH_DOCUMENTS = 1024
_MAX_DOCUMENT_TOKENS = 2**31 - 1


@dataclass(kw_only=True)
class NewDataset:
    """A data set being written.

    Attributes:
        prefix: where it is written, without `.bin` and `.idx`.
        builder: Megatron's builder for it.
        documents: documents written so far.
        tokens: tokens written so far, EODs included.
    """

    prefix: str
    builder: "IndexedDatasetBuilder" = field(repr=False)
    documents: int = 0
    tokens: int = 0

    def add(self, tokens: np.ndarray) -> None:
        """Append one document of ids, int32 [length]."""
        self.builder.add_document(tokens, [len(tokens)])  # type: ignore[arg-type]
        self.documents += 1
        self.tokens += len(tokens)

    def finish(self, tokenizer: TokenizerRecord, inputs_sha256: str) -> None:
        """Write the index and the manifest."""
        self.builder.finalize(f"{self.prefix}.idx")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            tokenizer=tokenizer,
            documents=self.documents,
            tokens=self.tokens,
            bin_sha256=file_sha256(f"{self.prefix}.bin"),
            idx_sha256=file_sha256(f"{self.prefix}.idx"),
            inputs_sha256=inputs_sha256,
            created_by=f"megacontext_megatron {_package_version()}",
        )
        write_manifest(self.prefix, manifest)


@contextmanager
def new_datasets(prefixes: Iterable[str], vocab_size: int) -> Iterator[list[NewDataset]]:
    """Open one empty data set per prefix, with the token dtype Megatron takes for `vocab_size`."""
    with warnings.catch_warnings():
        # Megatron warns that Transformer Engine and Apex are missing, which no data set needs.
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    dtype = DType.optimal_dtype(vocab_size)
    with ExitStack() as stack:
        datasets = []
        for prefix in prefixes:
            builder = IndexedDatasetBuilder(str(Path(f"{prefix}.bin")), dtype=dtype)
            stream: IO[bytes] = builder.data_file  # type: ignore[assignment]
            stack.callback(stream.close)
            datasets.append(NewDataset(prefix=prefix, builder=builder))
        yield datasets


def write_documents(
    datasets: Sequence[NewDataset],
    documents: Iterable[Document],
    tokenizer: CorpusTokenizer,
    *,
    append_eod: bool,
    held_out: float,
) -> list[str]:
    """Tokenize the documents and append each to the data set it belongs to.

    Args:
        datasets: one for all documents, or two, the second for the documents held out.
        documents: what to write.
        tokenizer: turns text into ids.
        append_eod: end each document with the tokenizer's EOD.
        held_out: fraction of the documents that goes to the second data set.

    Returns:
        The places of the documents left out because the tokenizer cannot read them as text.

    Raises:
        ConfigError: a document is longer than Megatron's index can say.
    """
    skipped = []
    eod = np.array([tokenizer.record.eod_id] if append_eod else [], dtype=np.int32)
    for batch in _batches(documents):
        encoded = tokenizer.encode([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            if ids is None:
                skipped.append(document.place)
            elif len(ids) + len(eod) > _MAX_DOCUMENT_TOKENS:
                raise ConfigError(f"{document.place} is too long for one document: split the file")
            elif len(ids):
                tokens = np.concatenate((ids, eod), dtype=np.int32)
                datasets[int(document.is_held_out(held_out))].add(tokens)
    return skipped


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _package_version() -> str:
    try:
        return importlib.metadata.version("megacontext_megatron")
    except importlib.metadata.PackageNotFoundError:
        return "from a source tree"
