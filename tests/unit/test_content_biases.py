"""CoPE, GRAPE-AP and FoX against x-transformers and loops that follow the papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from x_transformers.x_transformers import CoPE

from tests.bias_cases import GISTS, HEADS, HIDDEN, TOKENS, WIDTH, Scene, assert_is, bias_of, precise

PLACES = 5
"""Fewer than the rows, so that counts reach the last place."""


def their_cope(bias: Any, scene: Scene) -> torch.Tensor:
    module = CoPE(WIDTH, HEADS, PLACES).double()
    del module.pos_emb
    module.pos_emb = bias.embedding.view(WIDTH, PLACES).t()  # type: ignore[assignment]
    rows = len(scene.widths)
    behind = torch.ones(rows, rows, dtype=torch.bool).triu(1)
    return module(scene.query.permute(1, 2, 0, 3), scene.scores().masked_fill(behind, -1e9))


@pytest.mark.parametrize("widths", [TOKENS, GISTS])
def test_cope_is_x_transformers(widths):
    assert_is(precise(bias_of("cope", cope_positions=PLACES)), Scene(widths=widths), their_cope)


def test_cope_counts_gists_by_their_width():
    places = 40

    def oracle(bias: Any, scene: Scene):
        table, scores, rows = bias.embedding.view(WIDTH, places), scene.scores(), len(scene.widths)
        found = scores.new_zeros(scores.shape)
        for b, h, i, j in torch.cartesian_prod(*map(torch.arange, (scene.batch, HEADS, rows, rows))).tolist():
            if j > i:
                continue
            gates = [scores[b, h, i, t].sigmoid() * scene.widths[t] for t in range(j, i + 1)]
            place = torch.stack(gates).sum().clamp(max=places - 1)
            below = int(place)
            at = [scene.query[i, b, h] @ table[:, min(n, places - 1)] for n in (below, below + 1)]
            found[b, h, i, j] = at[0] + (place - below) * (at[1] - at[0])
        return found

    scene = Scene(widths=[32, 2, 1, 32, 1])
    assert_is(precise(bias_of("cope", cope_positions=places, cope_count="width")), scene, oracle)
    tokens = Scene(widths=TOKENS)
    by_entry, by_width = (precise(bias_of("cope", cope_count=count)) for count in ("entry", "width"))
    assert torch.equal(tokens.of(by_entry), tokens.of(by_width))
    assert not torch.allclose(scene.of(by_entry), scene.of(by_width))


def test_cope_starts_as_no_bias():
    bias = bias_of("cope")
    assert sum(p.numel() for p in bias.parameters()) == WIDTH * 64
    assert not bool(Scene(widths=GISTS).of(bias).any())


def grape_ap(bias: Any, scene: Scene) -> torch.Tensor:
    """Return b(t, j) = sum over l = j + 1 .. t of alpha g(p_t R_l p_l / d), R_l = exp(l J), g = log sigmoid."""
    quarter = torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)] * 4)
    weight = bias.projection.view(HEADS, 8, HIDDEN)
    p = torch.einsum("sbx,hdx->sbhd", scene.hidden, weight)
    p = p / (p.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    rows = len(scene.widths)
    out = []
    for b in range(scene.batch):
        turned = [torch.matrix_exp(scene.centre[row, b] * quarter) for row in range(rows)]
        for h in range(HEADS):
            slope = 2.0 ** (-8 * (h + 1) / HEADS)
            for t in range(rows):
                steps = [slope * logsigmoid(p[t, b, h] @ (turned[i] @ p[i, b, h]) / 8) for i in range(rows)]
                zero = steps[0].new_zeros(())
                out += [sum(steps[j + 1 : t + 1], zero) for j in range(rows)]
    return torch.stack(out).view(scene.batch, HEADS, rows, rows)


@pytest.mark.parametrize("widths", [TOKENS[:7], [1024, 32, 1, 1, 32, 1]])
def test_grape_ap_is_the_double_loop(widths):
    assert_is(precise(bias_of("grape-ap")), Scene(widths=widths), grape_ap)


def test_grape_ap_is_never_positive_and_falls_with_the_distance():
    found = Scene(widths=TOKENS).of(precise(bias_of("grape-ap")))
    rows = torch.arange(len(TOKENS))
    assert not bool(found[..., rows, rows].any())
    assert bool((found[..., -1, 1:] > found[..., -1, :-1]).all())


def test_grape_ap_without_content_is_alibi_by_halves():
    """With p = 0 every step is the slope times log sigmoid(0): a linear bias in rows."""
    scene = Scene(widths=TOKENS)
    scene.hidden.data.zero_()
    expected = scene.of(bias_of("alibi")) * torch.tensor(2.0, dtype=torch.float64).log()
    torch.testing.assert_close(scene.of(bias_of("grape-ap")), expected)


def fox(bias: Any, scene: Scene) -> torch.Tensor:
    """Return the logarithm of the product of forget gates behind the key, up to the query."""
    weight = bias.weight.view(HEADS, HIDDEN)
    gates = torch.sigmoid(torch.einsum("sbx,hx->bhs", scene.hidden, weight) + bias.bias[:, None])
    rows = len(scene.widths)
    out = [gates[..., j + 1 : i + 1].prod(-1) for i in range(rows) for j in range(rows)]
    return torch.stack(out, dim=-1).log().unflatten(-1, (rows, rows))


@pytest.mark.parametrize("widths", [TOKENS, GISTS])
def test_fox_is_the_product_of_forget_gates(widths):
    assert_is(precise(bias_of("fox")), Scene(widths=widths), fox)


def test_fox_of_equal_gates_is_linear_in_rows():
    bias = bias_of("fox")
    bias.get_parameter("weight").data.zero_()
    bias.get_parameter("bias").data.fill_(2.0)
    rows = torch.arange(len(GISTS), dtype=torch.float64)
    step = logsigmoid(torch.tensor(2.0, dtype=torch.float64))
    expected = (step * (rows[:, None] - rows)).tril()
    found = Scene(widths=GISTS).of(bias)
    torch.testing.assert_close(found, expected.expand_as(found))


def test_fox_keeps_near_keys_apart_in_long_contexts():
    """Sums of some thousand, in fp32, would not hold the difference of two neighbours to 1e-5."""
    rows = 3000
    bias = bias_of("fox")
    scene = Scene(widths=[1] * rows, batch=1, dtype=torch.float32)
    bias.get_parameter("bias").data.fill_(-1.0)
    last = torch.tensor([rows - 1])
    with torch.no_grad():
        found = scene.of(bias, last)[0, :, 0, -2]
        features = bias.features(scene.hidden, scene.query, scene.key)
    assert features is not None
    torch.testing.assert_close(found, features[-1, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "fields"), [("cope", {"cope_count": "entry"}), ("grape-ap", {}), ("fox", {})])
def test_a_gist_counts_as_one_row(name, fields):
    """A wide span and a token at the same centre are alike."""
    bias, wide, narrow = precise(bias_of(name, **fields)), Scene(widths=GISTS), Scene(widths=GISTS)
    narrow.width = torch.ones_like(narrow.width)
    assert torch.equal(wide.of(bias), narrow.of(bias))
