"""GistNet's operations: the closed form against PyTorch's counter, and Megatron's count with them inside."""

import dataclasses
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megacontext_megatron.config import ContextConfig, GistConfig, RotaryConfig, Settings
from megacontext_megatron.telemetry import flops
from tests.launch import call
from tests.small import small_flags

CONTEXT = ContextConfig(window=64, source_length=512, variants=2, block_size=8, recent_tokens=16, horizon=16)
GIST = GistConfig(hidden=48, kind="gistnet", layers=2, hidden_size=32)
SETTINGS = Settings(encoding="gaussian_rope", rotary=RotaryConfig(head_dim=16), context=CONTEXT, gist=GIST)


def counted(context, gist, samples):
    """Return what PyTorch counts while GistNet makes and learns all gists of `samples` raw samples."""
    from megacontext_megatron.context.assembly import gists_of
    from megacontext_megatron.context.block_groups import BlockGroups
    from megacontext_megatron.context.gistnet import GistNet
    from megacontext_megatron.context.gists import embedding_rms

    net = GistNet(gist, context.block_size, BlockGroups(), seed=1)
    tokens = torch.randn(context.source_length, samples, gist.hidden, requires_grad=True)
    # the counter knows no attention kernel of the CPU, and sees through PyTorch's plain one
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        levels = gists_of(tokens, embedding_rms(tokens), context, net)
        heads = [head for level in levels for head in (level.vectors, level.shift) if head is not None]
        torch.stack([head.sum() for head in heads]).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [{}, {"pooling": "slot"}, {"span_head": True}, {"layers": 1, "hidden_size": 64}])
def test_the_closed_form_is_what_pytorch_counts(shape):
    gist = dataclasses.replace(GIST, **shape)
    settings = dataclasses.replace(SETTINGS, gist=gist)
    assert flops.gist_flops(settings, contexts=3 * CONTEXT.variants) == counted(CONTEXT, gist, samples=3)


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ({}, (64, 8)),
        ({"max_level": 1, "source_length": 256}, (32,)),
        ({"source_length": 520}, (65, 8)),
        ({"plan": "recency", "variants": 1}, ()),
    ],
)
def test_only_complete_blocks_of_plans_that_collapse_count(shape, blocks):
    assert flops.blocks_by_level(dataclasses.replace(CONTEXT, **shape)) == blocks


def test_a_raw_sample_counts_once_for_all_its_variants():
    alone = dataclasses.replace(SETTINGS, context=dataclasses.replace(CONTEXT, variants=1))
    assert flops.gist_flops(SETTINGS, 8) * 2 == flops.gist_flops(alone, 8)
    mean = dataclasses.replace(SETTINGS, gist=dataclasses.replace(GIST, kind="mean"))
    assert flops.gist_flops(mean, 8) == 0


def count_in_megatron(argv):
    """Return Megatron's count of a step of eight contexts before ours is installed, and after it is for each kind."""
    import sys

    from megatron.training import training

    from megacontext_megatron.pretrain import prepare
    from megacontext_megatron.run import parse

    sys.argv = ["pretrain", *argv]
    prepare(argv)
    args, settings = parse()
    plain = training.num_floating_point_operations(args, 8)
    kinds = ("gistnet", "mean", "gistnet", "gistnet")
    each = [dataclasses.replace(settings, gist=dataclasses.replace(settings.gist, kind=kind)) for kind in kinds]
    after = []
    for one in each:
        assert "GistNet" in flops.install(one)
        after.append(training.num_floating_point_operations(args, batch_size=8, total_real_tokens_in_batch=None))
    return json.dumps([plain, after, [flops.gist_flops(one, 8) for one in each]])


def test_megatron_counts_the_gists_of_the_last_settings_once(corpus, tmp_path):
    argv = small_flags(corpus, mc_gist_kind="gistnet")
    (found,) = call(count_in_megatron, {"argv": argv}, workdir=tmp_path).check().values
    plain, after, gists = json.loads(found)
    assert gists[1] == 0
    assert gists[0] > 0
    assert after == [plain + own for own in gists]
