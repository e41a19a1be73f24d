"""The corpus builder: from text on disk to what Megatron's own reader gives back."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megacontext_megatron.config import ConfigError
from megacontext_megatron.data.corpus import CorpusSettings, build_corpus, main
from megacontext_megatron.data.manifest import file_sha256, read_manifest
from megacontext_megatron.data.sources import find_files

EOD = 256
LATIN_1 = "caf\u00e9".encode("latin-1")
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of text with things beside it that must not be read."""
    ignored = {"empty.txt": b"", "image.png": b"\x89PNG", ".git/x.txt": b"no", "b/.y.md": b"no"}
    return write_files(tmp_path / "text", {**FILES, **ignored})


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Return an output prefix in a folder that does not exist yet."""
    return str(tmp_path / "out" / "corpus")


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def build(source: Path | str, prefix: str, **settings: object) -> bool:
    """Build a corpus of one input."""
    return build_corpus(CorpusSettings(inputs=(str(source),), output_prefix=prefix, **settings))


def documents(prefix: str) -> list[list[int]]:
    """Read all documents with Megatron's reader."""
    dataset = IndexedDataset(prefix)
    boundaries = dataset.document_indices.tolist()
    assert boundaries == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def texts(prefix: str) -> list[bytes]:
    """Read all documents of a byte data set without their EOD."""
    found = documents(prefix)
    assert all(document[-1] == EOD for document in found)
    return [bytes(document[:-1]) for document in found]


def snapshot(prefix: str) -> dict[str, tuple[int, int, bytes]]:
    """Return inode, time of change and content of every file beside the prefix."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in Path(prefix).parent.iterdir()
    }


def test_bytes_round_trip(folder: Path, prefix: str) -> None:
    """A document is the file's bytes and one EOD, in the order of the names."""
    assert build(folder, prefix)
    assert documents(prefix) == [[*FILES[name], EOD] for name in IN_ORDER]
    assert IndexedDataset(prefix).index.dtype == np.uint16


def test_manifest_describes_what_was_written(folder: Path, prefix: str) -> None:
    """Counts and hashes are those of the files."""
    build(folder, prefix)
    manifest = read_manifest(prefix)
    assert manifest is not None
    assert manifest.documents == len(FILES)
    assert manifest.tokens == sum(map(len, FILES.values())) + len(FILES)
    assert manifest.bin_sha256 == file_sha256(f"{prefix}.bin")
    assert manifest.idx_sha256 == file_sha256(f"{prefix}.idx")
    assert (manifest.tokenizer.kind, manifest.tokenizer.eod_id) == ("byte", EOD)


def test_without_eod(folder: Path, prefix: str) -> None:
    """EOD can be left out."""
    build(folder, prefix, append_eod=False)
    assert documents(prefix) == [list(FILES[name]) for name in IN_ORDER]


def test_huggingface_round_trip(folder: Path, prefix: str, tokenizer_json: Path) -> None:
    """Texts come back whole, and EOD stands only where a document ends."""
    build(folder, prefix, tokenizer=str(tokenizer_json))
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    eod = tokenizer.token_to_id("<|endoftext|>")
    found = documents(prefix)
    assert [document.index(eod) for document in found] == [len(document) - 1 for document in found]
    decoded = [tokenizer.decode(document[:-1], skip_special_tokens=False) for document in found]
    assert decoded == [FILES[name].decode() for name in IN_ORDER]


def test_large_vocabulary_takes_int32(folder: Path, prefix: str, tmp_path: Path) -> None:
    """Ids above 65499 survive."""
    vocabulary = {f"w{i}": i for i in range(70_000)} | {"<|endoftext|>": 70_000}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = write_files(tmp_path / "words", {"a.txt": b"w1 w69999 other"})
    build(source, prefix, tokenizer=str(tmp_path))
    assert documents(prefix) == [[1, 69_999, 0, 70_000]]
    assert IndexedDataset(prefix).index.dtype == np.int32


