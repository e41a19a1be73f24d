"""The teacher cache: what is written is what is read, and no run learns from a cache that is not its own."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megacontext_megatron.config import ConfigError, ContextConfig
from megacontext_megatron.data.batch import Batch, BatchLayout, broadcast_batch, next_item
from megacontext_megatron.data.samples import SampleIdentity, WorkingContextDataset
from megacontext_megatron.data.teacher_cache import (
    CacheWriter,
    TeacherCache,
    TeacherManifest,
    as_bfloat16,
    as_bits,
    partial_folder,
)
from megacontext_megatron.model.datasets import ContextPlanner
from tests.launch import call

SAMPLES = 3
MANIFEST = TeacherManifest(
    source_length=96,
    block_size=4,
    horizon=4,
    vocabulary=11,
    hidden_size=6,
    seed=1234,
    data=("/data/text",),
    split="90,5,5",
    samples=SAMPLES,
    checkpoint="/runs/full/iter_0000010",
    iteration=10,
)
CONTEXT = ContextConfig(window=48, source_length=96, variants=2, block_size=4, recent_tokens=8, horizon=4)


def text_of(sample: int) -> Tensor:
    """Return the tokens of a raw sample."""
    return torch.arange(97) + 1000 * sample


def said_of(sample: int) -> tuple[Tensor, Tensor]:
    """Return a teacher's logits and states of a sample."""
    generator = torch.Generator().manual_seed(sample)
    return torch.randn(4, 11, generator=generator), torch.randn(24, 6, generator=generator)


