"""Turn documents into token ids: bytes as they are, or any Hugging Face `tokenizer.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megacontext_megatron.config import ConfigError
from megacontext_megatron.data.manifest import (
    BYTE_EOD_ID,
    BYTE_VOCAB_SIZE,
    TokenizerRecord,
    file_sha256,
    find_tokenizer_json,
)

_DEFAULT_EOD_TOKEN = "<|endoftext|>"


class CorpusTokenizer(Protocol):
    """What the corpus builder needs of a tokenizer."""

    @property
    def record(self) -> TokenizerRecord:
        """What the manifest records of this tokenizer."""
        ...

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[np.integer] | None]:
        """Return the ids of each text, [length], without EOD; None where it is not text."""
        ...


class ByteTokenizer:
    """Every byte is its own id, so any file is text; EOD is 256."""

    record = TokenizerRecord(kind="byte", sha256=None, vocab_size=BYTE_VOCAB_SIZE, eod_id=BYTE_EOD_ID)

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[np.integer] | None]:
        """Return the bytes of each text, uint8 [length]."""
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]


class HuggingFaceTokenizer:
    """A `tokenizer.json`, without its truncation, padding and added special tokens.

    Special tokens that are spelled out in a text are encoded as ordinary text, so EOD occurs only
    where a document ends.

    Args:
        model: a `tokenizer.json` or a folder that holds one.
        eod_token: the token that ends a document; None for the `eos_token` of the
            `tokenizer_config.json` beside it, else `<|endoftext|>`.
        needs_eod: refuse a tokenizer whose EOD is unknown.

    Raises:
        ConfigError: a file is missing or unreadable, or there is no such EOD token.
    """

    def __init__(self, model: str, eod_token: str | None, *, needs_eod: bool = True) -> None:
        """Load the file and find EOD."""
        path = find_tokenizer_json(model, "--tokenizer")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for any malformed file
            raise ConfigError(f"--tokenizer {path} is not a tokenizer.json ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.record = TokenizerRecord(
            kind="huggingface",
            sha256=file_sha256(path),
            vocab_size=max(vocabulary.values(), default=-1) + 1,
            eod_id=_find_eod_id(path, vocabulary, eod_token, needs_eod=needs_eod),
        )

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[np.integer] | None]:
        """Return the ids of each text, int64 [length]; None for a text that is not UTF-8."""
        decoded = [_decode(text) for text in texts]
        encodings = iter(
            self._tokenizer.encode_batch_fast([text for text in decoded if text is not None], add_special_tokens=False)
        )
        return [None if text is None else np.array(next(encodings).ids, dtype=np.int64) for text in decoded]


def load_tokenizer(name: str, eod_token: str | None, *, append_eod: bool) -> CorpusTokenizer:
    """Return the tokenizer that `--tokenizer` names.

    Args:
        name: `byte`, or the path of a `tokenizer.json` or of a folder that holds one.
        eod_token: `--eod-token`.
        append_eod: whether documents will end with EOD, which must then be known.

    Raises:
        ConfigError: as `HuggingFaceTokenizer`, or an EOD token was given for bytes.
    """
    if name != "byte":
        return HuggingFaceTokenizer(name, eod_token, needs_eod=append_eod)
    if eod_token is not None:
        raise ConfigError(f"--eod-token does not go with --tokenizer byte: EOD is {BYTE_EOD_ID}")
    return ByteTokenizer()


def _decode(text: bytes) -> str | None:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _find_eod_id(path: Path, vocabulary: dict[str, int], eod_token: str | None, *, needs_eod: bool) -> int | None:
    if eod_token is not None and eod_token not in vocabulary:
        raise ConfigError(f"--eod-token {eod_token} is not in the vocabulary of {path}")
    for token in (eod_token, _configured_eos_token(path), _DEFAULT_EOD_TOKEN):
        if token in vocabulary:
            return vocabulary[token]
    if needs_eod:
        raise ConfigError(f"{path} names no end-of-document token: give one of its tokens with --eod-token")
    return None


def _configured_eos_token(path: Path) -> str | None:
    config_path = path.with_name("tokenizer_config.json")
    try:
        token = json.loads(config_path.read_bytes()).get("eos_token")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{config_path} is not a readable JSON object ({error})") from error
    return token.get("content") if isinstance(token, dict) else token
