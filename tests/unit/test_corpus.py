"""The corpus builder's command: what it writes, keeps, replaces and refuses."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megacontext_megatron.config import ConfigError
from megacontext_megatron.data.corpus import main
from megacontext_megatron.data.manifest import (
    TrainingTokenizer,
    check_tokenizer,
    file_sha256,
    read_manifest,
)
from tests.unit.corpora import (
    EOD,
    FILES,
    IN_ORDER,
    build,
    documents,
    many_files,
    write_bpe,
    write_folder,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of text."""
    return write_folder(tmp_path / "text")


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Return an output prefix in a folder that does not exist yet."""
    return str(tmp_path / "out" / "corpus.v1")


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a trained tokenizer."""
    return write_bpe(tmp_path_factory.mktemp("tokenizer"))


def snapshot(prefix: str) -> dict[str, tuple[int, int, bytes]]:
    """Return inode, time of change and content of every file beside the prefix."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in Path(prefix).parent.iterdir()
        if path.is_file()
    }


def unfinished(prefix: str) -> list[Path]:
    """Return the folders of unfinished files beside the prefix."""
    return list(Path(prefix).parent.glob(".building-*"))


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
def test_bad_line_is_named_and_nothing_is_lost(tmp_path: Path, prefix: str, line: bytes, reason: str) -> None:
    """The message names file and line; what was there before stays, and nothing is left over."""
    source = tmp_path / "lines.jsonl"
    source.write_bytes(b'{"text": "one"}\n')
    build(source, prefix)
    before = snapshot(prefix)
    source.write_bytes(b'{"text": "two"}\n' * 3000 + line)
    with pytest.raises(ConfigError, match=rf"^{source}:3001 .*{reason}"):
        build(source, prefix, overwrite=True)
    assert snapshot(prefix) == before
    assert not unfinished(prefix)


@pytest.mark.parametrize(("signal_number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_interrupted_build_leaves_the_old_data(tmp_path: Path, prefix: str, signal_number: int, status: int) -> None:
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
    os.kill(process.pid or 0, signal_number)
    process.join(30)
    assert process.exitcode == status
    assert snapshot(prefix) == before
    assert bool(unfinished(prefix)) == (signal_number == signal.SIGKILL)
    build(source, prefix, overwrite=True, max_bytes=1000)
    assert len(documents(prefix)) == 1000 // len("a longer text for each of many lines")


def test_stopped_between_two_renames(folder: Path, prefix: str) -> None:
    """A data set of which one file is new and one is old is refused for training."""
    build(folder, prefix)
    run = TrainingTokenizer(tokenizer_type="NullTokenizer", vocab_size=EOD + 1, eod_id=EOD)
    check_tokenizer([prefix], run)
    data = Path(f"{prefix}.bin")
    data.rename(f"{prefix}.kept")
    data.mkdir()
    with pytest.raises(IsADirectoryError):
        build(folder, prefix, overwrite=True, append_eod=False)
    data.rmdir()
    Path(f"{prefix}.kept").rename(data)
    with pytest.raises(ConfigError, match=rf"{prefix}.idx is not the one"):
        check_tokenizer([prefix], run)


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
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    if suffix := settings.pop("remove", None):
        Path(f"{prefix}{suffix}").unlink()
    before = snapshot(prefix)
    with pytest.raises(ConfigError, match=rf"{prefix}.* exists and .*--overwrite"):
        build(folder, prefix, **settings)
    assert snapshot(prefix) == before
    assert build(folder, prefix, overwrite=True, **settings)
    assert not build(folder, prefix, **settings)


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
