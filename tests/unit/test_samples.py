"""One Megatron sample is one working context: items, their order, and what of them reaches the ranks."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers import MegatronTokenizer
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from megacontext_megatron.config import ContextConfig, EodPolicy
from megacontext_megatron.data.batch import Batch, BatchLayout, broadcast_batch, check_variants, next_item
from megacontext_megatron.data.samples import SampleIdentity, WorkingContextDataset
from megacontext_megatron.model.datasets import ContextPlanner
from megacontext_megatron.spans.plan import plan_rows
from tests.corpus import EOD
from tests.launch import call

SEED = 1234


def small(variants: int, eod_policy: EodPolicy = "ignore") -> ContextConfig:
    """Return a context of 96 tokens in 48 rows."""
    return ContextConfig(
        window=48,
        source_length=96,
        variants=variants,
        block_size=4,
        recent_tokens=8,
        horizon=4,
        eod_policy=eod_policy,
    )


@pytest.fixture(scope="module")
def text(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> GPTDataset:
    """Megatron's data set of real text at 96 tokens a sample, without loss behind an end of document."""
    with warnings.catch_warnings():
        # Says that Transformer Engine and Apex are missing, which no data set needs.
        warnings.simplefilter("ignore")
        tokenizer = MegatronTokenizer.from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
            metadata_path={"library": "null-text"}, vocab_size=320, eod_id=EOD
        )
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=96,
        blend=([str(corpus)], None),
        split="90,5,5",
        path_to_cache=str(tmp_path_factory.mktemp("cache")),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    sizes: Any = [100, None, None]
    train, *_ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    assert isinstance(train, GPTDataset)
    return train


class CountingReads:
    """A data set that remembers which samples were read from the one it stands before."""

    def __init__(self, raw: Any) -> None:
        self._raw, self.reads = raw, []

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]:
        self.reads.append(index)
        return self._raw[index]


def written(samples: list[list[int]]) -> list[dict[str, torch.Tensor]]:
    """Return a raw data set of samples given as C + 1 ids, all of which count in the loss."""
    ids = [torch.tensor(sample) for sample in samples]
    return [{"tokens": i[:-1], "labels": i[1:], "loss_mask": torch.ones(len(i) - 1)} for i in ids]


def contexts_of(raw: Any, context: ContextConfig, split: int = 0) -> WorkingContextDataset:
    """Return the working contexts of a raw data set."""
    eod = EOD if context.eod_policy == "no-cross" else None
    identity = SampleIdentity(seed=SEED, split=split, eod=eod)
    return WorkingContextDataset(raw, context, identity, ContextPlanner(context))