def test_text_that_is_not_utf8(
    tmp_path: Path, prefix: str, tokenizer_json: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes take it as it is; a Hugging Face tokenizer leaves it out and says so."""
    source = write_files(tmp_path / "text", {"a.txt": LATIN_1, "b.txt": b"one"})
    build(source, prefix)
    assert texts(prefix) == [LATIN_1, b"one"]
    assert capsys.readouterr().err == ""
    build(source, f"{prefix}_bpe", tokenizer=str(tokenizer_json))
    assert len(documents(f"{prefix}_bpe")) == 1
    assert capsys.readouterr().err == (
        f"left out 1 documents that are not UTF-8: {source / 'a.txt'}\n"
    )


def write_tokenizer(folder: Path, tokens: Sequence[str], config: str | None = None) -> Path:
    """Write a word tokenizer with the given tokens and return its folder."""
    folder.mkdir()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])).save(
        str(folder / "tokenizer.json")
    )
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config)
    return folder


@pytest.mark.parametrize(
    ("config", "eod_token", "expected"),
    [
        (None, None, 2),
        ("{}", None, 2),
        ('{"eos_token": "</s>"}', None, 1),
        ('{"eos_token": {"content": "</s>", "special": true}}', None, 1),
        ('{"eos_token": "</s>"}', "w", 0),
    ],
)
def test_eod_of_a_huggingface_tokenizer(
    folder: Path, prefix: str, tmp_path: Path, config: str, eod_token: str, expected: int
) -> None:
    """The flag wins over the configured eos_token, that over <|endoftext|>."""
    model = write_tokenizer(tmp_path / "model", ["w", "</s>", "<|endoftext|>"], config)
    build(folder, prefix, tokenizer=str(model), eod_token=eod_token)
    assert {document[-1] for document in documents(prefix)} == {expected}


def test_unknown_eod(folder: Path, prefix: str, tmp_path: Path) -> None:
    """A tokenizer without a known EOD is usable only without EOD."""
    model = write_tokenizer(tmp_path / "model", ["w", "v"])
    with pytest.raises(ConfigError, match="--eod-token"):
        build(folder, prefix, tokenizer=str(model))
    with pytest.raises(ConfigError, match="--eod-token x is not in the vocabulary"):
        build(folder, prefix, tokenizer=str(model), eod_token="x")
    build(folder, prefix, tokenizer=str(model), append_eod=False)
    manifest = read_manifest(prefix)
    assert manifest is not None
    assert manifest.tokenizer.eod_id is None


@pytest.mark.parametrize("name", ["missing", "a.txt", ""])
def test_unusable_tokenizer(folder: Path, prefix: str, name: str) -> None:
    """A path without a tokenizer.json, or with something else in it, is refused by name."""
    with pytest.raises(ConfigError, match=rf"--tokenizer {folder / name}"):
        build(folder, prefix, tokenizer=str(folder / name))


def test_jsonl(tmp_path: Path, prefix: str) -> None:
    """Each line is a document; empty lines and empty texts are none."""
    lines = ['{"body": "one\\n", "n": 1}', "", '{"body": ""}', '{"n": 2, "body": "\\u00fc"}']
    source = tmp_path / "lines.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    build(source, prefix, json_key="body")
    assert texts(prefix) == [b"one\n", "\u00fc".encode()]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "is not JSON"),
        (b'{"text": "\xff"}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'["text"]', "is not a JSON object"),
        (b'{"body": "x"}', "has no key 'text', only 'body'"),
        (b'{"text": 3}', "has no text under 'text' but int"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
    ],
)
def test_bad_line_is_named_and_nothing_is_lost(
    tmp_path: Path, prefix: str, line: bytes, reason: str
) -> None:
    """The message names file and line; what was there before stays, and nothing is left over."""
    source = tmp_path / "lines.jsonl"
    source.write_bytes(b'{"text": "one"}\n')
    build(source, prefix)
    before = snapshot(prefix)
    source.write_bytes(b'{"text": "two"}\n' * 3000 + line)
    with pytest.raises(ConfigError, match=rf"^{source}:3001 .*{reason}"):
        build(source, prefix, overwrite=True)
    assert snapshot(prefix) == before


@pytest.mark.parametrize(
    ("signal_number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)]
)
def test_interrupted_build_leaves_the_old_data(
    tmp_path: Path, prefix: str, signal_number: int, status: int
) -> None:
    """A process stopped while it writes does not touch the data set that is there."""
    source = tmp_path / "lines.jsonl"
    source.write_bytes(b'{"text": "one"}\n')
    build(source, prefix)
    before = snapshot(prefix)
    source.write_bytes(b'{"text": "a longer text for each of many lines"}\n' * 300_000)
    flags = ["--input", str(source), "--output-prefix", prefix, "--overwrite"]
    process = multiprocessing.get_context("fork").Process(target=main, args=(flags,))
    process.start()
    deadline = time.monotonic() + 30
    while not any(p.stat().st_size for p in Path(prefix).parent.glob(".building-*/*.bin")):
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid or 0, signal_number)
    process.join(30)
    assert process.exitcode == status
    after = {name: state for name, state in _files(prefix).items()}
    assert after == before
    build(source, prefix, overwrite=True, max_bytes=1000)
    assert len(documents(prefix)) == 1000 // len("a longer text for each of many lines")


def _files(prefix: str) -> dict[str, tuple[int, int, bytes]]:
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in Path(prefix).parent.iterdir()
        if path.is_file()
    }


def many_files(root: Path, count: int) -> Path:
    """Write files whose text is their name."""
    return write_files(root, {f"{i:03d}.txt": f"{i:03d}".encode() for i in range(count)})


def test_held_out_split(tmp_path: Path, prefix: str) -> None:
    """The parts are disjoint, complete and near the fraction asked for."""
    source = many_files(tmp_path / "text", 400)
    build(source, prefix, held_out=0.2)
    train, valid = texts(f"{prefix}_train"), texts(f"{prefix}_valid")
    assert sorted(train + valid) == [f"{i:03d}".encode() for i in range(400)]
    assert 0.1 < len(valid) / 400 < 0.3
    assert not Path(f"{prefix}.bin").exists()


def test_held_out_split_depends_on_the_name_alone(tmp_path: Path, prefix: str) -> None:
    """Where the folder lies, what else is in it and what a file says do not move a file."""
    build(many_files(tmp_path / "text", 100), f"{prefix}_few", held_out=0.2)
    more = many_files(tmp_path / "elsewhere" / "text", 200)
    for path in more.glob("1*.txt"):
        path.write_bytes(path.read_bytes() + b"changed")
    build(more, f"{prefix}_more", held_out=0.2)
    few = set(texts(f"{prefix}_few_valid"))
    assert few == {text for text in texts(f"{prefix}_more_valid") if text < b"100"}


def test_repeated_lines_are_held_out_together(tmp_path: Path, prefix: str) -> None:
    """No line of JSONL is in both parts."""
    source = tmp_path / "lines.jsonl"
    source.write_text("".join(json.dumps({"text": f"{i % 50}"}) + "\n" for i in range(500)))
    build(source, prefix, held_out=0.2)
    train, valid = texts(f"{prefix}_train"), texts(f"{prefix}_valid")
    assert len(train) + len(valid) == 500
    assert set(train).isdisjoint(valid)


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_repeated_build_does_nothing(
    tmp_path: Path, prefix: str, held_out: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run writes nothing, with or without --overwrite, and says so."""
    source = many_files(tmp_path / "text", 50)
    flags = ["--input", str(source), "--output-prefix", prefix, "--held-out", str(held_out)]
    main(flags)
    assert "written, " in capsys.readouterr().out
    before = snapshot(prefix)
    main(flags)
    main([*flags, "--overwrite"])
    assert snapshot(prefix) == before
    output = capsys.readouterr()
    assert output.out.count("up to date, ") == (4 if held_out else 2)
    assert "written" not in output.out
    assert output.err == ""


def test_repeated_build_is_quick(folder: Path, prefix: str) -> None:
    """Neither torch nor Megatron is imported to find that all is up to date."""
    build(folder, prefix)
    program = (
        "import sys; from megacontext_megatron.data.corpus import main; main(sys.argv[1:]); "
        "sys.exit(bool({'torch', 'megatron.core'} & set(sys.modules)))"
    )
    flags = ["--input", str(folder), "--output-prefix", prefix]
    done = subprocess.run([sys.executable, "-c", program, *flags], check=False, timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "change",
    [
        {"append_eod": False},
        {"max_bytes": 40},
        {"held_out": 0.5},
        {"suffixes": (".txt", ".py")},
        {"tokenizer": "bpe"},
        {"file": "a.txt"},
        {"damage": ".bin"},
        {"damage": ".idx"},
        {"damage": ".manifest.json"},
        {"remove": ".manifest.json"},
    ],
    ids=str,
)
def test_other_data_is_replaced_only_on_request(
    folder: Path, tmp_path: Path, prefix: str, tokenizer_json: Path, change: dict[str, object]
) -> None:
    """Any difference is seen, refused, and replaced with --overwrite."""
    for name in (prefix, f"{prefix}_train", f"{prefix}_valid"):
        build(folder, name)
    settings = dict(change)
    if settings.get("tokenizer"):
        settings["tokenizer"] = str(tokenizer_json)
    if name := settings.pop("file", None):
        (folder / str(name)).write_bytes(b"One")
    if suffix := settings.pop("damage", None):
        path = Path(f"{prefix}{suffix}")
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    if suffix := settings.pop("remove", None):
        Path(f"{prefix}{suffix}").unlink()
    before = snapshot(prefix)
    with pytest.raises(ConfigError, match=rf"{prefix}.* exists and .*--overwrite"):
        build(folder, prefix, **settings)
    assert snapshot(prefix) == before
    assert build(folder, prefix, overwrite=True, **settings)
    assert not build(folder, prefix, **settings)


def test_limit_on_the_text(folder: Path, prefix: str) -> None:
    """Whole documents are taken as long as they fit together."""
    sizes = [len(FILES[name]) for name in IN_ORDER]
    build(folder, prefix, max_bytes=sum(sizes[:3]))
    assert texts(prefix) == [FILES[name] for name in IN_ORDER[:3]]
    build(folder, f"{prefix}_less", max_bytes=sum(sizes[:3]) - 1)
    assert texts(f"{prefix}_less") == [FILES[name] for name in IN_ORDER[:2]]


def test_inputs_are_taken_once_in_the_order_given(folder: Path, prefix: str) -> None:
    """A file named twice is read once; its suffix does not matter when it is named."""
    inputs = (str(folder / "b"), str(folder / "image.png"), str(folder))
    build_corpus(CorpusSettings(inputs=inputs, output_prefix=prefix))
    names = ["b/c/three.md", "b/two.py", "a.txt", "b.rst"]
    expected = [FILES[name] for name in names]
    assert texts(prefix) == [*expected[:2], b"\x89PNG", *expected[2:]]


def test_standard_library(prefix: str) -> None:
    """The library's own text comes first to last, without what was installed into it."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [source.name for source in find_files(["stdlib"])]
    assert {"ast.py", "json/decoder.py", "LICENSE.txt"} & set(names)
    assert not [name for name in names if "-packages/" in name]
    assert {Path(name).suffix for name in names} <= {".py", ".rst", ".txt"}
    build("stdlib", prefix, max_bytes=200_000)
    found = texts(prefix)
    full = [text for name in names if (text := (root / name).read_bytes())]
    assert found == full[: len(found)]
    assert 100_000 < sum(map(len, found)) <= 200_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "{folder}/none"], "--input {folder}/none"),
        (["--input", "{folder}", "--suffixes", "tex"], "--suffixes"),
        (["--input", "{folder}/empty.txt"], "--input {folder}/empty.txt leaves no document"),
        (["--input", "{folder}", "--max-bytes", "1"], "--max-bytes 1 leaves no document"),
        (["--input", "{folder}", "--max-bytes", "0"], "--max-bytes 0"),
        (["--input", "{folder}", "--held-out", "1e-9"], "--held-out 1e-09 leaves no document"),
        (["--input", "{folder}", "--held-out", "1.5"], "--held-out 1.5"),
        (["--input", "{folder}", "--held-out", "nan"], "--held-out nan"),
        (["--input", "{folder}", "--eod-token", "x"], "--eod-token"),
        (["--input", "{folder}", "--output-prefix", "{folder}/"], "--output-prefix {folder}/"),
    ],
)
def test_refused_requests(
    folder: Path,
    prefix: str,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    """The command exits with 2 and one line that names the flag; no file is left over."""
    flags = [flag.format(folder=folder) for flag in flags]
    with pytest.raises(SystemExit) as caught:
        main(["--output-prefix", prefix, *flags])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message.format(folder=folder) in error
    assert not list(Path(prefix).parent.glob("*"))


def test_unreadable_input(folder: Path, prefix: str) -> None:
    """A file that vanishes behind a link is passed over, one that is a loop is not followed."""
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder)
    build(folder, prefix)
    assert texts(prefix) == [FILES[name] for name in IN_ORDER]
