"""Blocks shared out over tensor and context parallel ranks: results and gradients against one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from megacontext_megatron.context.block_groups import BlockGroups
from tests.launch import call
from tests.unit.test_assembly import HIDDEN
from tests.unit.test_gistnet import BLOCK, blocks_of, made, trained

LAYOUTS = {"TP2": (2, 1), "CP2": (1, 2), "TP2xCP2": (2, 2), "TP4": (4, 1)}
"""Tensor and context parallel ranks."""

COUNTS = [8, 5, 1]
"""Blocks of a sample: of two samples' none, some and most shares have to be filled up."""

RAW = 2
RTOL = 1e-11
"""Of float64 sums in another order."""

Values = dict[str, Any]


def groups_of(tensor: int, context: int) -> BlockGroups:
    """Return the groups of a rank; tensor parallel ranks are neighbours, as Megatron orders them."""
    import torch.distributed as dist

    from megacontext_megatron import cpu

    cpu.install()
    dist.init_process_group("gloo")
    beside = [[c * tensor + t for t in range(tensor)] for c in range(context)]
    across = [[c * tensor + t for c in range(context)] for t in range(tensor)]
    of_tensor, of_context = (cast(Any, dist.new_subgroups_by_enumeration(ranks)[0]) for ranks in (beside, across))
    return BlockGroups.of(of_tensor, of_context)


def weights_of(rank: int, shape: Sequence[int]) -> Tensor:
    """Return the gradient that a context parallel rank's rows give to results."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def encoded(groups: BlockGroups, gradient: Callable[[Tensor], Tensor], count: int) -> Values:
    """Return the encoder's answers to blocks, and the gradients of the blocks and of the encoder's weights."""
    encoder = trained(span_head=True).encoder
    blocks = blocks_of(count, RAW).unflatten(0, (-1, BLOCK)).transpose(1, 2).reshape(-1, BLOCK, HIDDEN)
    blocks.requires_grad_()
    own = groups.own(blocks)
    answers = groups.all(encoder(own), blocks.shape[0])
    (answers * gradient(answers)).sum().backward()
    weights = {name: p.grad.tolist() for name, p in encoder.named_parameters() if p.grad is not None}
    return {"results": answers.tolist(), "inputs": _list(blocks.grad), "weights": weights, "own": own.shape[0]}


def made_of(groups: BlockGroups, gradient: Callable[[Tensor], Tensor], count: int) -> Values:
    """Return the gists of tokens, and the gradients of the tokens and of GistNet's weights."""
    net = trained()
    net._groups = groups
    tokens = blocks_of(count, RAW).requires_grad_()
    vectors = made(net, tokens).vectors
    (vectors * gradient(vectors)).sum().backward()
    weights = {name: p.grad.tolist() for name, p in net.named_parameters() if p.grad is not None}
    return {"results": vectors.tolist(), "inputs": _list(tokens.grad), "weights": weights}


def _list(gradient: Tensor | None) -> list[Any]:
    assert gradient is not None
    return gradient.tolist()


WAYS = {"encoder": encoded, "gists": made_of}


def in_rank(tensor: int, context: int) -> dict[str, Values]:
    """Do it for every count of blocks, in a rank."""
    import torch.distributed as dist

    groups = groups_of(tensor, context)
    number = dist.get_rank() // tensor
    found = {
        f"{way} {count}": run(groups, lambda results: weights_of(number, results.shape), count)
        for way, run in WAYS.items()
        for count in COUNTS
    }
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, int, list[Any]]:
    """Return the ranks of each kind and what every rank found."""
    tensor, context = LAYOUTS[request.param]
    kwargs = {"tensor": tensor, "context": context}
    folder = tmp_path_factory.mktemp("blocks")
    return tensor, context, list(call(in_rank, kwargs, ranks=tensor * context, workdir=folder).check().values)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("way", WAYS)
def test_ranks_together_do_what_one_process_does(ranks: tuple[int, int, list[Any]], way: str, count: int) -> None:
    """All ranks get all results; gradients are whole over tensor ranks and add up over context ranks."""
    tensor, context, values = ranks
    found: list[Values] = [value[f"{way} {count}"] for value in values]

    def whole(results: Tensor) -> Tensor:
        return torch.stack([weights_of(rank, results.shape) for rank in range(context)]).sum(dim=0)

    expected = WAYS[way](BlockGroups(), whole, count)
    for each in found:
        assert_close(each["results"], expected["results"])
        assert each["results"] == found[0]["results"]
    for first in range(0, len(found), tensor):
        assert all(found[first + t]["inputs"] == found[first]["inputs"] for t in range(tensor))
    assert_close(added([found[c * tensor]["inputs"] for c in range(context)]), expected["inputs"])
    for name, right in expected["weights"].items():
        assert_close(added([each["weights"][name] for each in found]), right)


@pytest.mark.parametrize("count", COUNTS)
def test_each_rank_encodes_its_share_alone(ranks: tuple[int, int, list[Any]], count: int) -> None:
    """And only the blocks of its share get gradients from it, over context ranks."""
    tensor, context, values = ranks
    total, size = RAW * count, tensor * context
    share = -(-total // size)
    for rank, value in enumerate(values):
        found = value[f"encoder {count}"]
        assert found["own"] == share
        touched = torch.tensor(found["inputs"]).abs().sum(dim=(1, 2)).nonzero().flatten().tolist()
        first = rank // tensor * share * tensor
        assert touched == list(range(min(first, total), min(first + share * tensor, total)))


def added(parts: list[Any]) -> list[Any]:
    """Return the sum of tensors given as lists."""
    return torch.tensor(parts, dtype=torch.float64).sum(dim=0).tolist()


def assert_close(found: list[Any], expected: list[Any]) -> None:
    """Compare with the rounding of sums whose parts are as large as the largest value."""
    right = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), right, rtol=RTOL, atol=RTOL * right.abs().max().item()
    )


def test_one_rank_shares_nothing_out() -> None:
    blocks = blocks_of(2)
    assert BlockGroups().own(blocks) is blocks
    assert BlockGroups().all(blocks, 6) is blocks