@pytest.mark.parametrize("variants", [1, 2, 3])
def test_item_is_one_variant_of_one_raw_sample(text: GPTDataset, variants: int):
    context = small(variants)
    dataset = contexts_of(text, context)
    assert len(dataset) == variants * len(text)
    for index in (0, 1, variants, 7 * variants + variants - 1, len(dataset) - 1):
        item, raw = dataset[index], text[index // variants]
        assert item["identity"].tolist() == [index // variants, index % variants, 0]
        assert item["text"].tolist() == [*raw["tokens"].tolist(), raw["labels"][-1].item()]
        assert item["text"][1:].tolist() == raw["labels"].tolist()
        assert item["mask"].tolist() == raw["loss_mask"].tolist()
        plan = plan_rows(context, (SEED, 0, index // variants, index % variants))
        assert item["start"].tolist() == plan.start.tolist()
        assert item["level"].tolist() == plan.level.tolist()
        assert {name: (value.dtype, tuple(value.shape)) for name, value in item.items()} == {
            "start": (torch.int64, (48,)),
            "level": (torch.int64, (48,)),
            "identity": (torch.int64, (3,)),
            "text": (torch.int64, (97,)),
            "mask": (torch.int64, (96,)),
        }


def test_tokens_after_an_end_of_document_carry_no_loss(text: GPTDataset):
    dataset = contexts_of(text, small(1))
    found = 0
    for index in range(len(dataset)):
        item = dataset[index]
        ends = item["text"][:-1] == EOD
        assert (item["mask"] == (~ends).long()).all()
        found += int(ends.sum())
    assert found > 5


def test_splits_differ_in_their_plans_and_say_which_they_are():
    context, raw = small(2), written([list(range(97))])
    datasets = [contexts_of(raw, context, split=split.value) for split in Split]
    assert [dataset.split for dataset in datasets] == [Split.train, Split.valid, Split.test]
    mixed = [dataset[1]["start"].tolist() for dataset in datasets]
    assert mixed[0] != mixed[1] != mixed[2] != mixed[0]


@pytest.mark.parametrize("variants", [1, 2, 3])
def test_raw_samples_are_read_once_for_all_variants(text: GPTDataset, variants: int):
    raw = CountingReads(text)
    dataset = contexts_of(raw, small(variants))
    for index in range(2 * variants, 6 * variants):
        dataset[index]
    assert raw.reads == [2, 3, 4, 5]
    assert dataset[0]["text"].tolist() == contexts_of(text, small(variants))[0]["text"].tolist()
    assert raw.reads[-1] == 0


def test_items_do_not_change_each_other(text: GPTDataset):
    dataset = contexts_of(text, small(2))
    first = dataset[0]
    second = dataset[1]
    assert first["start"].tolist() == contexts_of(text, small(2))[0]["start"].tolist()
    assert first["start"].tolist() != second["start"].tolist()
    assert torch.equal(first["text"], second["text"])


@pytest.mark.parametrize("variants", [1, 2])
def test_stages_without_text_have_the_same_rows(text: GPTDataset, variants: int):
    context = small(variants)
    reading, planning = contexts_of(text, context), contexts_of(None, context)
    assert len(planning) > len(reading)
    assert planning.split == reading.split
    for index in (0, 1, 5, len(reading) - 1):
        expected = reading[index]
        got = planning[index]
        assert sorted(got) == ["identity", "level", "start"]
        assert all(torch.equal(got[name], expected[name]) for name in got)


@given(ends=st.sets(st.integers(0, 96), max_size=8))
def test_no_cross_plans_see_the_ends_among_the_first_c_tokens(ends: set[int]):
    context = small(1, "no-cross")
    ids = [EOD if place in ends else 65 for place in range(97)]
    item = contexts_of(written([ids]), context)[0]
    expected = plan_rows(context, (SEED, 0, 0, 0), np.array(sorted(ends - {96}), dtype=np.int64))
    assert item["start"].tolist() == expected.start.tolist()
    assert item["level"].tolist() == expected.level.tolist()
    assert item["identity"].tolist() == [0, 0, expected.shortened]


def test_history_left_out_for_documents_is_counted():
    item = contexts_of(written([[EOD] * 97]), small(1, "no-cross"))[0]
    assert item["identity"].tolist() == [0, 0, 96 - 48 - small(1).dropped_tokens]


def test_ends_of_documents_do_not_matter_under_ignore():
    plain, ended = (contexts_of(written([[i] * 97]), small(1))[0] for i in (65, EOD))
    assert torch.equal(plain["start"], ended["start"])


def test_planner_reaches_loader_workers():
    context = small(2)
    sent = pickle.loads(pickle.dumps(ContextPlanner(context)))
    rows, here = sent((1, 0, 5, 1), None), ContextPlanner(context)((1, 0, 5, 1), None)
    assert all(np.array_equal(rows[name], here[name]) for name in ("start", "level", "shortened"))


def identities(first: int, samples: int, variants: int) -> list[list[int]]:
    """Return the identities of consecutive contexts."""
    return [[sample, variant, 0] for sample in range(first, first + samples) for variant in range(variants)]


@given(first=st.integers(0, 2**40), samples=st.integers(1, 4), variants=st.integers(1, 4))
def test_whole_samples_are_accepted(first: int, samples: int, variants: int):
    check_variants(torch.tensor(identities(first, samples, variants)), variants)


@given(first=st.integers(0, 9), samples=st.integers(1, 4), variants=st.integers(2, 4), skipped=st.integers(0, 3))
def test_contexts_that_begin_amid_a_sample_are_refused(first: int, samples: int, variants: int, skipped: int):
    skipped = 1 + skipped % (variants - 1)
    rows = identities(first, samples + 1, variants)[skipped:][: samples * variants]
    with pytest.raises(RuntimeError, match="consumed samples must be a multiple of --mc-variants"):
        check_variants(torch.tensor(rows), variants)


@given(samples=st.integers(1, 3), variants=st.integers(2, 3), data=st.data())
def test_contexts_in_another_order_are_refused(samples: int, variants: int, data: st.DataObject):
    rows = identities(0, samples, variants)
    shuffled = data.draw(st.permutations(rows))
    groups = [shuffled[n : n + variants] for n in range(0, len(rows), variants)]
    in_order = all(group == identities(group[0][0], 1, variants) for group in groups)
    if in_order:
        check_variants(torch.tensor(shuffled), variants)
    else:
        with pytest.raises(RuntimeError, match="does not hold all"):
            check_variants(torch.tensor(shuffled), variants)


def test_the_refusal_of_a_micro_batch_shows_what_it_holds():
    with pytest.raises(RuntimeError, match=r"\[\[3, 1\], \[4, 0\]\] \(sample, variant\)"):
        check_variants(torch.tensor([[3, 1, 0], [4, 0, 0]]), 2)


@pytest.mark.parametrize("has_text", [True, False])
def test_micro_batch_holds_each_text_once(text: GPTDataset, has_text: bool):
    context, size = small(2), 4
    dataset = contexts_of(text if has_text else None, context)
    loader = iter(DataLoader(dataset, batch_sampler=BatchSampler(SequentialSampler(dataset), size, drop_last=True)))
    shapes = BatchLayout(micro_batch_size=size, context=context, has_text=has_text).shapes()
    for step in range(3):
        item = next_item(loader, context.variants)
        assert {name: tuple(item[name].shape) for name in shapes} == shapes
        assert set(item) == {*shapes, "identity"}
        assert item["identity"][:, 0].tolist() == [2 * step, 2 * step, 2 * step + 1, 2 * step + 1]
        if has_text:
            assert item["text"][:, :-1].tolist() == [text[2 * step + n]["tokens"].tolist() for n in range(2)]


def test_a_loader_that_shuffles_is_refused(text: GPTDataset):
    dataset = contexts_of(text, small(2))
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="--mc-variants"):
        next_item(iter(DataLoader(dataset, batch_size=4, shuffle=True)), 2)


def received(has_text: bool) -> dict[str, Any]:
    """Return the micro-batch that this rank of a tensor-parallel group receives from the first."""
    import torch.distributed as dist

    from megacontext_megatron import cpu

    cpu.install()
    dist.init_process_group("gloo")
    layout = BatchLayout(micro_batch_size=4, context=small(2), has_text=has_text)
    item = None
    if dist.get_rank() == 0:
        item = {name: torch.arange(b * n).view(b, n) + b * n for name, (b, n) in layout.shapes().items()}
    assert dist.group.WORLD is not None
    batch = broadcast_batch(item, layout, dist.group.WORLD)
    dist.destroy_process_group()
    fields = {name: getattr(batch, name) for name in Batch.__slots__}
    return {name: None if value is None else value.tolist() for name, value in fields.items()}


@pytest.mark.parametrize("has_text", [True, False])
def test_every_rank_receives_the_first_ranks_batch(tmp_path: Path, has_text: bool):
    first, second = call(received, {"has_text": has_text}, ranks=2, workdir=tmp_path).check().values
    assert first == second
    for name, (b, n) in BatchLayout(micro_batch_size=4, context=small(2), has_text=True).shapes().items():
        if name in ("start", "level", "shortened") or has_text:
            assert first[name] == (torch.arange(b * n).view(b, n) + b * n).tolist()
        else:
            assert first[name] is None
