"""Check a `.bin/.idx` pair before training maps it into memory.

Layout of the `.idx`, little-endian, as written by
`megatron.core.datasets.indexed_dataset._IndexWriter`: magic (9 bytes), version (uint64), token
dtype code (uint8), number of sequences S (uint64), number of document boundaries D (uint64), then
S int32 lengths in tokens, S int64 byte offsets into the `.bin`, D int64 boundaries counted in
sequences (the first is 0), and for multimodal data S int8 modes.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

from megacontext_megatron.config import ConfigError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_LENGTH = struct.Struct("<i")
_INT64 = struct.Struct("<q")
_MODE_BYTES = 1
_TOKEN_BYTES_BY_CODE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}
_REBUILD = "build the data set again"


@dataclass(frozen=True, kw_only=True)
class _Header:
    token_bytes: int
    sequences: int
    boundaries: int

    @property
    def offsets_at(self) -> int:
        return _HEADER.size + self.sequences * _LENGTH.size

    @property
    def boundaries_at(self) -> int:
        return self.offsets_at + self.sequences * _INT64.size

    @property
    def total_bytes(self) -> int:
        return self.boundaries_at + self.boundaries * _INT64.size


def check_indexed_dataset(prefix: str) -> None:
    """Refuse a data set that Megatron could not read, or would read past the end of.

    Reads the header and the last entry of each table, so the cost does not depend on the size.

    Args:
        prefix: path without `.bin` and `.idx`, as in `--data-path`. Prefixes in object storage
            (`s3://`, `msc://`) are left to Megatron, which downloads their index first.

    Raises:
        ConfigError: a file is missing or unreadable, the `.idx` is foreign, of another version,
            truncated or inconsistent, the `.bin` is shorter than the `.idx` says, or there is no
            document in it. The message names the file.
    """
    if "://" in prefix:
        return
    index_path = _existing_file(prefix, ".idx")
    data_path = _existing_file(prefix, ".bin")
    try:
        needed = _data_bytes_needed(index_path)
        present = data_path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{index_path} cannot be read ({error.strerror})") from error
    if present < needed:
        raise ConfigError(f"{data_path} is truncated: {index_path} says {needed} bytes, it holds {present}; {_REBUILD}")


def _existing_file(prefix: str, suffix: str) -> Path:
    path = Path(prefix + suffix)
    if path.is_file():
        return path
    stem, dot, ending = prefix.rpartition(".")
    if dot and ending in ("bin", "idx") and Path(f"{stem}{suffix}").is_file():
        raise ConfigError(f"--data-path takes the prefix {stem}, without .{ending}")
    raise ConfigError(f"{path} does not exist: --data-path needs {prefix}.bin and {prefix}.idx")


def _data_bytes_needed(path: Path) -> int:
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = _parse_header(path, stream.read(_HEADER.size))
        _check_size(path, header, size)
        if header.sequences == 0 or header.boundaries < 2:
            raise ConfigError(f"{path} holds no documents; {_REBUILD} from input with text")

        def entry(layout: struct.Struct, table_end: int) -> int:
            stream.seek(table_end - layout.size)
            return layout.unpack(stream.read(layout.size))[0]

        length = entry(_LENGTH, header.offsets_at)
        offset = entry(_INT64, header.boundaries_at)
        last_boundary = entry(_INT64, header.total_bytes)
    if length < 0 or offset < 0 or last_boundary != header.sequences:
        raise ConfigError(f"{path} is corrupt: its tables contradict each other; {_REBUILD}")
    needed = offset + length * header.token_bytes
    if needed == 0:
        raise ConfigError(f"{path} holds no tokens; {_REBUILD} from input with text")
    return needed


def _parse_header(path: Path, raw: bytes) -> _Header:
    if not raw.startswith(_MAGIC[: len(raw)]):
        raise ConfigError(f"{path} is not a Megatron index: its first bytes are {raw[:9]!r}")
    if len(raw) < _HEADER.size:
        raise ConfigError(f"{path} is truncated inside its header; {_REBUILD}")
    _, version, code, sequences, boundaries = _HEADER.unpack(raw)
    if version != _VERSION:
        raise ConfigError(f"{path} has index version {version}, only {_VERSION} can be read; {_REBUILD}")
    if code not in _TOKEN_BYTES_BY_CODE:
        raise ConfigError(f"{path} names the unknown token dtype code {code}; {_REBUILD}")
    return _Header(token_bytes=_TOKEN_BYTES_BY_CODE[code], sequences=sequences, boundaries=boundaries)


def _check_size(path: Path, header: _Header, size: int) -> None:
    expected = header.total_bytes
    if size < expected:
        raise ConfigError(f"{path} is truncated: its counts need {expected} bytes, it holds {size}; {_REBUILD}")
    if size not in (expected, expected + header.sequences * _MODE_BYTES):
        raise ConfigError(f"{path} is corrupt: its counts need {expected} bytes, it holds {size}; {_REBUILD}")
