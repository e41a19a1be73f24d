"""What the span rotary must keep to, on any device, besides the float64 reference of rotary_cases."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megacontext_megatron.config import GaussianRopeConfig, RotaryConfig
from megacontext_megatron.kernels import reference, rotary
from megacontext_megatron.kernels.gaussian import FusedGaussianRotary
from megacontext_megatron.kernels.rotary_arguments import RotaryOptions, RotaryTable, RowPlaces
from megacontext_megatron.position.frequencies import rotary_frequencies
from megacontext_megatron.position.gaussian import GaussianRotary, LearnableSigma
from megacontext_megatron.spans.metadata import SpanMetadata
from tests import oracles
from tests.rotary_cases import (
    EPS,
    EPSILON_OF_NORMS,
    ROUNDINGS,
    Bounds,
    Case,
    Given,
    assert_within,
    call,
    given_of,
    gradients,
    incoming,
)

Device = torch.device | str
PRECISION = 1e-6
FARTHEST = 2**52
PHASE_RESOLUTION = 2 * torch.pi * 2.0**-30
LEVELS = 2


def check_zero_sigma_is_a_point(case: Case, device: Device = "cpu") -> None:
    """Assert that a width of 0 gives the bits of no width, forward and backward."""
    point = given_of(dataclasses.replace(case, sigma=0), device)
    zero = dataclasses.replace(point, sigma=torch.zeros(case.s, case.b, device=device).requires_grad_())
    outputs, expected = call(rotary, case, zero), call(rotary, case, point)
    weights = incoming(outputs)
    found, right = gradients(outputs, zero, weights), gradients(expected, point, weights)
    assert all(map(torch.equal, outputs, expected))
    assert torch.equal(found["query"], right["query"])
    assert torch.equal(found["key"], right["key"])


def check_precision(base: int, device: Device = "cpu") -> None:
    """Assert that cosine and sine are within 1e-6 of mpmath's, through fp32 in and out, for centres up to 2^51."""
    frequencies = rotary_frequencies(RotaryConfig(head_dim=128, base=base))
    near = [0, 1, 2, 31, 2**24 + 1, 2**25 - 1, 2**31 - 1, 2**31 + 1, 2**33 - 1, 2 * 10**9 + 1]
    far = [2 * 10**15 + 1, 3 * 2**50 + 31, FARTHEST - 1, FARTHEST, -1, -(2**33) - 5, -FARTHEST]
    doubled = near + far
    unit = torch.zeros(len(doubled), 1, 1, 128, device=device)
    unit[..., :64] = 1.0
    places = RowPlaces(doubled_centre=torch.tensor(doubled, device=device).unsqueeze(1))
    table = RotaryTable.fixed(frequencies.to(unit.device))
    query, key = rotary.span_rotary(unit, unit, places, table, RotaryOptions())
    assert torch.equal(query, key)
    found = query.double().cpu().view(-1, 2, 64).movedim(1, -1)
    omega = frequencies.omega.tolist()
    expected = torch.tensor([[oracles.cos_sin(w, d) for w in omega] for d in doubled], dtype=torch.float64)
    assert (found - expected).abs().max() <= PRECISION


