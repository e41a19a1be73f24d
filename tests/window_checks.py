"""What sliding-window attention must keep to, on any device, besides the float64 definition of window_cases."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megacontext_megatron.kernels.rotary import span_rotary
from megacontext_megatron.kernels.window_attention import Tiles, attend_rows, choose_tiles, gradients_of_rows
from tests.window_cases import ROUNDINGS, Case, Given, call, found, given_of

Device = torch.device | str


def check_rows_out_of_sight(case: Case, device: Device = "cpu") -> None:
    """Assert that a later row, and one before the window, change no bit of a row's attention; that one inside does."""
    given = given_of(case, device)
    out = call(case, given)
    at = case.sq // 2
    first, last = case.sk - case.sq + at - case.look_back, case.sk - case.sq + at
    assert 0 < first < last < case.sk - 1
    for row, same in ((last + 1, True), (first - 1, True), (first, False), (last, False)):
        for place in (1, 2):
            heads = [x.detach().clone() for x in given.heads]
            heads[place][row] += 1
            changed = call(case, dataclasses.replace(given, heads=heads))
            assert torch.equal(out[at], changed[at]) == same


def check_mixed_is_its_parts(case: Case, device: Device = "cpu") -> None:
    """Assert that a mixed projection gives the bits that its queries, keys and values give."""
    given = given_of(case, device)
    out, gradients = found(case, given)
    right_out, right = found(case, dataclasses.replace(given, mixed=None))
    assert torch.equal(out, right_out)
    assert all(map(torch.equal, gradients, right))


def _elsewhere(x: Tensor) -> Tensor:
    """Return x as it lies in a larger tensor, sequences outermost and heads before rows."""
    wide = torch.full((x.shape[1], x.shape[2] + 1, x.shape[0], x.shape[3] + 8), float("nan"), device=x.device)
    view = wide.to(x.dtype).permute(2, 0, 1, 3)[:, :, 1:, : x.shape[3]]
    return view.copy_(x.detach()).requires_grad_()


def check_strides(case: Case, device: Device = "cpu") -> None:
    """Assert that where heads lie changes no bit, of gradients either."""
    given = given_of(case, device)
    out, gradients = found(case, given)
    other, same = found(case, dataclasses.replace(given, heads=[_elsewhere(x) for x in given.heads]))
    assert torch.equal(out, other)
    assert all(map(torch.equal, gradients, same))


def check_what_is_kept_elsewhere(case: Case, device: Device = "cpu") -> None:
    """Assert that gradients are the same where what the forward pass keeps comes back as dense copies."""
    given = given_of(case, device)
    if given.mixed is None:
        given = dataclasses.replace(given, heads=[_elsewhere(x) for x in given.heads])
    else:
        given = dataclasses.replace(given, mixed=_elsewhere(given.mixed))
    gradients = found(case, given)[1]
    with saved_tensors_hooks(lambda x: torch.empty(x.shape, device=x.device, dtype=x.dtype).copy_(x), lambda x: x):
        same = found(case, given)[1]
    assert all(map(torch.equal, same, gradients))


def check_rows_of_larger_tensors(case: Case, device: Device = "cpu") -> None:
    """Assert that rows of larger tensors get the bits of a call of their own, and that nothing else is written."""

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return room for rows such as those of x, sequences outermost, and the room beside them."""
        rows, sequences, *heads = x.shape
        wide = torch.full((sequences, rows + 3, *heads), 7.0, device=device, dtype=x.dtype)
        return wide[:, :rows].transpose(0, 1), wide[:, rows:]

    given = given_of(case, device)
    out, gradients = found(case, given)
    rooms = [parts(x) for x in (out, given.incoming, *gradients)]
    to_out, incoming, to_query, to_key, to_value = (room for room, _ in rooms)
    incoming.copy_(given.incoming)
    query, key, value = (x.detach() for x in given.heads)
    heads, into = (query, key, value), (to_query, to_key, to_value)
    normaliser = attend_rows(heads, to_out, look_back=case.look_back, scale=case.scale)
    given_back = (to_out, incoming, normaliser)
    gradients_of_rows(heads, given_back, into, look_back=case.look_back, scale=case.scale)
    assert torch.equal(to_out, out)
    assert all(map(torch.equal, into, gradients))
    assert all(bool((beside == 7).all()) for _, beside in rooms)


def check_rotation_is_the_separate_one(case: Case, device: Device = "cpu") -> None:
    """Assert that rotary inside is the rotary kernel before the attention, to roundings of the stored dtype."""
    case = dataclasses.replace(case, sq=case.sk)
    given = given_of(case, device)
    rotation = given.rotation(case)
    assert rotation is not None
    query, key, value = given.heads
    finished = span_rotary(query, key, rotation.places, rotation.table, rotation.options)
    plain = dataclasses.replace(case, rotary="")
    apart = call(plain, dataclasses.replace(given, heads=[*finished, value], mixed=None))
    right = torch.autograd.grad(apart, given.heads, given.incoming)
    out, gradients = found(case, dataclasses.replace(given, mixed=None))
    unit = torch.finfo(case.dtype).eps
    for x, y in zip((out, *gradients), (apart, *right), strict=True):
        assert (x.double() - y.double()).abs().max() <= ROUNDINGS * unit * max(y.abs().max().item(), 1.0)


def check_backward_is_deterministic(case: Case, device: Device = "cpu") -> None:
    """Assert that the same call gives the same bits."""
    given: Given = given_of(case, device)
    once, again = found(case, given)[1], found(case, given)[1]
    assert all(map(torch.equal, once, again))


def check_masks(case: Case, device: Device = "cpu") -> None:
    """Assert that masking tiles that need no mask changes no bit."""
    given, tiles = given_of(case, device), case.tiles or choose_tiles(case.hn, case.np // case.ng, case.look_back)
    whole, edges = (
        found(dataclasses.replace(case, tiles=Tiles(*(tile._replace(mask_all=all_) for tile in tiles))), given)
        for all_ in (True, False)
    )
    assert torch.equal(whole[0], edges[0])
    assert all(map(torch.equal, whole[1], edges[1]))
