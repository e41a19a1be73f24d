"""Text to build data sets from, tokenizers to build them with, and their documents read back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megacontext_megatron.data.corpus import CorpusSettings, build_corpus

EOD = 256
FILES = {
    "b/two.py": b"print('two')\n",
    "a.txt": "one \u00fc <|endoftext|> two".encode(),
    "b/c/three.md": b"# three",
    "b.rst": b"\r\n",
}
IN_ORDER = ["a.txt", "b.rst", "b/c/three.md", "b/two.py"]


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    """Write files below `root` and return it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return root


def write_folder(root: Path) -> Path:
    """Write FILES and, beside them, things that must not be read."""
    ignored = {"empty.txt": b"", "image.png": b"\x89PNG", ".git/x.txt": b"no", "b/.y.md": b"no"}
    return write_files(root, {**FILES, **ignored})


def write_tokenizer(folder: Path, tokens: Sequence[str], config: str | None = None) -> Path:
    """Write a word tokenizer with the given tokens and return its folder."""
    folder.mkdir()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])).save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config)
    return folder


def write_bpe(folder: Path) -> Path:
    """Train a small BPE that, like many published ones, truncates, pads and adds tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["one two three"] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def build(source: Path | str, prefix: str, **settings: Any) -> bool:
    """Build a corpus of one input."""
    return build_corpus(CorpusSettings(inputs=(str(source),), output_prefix=prefix, **settings))


def documents(prefix: str) -> list[list[int]]:
    """Read all documents with Megatron's reader."""
    dataset = IndexedDataset(prefix)
    boundaries = dataset.document_indices.tolist()
    assert boundaries == list(range(len(dataset) + 1))
    return [np.asarray(dataset[i]).tolist() for i in range(len(dataset))]


def texts(prefix: str) -> list[bytes]:
    """Read all documents of a byte data set without their EOD."""
    found = documents(prefix)
    assert all(document[-1] == EOD for document in found)
    return [bytes(document[:-1]) for document in found]


def many_files(root: Path, count: int) -> Path:
    """Write files whose text is their name."""
    return write_files(root, {f"{i:03d}.txt": f"{i:03d}".encode() for i in range(count)})