def check_scores_do_not_know_where_a_sequence_begins(case: Case, device: Device = "cpu") -> None:
    """Assert that a shift of all centres by 2^40 tokens changes q k^T by no more than phases are resolved."""
    near = given_of(dataclasses.replace(case, first=0), device)
    far = dataclasses.replace(near, centre=near.centre + 2**41)
    scores, sizes = [], torch.zeros(())
    for given in (near, far):
        query, key = (x.detach().double().movedim(0, 2) for x in call(rotary, case, given))
        key = key.repeat_interleave(case.np // case.ng, dim=1)
        scores.append(query @ key.mT)
        pairs = [torch.hypot(*x.unflatten(-1, (2, -1)).unbind(-2)) for x in (query, key)]
        sizes = pairs[0] @ pairs[1].mT
    difference = (scores[0] - scores[1]).abs()
    assert bool((difference <= sizes * (2 * PHASE_RESOLUTION + 4 * ROUNDINGS * EPS / 2)).all())
    assert not torch.equal(*(call(rotary, case, given)[0] for given in (near, far)))


def check_huge_widths(case: Case, device: Device = "cpu") -> None:
    """Assert that what is damped to nothing is 0 and has gradients: spreads of 2^50 tokens."""
    given = given_of(case, device)
    assert given.sigma is not None
    given.sigma = torch.full_like(given.sigma, 2.0**50).requires_grad_()
    outputs = call(rotary, case, given)
    assert all(not x.any() for x in outputs[:2])
    found = gradients(outputs, given, incoming(outputs))
    assert all(bool(x.isfinite().all()) for x in found.values())
    assert not found["sigma"].any()


def check_backward_is_deterministic(case: Case, device: Device = "cpu") -> None:
    """Assert that two runs give the same bits."""
    given = given_of(case, device)
    first, second = (
        (outputs, gradients(outputs, given, incoming(outputs))) for outputs in (call(rotary, case, given) for _ in "ab")
    )
    assert all(map(torch.equal, first[0], second[0]))
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def check_anchor_keeps_the_digits_of_frequencies(device: Device = "cpu") -> None:
    """Assert that omega's gradient at mu = 1e9, through real scores, is that of the same rows near 0."""
    case = Case(s=32, b=2, np=1, ng=1, first=0)
    near = given_of(case, device)
    near.centre = near.centre % 400
    far = dataclasses.replace(near, centre=near.centre + 2 * 10**9)
    anchored = dataclasses.replace(far, anchor=far.centre[0])
    source = torch.Generator().manual_seed(3)
    weight = torch.randn(case.b, case.s, case.s, generator=source, dtype=torch.float64).tril().to(device)

    def slope(given: Given, module: object = rotary) -> Tensor:
        query, key = (x.double().movedim(0, 2).squeeze(1) for x in call(module, case, given))  # type: ignore[arg-type]
        return torch.autograd.grad((weight * (query @ key.mT)).sum(), given.omega)[0].double()

    wide = near.wide()
    expected = slope(wide, reference)
    sizes = []
    for x in (wide.query, wide.key):
        assert x is not None
        sizes.append(torch.hypot(*x.detach()[:, :, 0].movedim(0, 1).unflatten(-1, (2, -1)).unbind(-2)))
    query, key = sizes
    terms = query * (weight.abs() @ key) + key * (weight.abs().mT @ query)
    reach = (near.centre - near.centre[0]).double().abs().movedim(0, 1).unsqueeze(-1) / 2
    # y, the gradient that the other side's y makes, and their product; then a sum over 64 rows.
    bound = (3 * ROUNDINGS + 8) * EPS * (reach * terms).sum((0, 1))
    assert_within("omega", slope(anchored), expected, bound.expand_as(expected))
    lost = (slope(far) - expected).abs()
    assert lost.max() > 100 * bound.max()
    assert lost.max() > 0.1 * expected.abs().max()


def check_strides(case: Case, device: Device = "cpu") -> None:
    """Assert that places in memory make no difference: views, sequences first, and gradients that are views."""
    dense = given_of(case, device)
    assert dense.query is not None
    assert dense.key is not None
    width = case.hn * (case.np // case.ng)
    queries = dense.query.detach().unflatten(2, (case.ng, -1)).flatten(3)
    together = torch.cat([queries, dense.key.detach(), dense.key.detach()], dim=3)
    if case.np == case.ng:
        batch_first = together.transpose(0, 1).contiguous().transpose(0, 1)
        query, key, _ = batch_first.split((width, case.hn, case.hn), dim=3)
    else:
        query, key = dense.query.detach().transpose(0, 1).contiguous().transpose(0, 1), together[..., width : -case.hn]
    assert min(case.s, case.b) == 1 or not query.is_contiguous()
    assert not key.is_contiguous()
    viewed = dataclasses.replace(dense, query=query.requires_grad_(), key=key.requires_grad_())
    viewed.centre = dense.centre.mT.contiguous().mT
    if dense.anchor is not None:
        viewed.anchor = torch.stack([dense.anchor, 2 * dense.anchor], dim=1)[:, 0]
    for name in ("sigma", "offset"):
        if (x := getattr(dense, name)) is not None:
            setattr(viewed, name, x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_())
    outputs, expected = call(rotary, case, viewed), call(rotary, case, dense)
    weights = incoming(outputs)
    scattered = [w.transpose(0, 2).contiguous().transpose(0, 2) for w in weights]
    found, right = gradients(outputs, viewed, scattered), gradients(expected, dense, weights)
    assert all(map(torch.equal, outputs, expected))
    assert all(torch.equal(found[name], right[name]) for name in right)


def check_norm_is_torchs(case: Case, device: Device = "cpu") -> None:
    """Assert that heads are normed as by torch's RMSNorm before they are turned, to the rounding of one store."""
    given = given_of(case, device)
    wide = given.wide()
    outputs = call(rotary, case, given)
    assert wide.mixed is not None
    query, key, value = wide.mixed.split((case.np // case.ng * case.hn, case.hn, case.hn), dim=3)
    heads = query.reshape(case.s, case.b, case.np, case.hn), key
    weights = (wide.query_weight, wide.key_weight)
    normed = [
        torch.nn.functional.rms_norm(x, (case.hn,), weight, EPSILON_OF_NORMS)
        for x, weight in zip(heads, weights, strict=True)
    ]
    turned = reference.span_rotary(normed[0], normed[1], wide.places(), wide.table(), case.options)
    expected = [*turned, value]
    grads = incoming(outputs)
    found, right = gradients(outputs, given, grads), gradients(expected, wide, [g.double() for g in grads])
    bounds = Bounds(case, wide, grads)
    for name, x, y, bound in zip("qkv", outputs, expected, bounds.outputs(), strict=True):
        assert_within(name, x, y, bound + bounds.stored * y.abs())
    for name, bound in bounds.gradients().items():
        assert_within(name, found[name], right[name], bound + bounds.stored_in(found[name]) * right[name].abs())


def rows_of_all_levels(case: Case, device: Device) -> SpanMetadata:
    """Return spans [s, b] of levels 0 to 2 in turn, far from the origin."""
    level = (torch.arange(case.s * case.b) % (LEVELS + 1)).view(case.s, case.b).to(device)
    start = 2**40 + 1024 * torch.arange(case.s, device=device).unsqueeze(1).expand(case.s, case.b)
    return SpanMetadata.of_nodes(start, level, 32)


def module_of(kind: type[GaussianRotary], case: Case, learnable: str, device: Device) -> GaussianRotary:
    """Return a rotary module with scales of sigma away from 1."""
    scales = None
    if learnable != "none":
        scales = LearnableSigma(learnable, LEVELS, case.ng, slice(0, case.ng), lambda value: value)
        with torch.no_grad():
            scales.log_scale.copy_(torch.linspace(-1.5, 0.4, scales.log_scale.numel()))
    config = RotaryConfig(head_dim=case.hn, percent=case.percent, interleaved=case.interleaved)
    settings = GaussianRopeConfig(learnable_sigma=learnable, sides="qk" if case.damp_query else "k")  # type: ignore[arg-type]
    return kind(settings, rotary_frequencies(config), case.interleaved, scales).to(device)


def check_module(case: Case, learnable: str, device: Device = "cpu") -> None:
    """Assert that the fused module is the plain one: keys, outputs and gradients, also from a mixed projection."""
    fused, plain = (module_of(kind, case, learnable, device) for kind in (FusedGaussianRotary, GaussianRotary))
    assert fused.state_dict().keys() == plain.state_dict().keys()
    spans, given = rows_of_all_levels(case, device), given_of(case, device)
    assert given.query is not None
    assert given.key is not None
    given.centre, given.sigma = spans.doubled_centre, plain.sigma(spans).detach().requires_grad_()
    queries = given.query.detach().unflatten(2, (case.ng, -1)).flatten(3)
    mixed = torch.cat([queries, given.key.detach(), given.key.detach()], dim=3).requires_grad_()
    carrier = SpanMetadata(**{f.name: getattr(spans, f.name).mT for f in dataclasses.fields(spans)[:4]}).pack("uniform")
    parameters = list(fused.parameters()), list(plain.parameters())
    expected = list(plain(given.query, given.key, spans))
    weights = incoming(expected)
    right = torch.autograd.grad(expected, [given.query, given.key, *parameters[1]], weights)
    bounds = Bounds(case, given.wide(), weights)
    sizes = bounds.gradients()
    inputs = [sizes["query"], sizes["key"]]
    # Gradients of sigma reach a scale multiplied by sigma, and are summed over the rows.
    scale = 2 * (sizes["sigma"] * given.sigma.detach()).sum()
    outputs = list(fused(given.query, given.key, spans))
    found = torch.autograd.grad(outputs, [given.query, given.key, *parameters[0]], weights)
    for x, y, bound in zip(
        (*outputs, *found), (*expected, *right), [*bounds.outputs()[:2], *inputs, scale], strict=False
    ):
        assert_within("fused", x, y, 2 * bound + 2 * bounds.stored_in(x) * y.double().abs())
    assert isinstance(fused, FusedGaussianRotary)
    *split, value = fused.split(mixed, case.hn, carrier)
    assert torch.equal(value, given.key)
    for x, y, bound in zip(split, expected, bounds.outputs(), strict=False):
        assert_within("split", x, y, 2 * bound + 2 * bounds.stored_in(x) * y.double().abs())
    of_split = torch.autograd.grad(split, [mixed, *parameters[0]], weights)
    for x, y in zip(of_split[1:], right[2:], strict=True):
        assert_within("scale", x, y, (2 * scale + 2 * bounds.stored_in(x) * y.double().abs()).expand_as(y))
