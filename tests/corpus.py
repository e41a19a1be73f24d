"""A small byte-level data set of text that every Python carries."""

import sysconfig
from pathlib import Path

EOD = 256
MODULES = (
    "bdb", "calendar", "cmd", "codecs", "contextlib", "copy", "csv", "filecmp", "fnmatch",
    "getopt", "gettext", "glob", "gzip", "heapq", "linecache", "mimetypes", "netrc", "numbers",
)  # fmt: skip


def write_corpus(prefix: str, separator: str | None = None) -> int:
    """Write ``prefix``.bin and .idx, one document a module or a separated part of one; return the number of tokens.

    A token is a byte as uint16, and every document ends with EOD.
    """
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    library = Path(sysconfig.get_paths()["stdlib"])
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    tokens = 0
    for module in MODULES:
        text = (library / f"{module}.py").read_bytes()
        for part in text.split(separator.encode()) if separator else [text]:
            document = torch.tensor([*part, EOD])
            builder.add_document(document, [len(document)])
            tokens += len(document)
    builder.finalize(prefix + ".idx")
    return tokens