def written(folder: Path) -> Path:
    """Write a cache of three samples, as two writers do, and return its folder."""
    writers = [CacheWriter(folder, MANIFEST) for _ in range(2)]
    CacheWriter.check(folder)
    writers[0].create()
    for number, writer in enumerate(writers):
        writer.join()
        for sample in range(number, SAMPLES, 2):
            writer.write(sample, text_of(sample), *said_of(sample))
        writer.flush()
    writers[0].publish()
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a cache."""
    return written(tmp_path_factory.mktemp("cache") / "new" / "taught")


def test_what_is_read_is_what_was_written(cache: Path):
    reader = TeacherCache(str(cache), ["logits", "states"])
    assert reader.manifest == MANIFEST
    for sample in range(SAMPLES):
        logits, states = said_of(sample)
        found = reader(sample, text_of(sample))
        assert torch.equal(found["logits"], logits.to(torch.bfloat16))
        assert torch.equal(found["states"], states.to(torch.bfloat16))
    assert TeacherCache(str(cache), ["states"])(0, text_of(0)).keys() == {"states"}


def test_sizes_are_those_of_the_files(cache: Path):
    headers = {name: (cache / f"{name}.npy").stat().st_size - size for name, size in MANIFEST.sizes().items()}
    assert headers == {"logits": 128, "states": 128, "digests": 128}


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 3.0e38, -1e-40, float("inf")])
def test_bits_are_those_of_bfloat16(value: float):
    values = torch.tensor([value], dtype=torch.bfloat16)
    assert torch.equal(as_bfloat16(as_bits(values)).view(torch.int16), values.view(torch.int16))


def test_a_reader_may_be_sent_to_a_worker(cache: Path):
    reader = pickle.loads(pickle.dumps(TeacherCache(str(cache), ["states"])))
    assert torch.equal(reader(1, text_of(1))["states"], said_of(1)[1].to(torch.bfloat16))


def test_another_text_is_noticed(cache: Path):
    reader = TeacherCache(str(cache), ["states"])
    with pytest.raises(RuntimeError, match="another text than this run's raw sample 1"):
        reader(1, text_of(2))
    with pytest.raises(RuntimeError, match="holds 3 raw samples, not number 3"):
        reader(3, text_of(3))


def test_a_cache_is_complete_or_absent(tmp_path: Path):
    folder = tmp_path / "taught"
    writer = CacheWriter(folder, MANIFEST)
    writer.create()
    assert not folder.exists()
    with pytest.raises(ConfigError, match=r"taught\.partial exists"):
        CacheWriter.check(folder)
    with pytest.raises(FileExistsError):
        CacheWriter(folder, MANIFEST).create()
    writer.discard()
    assert not partial_folder(folder).exists()
    written(folder)
    assert not partial_folder(folder).exists()
    with pytest.raises(ConfigError, match=r"--mc-teacher-path .* exists: remove it"):
        CacheWriter.check(folder)


def test_a_cache_that_fits_is_taken(cache: Path):
    MANIFEST.check(dataclasses.replace(MANIFEST, samples=2, checkpoint="", iteration=0), str(cache), states=True)


MISMATCHES: dict[str, tuple[Any, str]] = {
    "source_length": (128, "--mc-source-length"),
    "block_size": (8, "--mc-block-size"),
    "horizon": (8, "--mc-horizon"),
    "vocabulary": (12, "--vocab-size"),
    "hidden_size": (8, "--hidden-size"),
    "seed": (1, "--seed"),
    "data": (("/data/other",), "--data-path"),
    "split": ("80,10,10", "--split"),
    "samples": (4, "--mc-teacher-samples 4"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_another_run_is_refused_by_flag_and_file(cache: Path, name: str):
    value, flag = MISMATCHES[name]
    run = dataclasses.replace(MANIFEST, **{name: value})
    with pytest.raises(ConfigError) as refused:
        MANIFEST.check(run, str(cache), states=True)
    assert flag in str(refused.value)
    assert str(cache / "manifest.json") in str(refused.value)


def test_the_size_of_states_matters_to_who_reads_them(cache: Path):
    MANIFEST.check(dataclasses.replace(MANIFEST, hidden_size=8), str(cache), states=False)


def test_damaged_caches_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--mc-teacher-path .* holds no teacher cache"):
        TeacherManifest.read(tmp_path)
    folder = written(tmp_path / "taught")
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**values, "samples": 4}))
    with pytest.raises(ConfigError, match=r"digests\.npy holds uint32 \[3\] instead of uint32 \[4\]"):
        TeacherCache(str(folder), ["logits"])
    (folder / "manifest.json").write_text(json.dumps({**values, "format_version": 0}))
    with pytest.raises(ConfigError, match="format 0"):
        TeacherManifest.read(folder)
    (folder / "manifest.json").write_text(json.dumps(values))
    with (folder / "logits.npy").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(ConfigError, match=r"logits\.npy cannot be read"):
        TeacherCache(str(folder), ["logits"])
    (folder / "states.npy").unlink()
    with pytest.raises(ConfigError, match=r"states\.npy cannot be read"):
        TeacherCache(str(folder), ["states"])
    np.save(folder / "states.npy", np.zeros((3, 24, 6), dtype=np.float32))
    with pytest.raises(ConfigError, match=r"states\.npy holds float32"):
        TeacherCache(str(folder), ["states"])


def test_items_carry_what_the_teacher_said_of_their_sample(cache: Path):
    """Of each raw sample once, whatever the number of its variants."""
    raw: Any = [
        {"tokens": text_of(s)[:-1], "labels": text_of(s)[1:], "loss_mask": torch.ones(96)} for s in range(SAMPLES)
    ]
    dataset = WorkingContextDataset(
        raw,
        CONTEXT,
        SampleIdentity(seed=1, split=0),
        ContextPlanner(CONTEXT),
        teacher=TeacherCache(str(cache), ["logits", "states"]),
    )
    for workers in (0, 1):
        item = next_item(iter(DataLoader(dataset, batch_size=4, num_workers=workers)), 2)
        assert item["start"].shape == (4, 48)
        for name, values in zip(("logits", "states"), zip(said_of(0), said_of(1), strict=True), strict=True):
            assert torch.equal(item[name], torch.stack(values).to(torch.bfloat16))


TAUGHT = {"logits": (4, 11), "states": (24, 6)}


def received(names: list[str]) -> dict[str, Any]:
    """Return what this tensor-parallel rank receives of a teacher from the first, beside its rows."""
    import torch.distributed as dist

    from megacontext_megatron import cpu

    cpu.install()
    dist.init_process_group("gloo")
    layout = BatchLayout(
        micro_batch_size=4, context=CONTEXT, has_text=False, taught={name: TAUGHT[name] for name in names}
    )
    item = None
    if dist.get_rank() == 0:
        item = {name: torch.arange(b * n).view(b, n) for name, (b, n) in layout.shapes().items()}
        pairs = [said_of(sample) for sample in range(2)]
        said = {name: torch.stack([pair[i] for pair in pairs]).bfloat16() for i, name in enumerate(TAUGHT)}
        item |= {name: said[name] for name in names}
    assert dist.group.WORLD is not None
    batch = broadcast_batch(item, layout, dist.group.WORLD)
    dist.destroy_process_group()
    fields = {name: getattr(batch, name) for name in Batch.__slots__}
    return {name: None if value is None else [str(value.dtype), value.tolist()] for name, value in fields.items()}


@pytest.mark.parametrize("names", [["logits"], ["states"], ["logits", "states"], []])
def test_every_tensor_parallel_rank_hears_the_teacher(tmp_path: Path, names: list[str]):
    one, other = call(received, {"names": names}, 2, workdir=tmp_path).check().values
    assert one == other
    assert one["start"][0] == "torch.int64"
    for place, name in enumerate(TAUGHT):
        expected = torch.stack([said_of(sample)[place] for sample in range(2)]).bfloat16()
        assert one[name] == (["torch.bfloat16", expected.tolist()] if name in names else None)
