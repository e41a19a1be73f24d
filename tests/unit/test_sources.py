"""Which text is found, and on which side of the split it lands."""

import json
import sysconfig
from pathlib import Path

import pytest

from megacontext_megatron.data.corpus import CorpusSettings, build_corpus
from megacontext_megatron.data.sources import find_files
from tests.unit.corpora import FILES, IN_ORDER, build, many_files, texts, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of text."""
    return write_folder(tmp_path / "text")


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Return an output prefix in a folder that does not exist yet."""
    return str(tmp_path / "out" / "corpus")


def test_jsonl(tmp_path: Path, prefix: str) -> None:
    """Each line is a document; empty lines and empty texts are none."""
    lines = ['{"body": "one\\n", "n": 1}', "", '{"body": ""}', '{"n": 2, "body": "\\u00fc"}']
    source = tmp_path / "lines.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    build(source, prefix, json_key="body")
    assert texts(prefix) == [b"one\n", "\u00fc".encode()]


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
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if "-packages/" in name]
    assert {Path(name).suffix for name in names} <= {".py", ".rst", ".txt"}
    build("stdlib", prefix, max_bytes=200_000)
    found = texts(prefix)
    full = [text for name in names if (text := (root / name).read_bytes())]
    assert found == full[: len(found)]
    assert 100_000 < sum(map(len, found)) <= 200_000


def test_links(folder: Path, prefix: str) -> None:
    """A link to nothing is passed over, a loop of folders is not followed."""
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder)
    build(folder, prefix)
    assert texts(prefix) == [FILES[name] for name in IN_ORDER]
