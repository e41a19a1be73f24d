"""The teacher cache: logits and pooled states of a full-context teacher for the first raw samples of a run, on disk.

A folder of three arrays over N samples and a manifest.  Values are bfloat16, whose bits NumPy reads as uint16:
`logits.npy` [N, H, vocabulary], of the last H tokens; `states.npy` [N, C / K, h], final hidden states averaged over
each block; `digests.npy`, uint32 [N], of the samples' tokens.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megacontext_megatron.config import ConfigError

MANIFEST = "manifest.json"
LOGITS, STATES, DIGESTS = "logits", "states", "digests"
FORMAT_VERSION = 1
Bits = NDArray[np.uint16]

FLAGS = {
    "source_length": "--mc-source-length",
    "block_size": "--mc-block-size",
    "horizon": "--mc-horizon",
    "vocabulary": "--vocab-size or the tokenizer",
    "seed": "--seed",
    "data": "--data-path or its kin",
    "split": "--split",
    "hidden_size": "--hidden-size",
}
"""What a run must share with its cache, and the flags that say so."""


@dataclass(frozen=True, kw_only=True)
class TeacherManifest:
    """What a cache was made of: C, K and H, sizes, the data and its order, and the teacher."""

    source_length: int
    block_size: int
    horizon: int
    vocabulary: int
    hidden_size: int
    seed: int
    data: tuple[str, ...]
    split: str
    samples: int
    checkpoint: str
    iteration: int
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Return the manifest of the cache in a folder; raises ConfigError where there is none that can be read."""
        path = Path(folder) / MANIFEST
        try:
            values = json.loads(path.read_text())
            if values["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format {values['format_version']}")
            return cls(**{**values, "data": tuple(values["data"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"--mc-teacher-path {folder} holds no teacher cache ({path}: {error}): make one with "
                "python -m megacontext_megatron.teacher."
            ) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array for one sample."""
        blocks = self.source_length // self.block_size
        return {LOGITS: (self.horizon, self.vocabulary), STATES: (blocks, self.hidden_size), DIGESTS: ()}[name]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each array's values."""
        return {
            name: self.samples * int(np.prod(self.shape(name), dtype=np.int64)) * _dtype(name).itemsize
            for name in (LOGITS, STATES, DIGESTS)
        }

    def check(self, run: TeacherManifest, folder: str, *, states: bool) -> None:
        """Refuse a run that the cache in `folder` was not made for; `run.samples` is what it needs.

        The hidden size matters only where `states` are read.  Raises ConfigError naming flag and file.
        """
        path = Path(folder) / MANIFEST
        for name, flag in FLAGS.items():
            cached, asked = getattr(self, name), getattr(run, name)
            if cached != asked and (states or name != "hidden_size"):
                raise ConfigError(
                    f"{path} was made with {_shown(cached)}, this run has {_shown(asked)} ({flag}): use the same, or "
                    "make another cache for --mc-teacher-path."
                )
        if run.samples > self.samples:
            raise ConfigError(
                f"{path} holds {self.samples} raw samples and --train-iters or --train-samples needs {run.samples}: "
                f"make a cache with --mc-teacher-samples {run.samples}."
            )


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(np.uint32 if name == DIGESTS else np.uint16)


def text_digest(text: Tensor) -> int:
    """Return a checksum of a raw sample's tokens, int64 on the CPU."""
    return zlib.crc32(text.numpy().tobytes())


class TeacherCache:
    """Reads what a teacher says of raw samples; data loader workers may receive it, and each maps the files itself."""

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        """Read the arrays `names` of the cache; raises ConfigError for missing or damaged files."""
        self._folder, self._names = Path(folder), tuple(names)
        self.manifest = TeacherManifest.read(folder)
        self._arrays: dict[str, NDArray[Any]] = {}
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the maps behind."""
        return {**self.__dict__, "_arrays": {}}

    def __call__(self, sample: int, text: Tensor) -> dict[str, Tensor]:
        """Return the bf16 arrays of a raw sample by name.

        Raises RuntimeError for a sample beyond the cache or with another text than the teacher read.
        """
        if not self._arrays:
            self._open()
        if sample >= self.manifest.samples:
            raise RuntimeError(f"{self._folder} holds {self.manifest.samples} raw samples, not number {sample}")
        if int(self._arrays[DIGESTS][sample]) != text_digest(text):
            raise RuntimeError(f"{self._folder} was made of another text than this run's raw sample {sample}")
        # Copied, because a tensor over a read-only map could be written to.
        return {name: as_bfloat16(np.array(self._arrays[name][sample])) for name in self._names}

    def _open(self) -> None:
        for name in (DIGESTS, *self._names):
            self._arrays[name] = _mapped(self._folder, name, self.manifest)


def _mapped(folder: Path, name: str, manifest: TeacherManifest) -> NDArray[Any]:
    path = folder / f"{name}.npy"
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): make another cache for --mc-teacher-path.") from error
    shape = (manifest.samples, *manifest.shape(name))
    if array.shape != shape or array.dtype != _dtype(name):
        raise ConfigError(
            f"{path} holds {array.dtype} {list(array.shape)} instead of {_dtype(name)} {list(shape)}: make another "
            "cache for --mc-teacher-path."
        )
    return array


def as_bfloat16(bits: Bits) -> Tensor:
    """Return bf16 values from their bits."""
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def as_bits(values: Tensor) -> Bits:
    """Return the bits of values on the CPU, rounded to bf16."""
    return values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)


def partial_folder(folder: Path) -> Path:
    """Return the folder in which a cache is written."""
    return folder.with_name(f"{folder.name}.partial")


class CacheWriter:
    """Writes a cache into a folder beside its own, which takes its name when it is complete.

    One process creates it, others may `join` and write samples of their own.
    """

    def __init__(self, folder: Path, manifest: TeacherManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._part = partial_folder(folder)

    @staticmethod
    def check(folder: Path) -> None:
        """Refuse a folder that exists, or in which another writer is at work or was interrupted; raises ConfigError."""
        if folder.exists():
            raise ConfigError(f"--mc-teacher-path {folder} exists: remove it, or name another folder.")
        part = partial_folder(folder)
        if part.exists():
            raise ConfigError(
                f"{part} exists, of an interrupted or another teacher: remove it, or name another --mc-teacher-path."
            )

    def create(self) -> None:
        """Make the files; raises FileExistsError where another writer has."""
        self._part.mkdir(parents=True)
        for name in (LOGITS, STATES, DIGESTS):
            shape = (self.manifest.samples, *self.manifest.shape(name))
            np.lib.format.open_memmap(self._part / f"{name}.npy", mode="w+", dtype=_dtype(name), shape=shape)

    def join(self) -> None:
        """Open the files that were created."""
        self._arrays = {
            name: np.lib.format.open_memmap(self._part / f"{name}.npy", mode="r+") for name in (LOGITS, STATES, DIGESTS)
        }

    def write(self, sample: int, text: Tensor, logits: Tensor, states: Tensor) -> None:
        """Write one sample: its text, logits [H, vocabulary] and states [C / K, h], on the CPU."""
        self._arrays[LOGITS][sample] = as_bits(logits)
        self._arrays[STATES][sample] = as_bits(states)
        self._arrays[DIGESTS][sample] = text_digest(text)

    def flush(self) -> None:
        """Hand what was written to the file system."""
        for array in self._arrays.values():
            array.flush()

    def publish(self) -> None:
        """Write the manifest and give the folder its name, once all writers have flushed."""
        text = json.dumps(dataclasses.asdict(self.manifest), indent=1)
        (self._part / MANIFEST).write_text(text + "\n")
        self._part.rename(self.folder)

    def discard(self) -> None:
        """Remove what was created."""
        shutil.rmtree(self._part, ignore_errors=True)
