"""A frozen base: what trains, what stands still to the last bit, and layers that are recomputed."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megacontext_megatron.config import ConfigError, GaussianRopeConfig, GistConfig
from megacontext_megatron.encoding_config import BIASES, BiasConfig, RetrofitConfig
from megacontext_megatron.position.heads import HeadShare
from megacontext_megatron.position.parameters import PositionalParameters
from megacontext_megatron.position.score_biases import build_bias
from megacontext_megatron.retrofit import freezing
from megacontext_megatron.retrofit.freezing import check_trains, freeze_base, frozen_fingerprint
from tests import retrofit_models
from tests.launch import call
from tests.retrofit_models import LAYERS, SETTINGS, SIZES

BARE = dataclasses.replace(
    SETTINGS,
    gaussian=GaussianRopeConfig(),
    biases=(),
    retrofit=RetrofitConfig(parts=("stretch", "damping")),
    gist=GistConfig(hidden=retrofit_models.HIDDEN),
)
"""A retrofit without a parameter."""


class Slope(PositionalParameters):
    """One number."""

    def __init__(self) -> None:
        super().__init__(lambda value: value)
        self.slope = self.new_parameter(1)


class Router(torch.nn.Module):
    """What Megatron's routers balance experts by."""

    def __init__(self, quantile: bool = False) -> None:
        super().__init__()
        self.expert_bias: torch.Tensor
        self.register_buffer("expert_bias", torch.zeros(3))
        self.qb_beta_accum = torch.zeros(3) if quantile else None


class Base(torch.nn.Module):
    """A model of one stage, or a later one."""

    def __init__(self, *parts: torch.nn.Module, first: bool = True) -> None:
        super().__init__()
        self.pre_process, self.post_process = first, True
        self.linear = torch.nn.Linear(2, 2)
        self.parts = torch.nn.ModuleList(parts)


def test_all_but_the_plugins_parameters_is_frozen():
    model = Base(Slope(), torch.nn.LayerNorm(2))
    assert freeze_base(model, SETTINGS) == ["parts.0.slope"]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        "linear.weight": False,
        "linear.bias": False,
        "parts.0.slope": True,
        "parts.1.weight": False,
        "parts.1.bias": False,
    }


def test_a_later_stage_may_have_nothing_to_train_but_a_whole_model_not():
    later = Base(first=False)
    assert freeze_base(later, SETTINGS) == []
    assert not any(parameter.requires_grad for parameter in later.parameters())
    with pytest.raises(ConfigError, match="--retrofit"):
        freeze_base(Base(), SETTINGS)


def test_a_retrofit_without_parameters_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"--retrofit stretch damping .*--gaussian-rope-learnable-sigma"):
        check_trains(BARE)
    with pytest.raises(ConfigError, match="nothing to train"):
        freeze_base(Base(Slope()), BARE)


@pytest.mark.parametrize(
    "given",
    [
        {"retrofit": RetrofitConfig(parts=("stretch", "alibi-lora"))},
        {"retrofit": RetrofitConfig(parts=("slow-bands",))},
        {"gaussian": GaussianRopeConfig(learnable_sigma="level")},
        {"gaussian": GaussianRopeConfig(log_width_bias=True)},
        {"gist": SETTINGS.gist},
        {"biases": (BiasConfig(name="grape-a", layers=(1,), learnable_slopes=True),)},
        {"biases": (BiasConfig(name="grape-a", layers=(1,), gate="q"),)},
    ],
)
def test_anything_that_learns_is_enough(given):
    check_trains(dataclasses.replace(BARE, **given))


@pytest.mark.parametrize("name", BIASES)
def test_biases_count_where_they_have_parameters(name):
    bias = BiasConfig(name=name, layers=(1,))
    share = HeadShare(heads=4, groups=2, width=8)
    settings = dataclasses.replace(BARE, biases=(bias,))
    if list(build_bias(bias, share, lambda value: value, hidden_size=32, layer_number=1, seed=7).parameters()):
        check_trains(settings)
    else:
        with pytest.raises(ConfigError, match="nothing to train"):
            check_trains(settings)


def test_routers_of_a_frozen_base_stand_still():
    router = Router()
    freeze_base(Base(Slope(), router), SETTINGS)
    assert router.frozen_expert_bias is True
    with pytest.raises(ConfigError, match="--moe-router-load-balancing-type quantile_balancing"):
        freeze_base(Base(Slope(), Router(quantile=True)), SETTINGS)


def biases_behind_a_step(held: list[bool]) -> list[list[float]]:
    """Return experts' biases of routers, some of them held, after Megatron has balanced them."""
    import torch.distributed as dist
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    retrofit_models.start()
    routers = [Router() for _ in held]
    for router, frozen in zip(routers, held, strict=True):
        router.local_tokens_per_expert = torch.tensor([5.0, 1.0, 0.0])
        if frozen:
            freeze_base(Base(Slope(), router), SETTINGS)
    config: Any = SimpleNamespace(moe_router_bias_update_rate=0.5)
    _update_router_expert_bias([torch.nn.ModuleList(routers)], config, dist.group.WORLD)
    return [router.expert_bias.tolist() for router in routers]


def test_megatron_leaves_held_routers_alone(tmp_path):
    moved, kept = call(biases_behind_a_step, {"held": [False, True]}, workdir=tmp_path).check().values[0]
    assert kept == [0.0] * 3
    assert moved == [-0.5, 0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fingerprints_tell_the_smallest_change_of_what_is_frozen(dtype):
    slope, router = Slope(), Router()
    model = Base(slope, router)
    model.linear.to(dtype)
    freeze_base(model, SETTINGS)
    before = frozen_fingerprint(model)
    assert set(before) == {"linear.weight", "linear.bias", "parts.1.expert_bias"}
    assert before["linear.weight"] != before["linear.bias"]
    with torch.no_grad():
        slope.slope.fill_(3.0)
    assert frozen_fingerprint(model) == before
    for changed in (model.linear.weight, router.expert_bias):
        with torch.no_grad():
            flat = changed.view(-1)
            flat[1] = torch.nextafter(flat[1], flat[1] + 1)
    after = frozen_fingerprint(model)
    assert {name for name in before if before[name] != after[name]} == {"linear.weight", "parts.1.expert_bias"}


def steps_of(
    recompute: dict[str, Any] | None, gist_net: bool = True, start_gradients: bool = True, steps: int = 3
) -> dict[str, Any]:
    """Train the adapters of a small model and return losses, first gradients, and what of the base has changed."""
    if not start_gradients:
        freezing._start_gradients = lambda model: None
    retrofit_models.start()
    settings = SETTINGS if gist_net else dataclasses.replace(SETTINGS, gist=BARE.gist)
    model = retrofit_models.build(settings, **(recompute or {}))
    retrofit_models.fill(model)
    names = freeze_base(model, settings)
    before = frozen_fingerprint(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05, weight_decay=0.1)
    losses, gradients = [], {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = retrofit_models.loss_of(model)
        losses.append(loss.item())
        if not loss.requires_grad:
            break
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.norm().item() for name, p in trained.items() if p.grad is not None}
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
    changed = [name for name, digest in frozen_fingerprint(model).items() if before[name] != digest]
    return {"names": names, "losses": losses, "gradients": gradients, "changed": changed, "frozen": len(before)}


@pytest.fixture(scope="module", params=[True, False], ids=["gistnet", "means"])
def plain(request, tmp_path_factory):
    """A training of the adapters in which nothing is recomputed, and whether gists are learned."""
    given = {"recompute": None, "gist_net": request.param}
    return request.param, call(steps_of, given, workdir=tmp_path_factory.mktemp("plain")).check().values[0]


def test_adapters_train_and_the_base_stands_still(plain):
    learned, run = plain
    assert {name for name in run["names"] if not name.startswith("gist_net.")} == set(SIZES)
    assert any(name.startswith("gist_net.") for name in run["names"]) == learned
    assert run["changed"] == []
    assert run["frozen"] >= 2 + 4 * LAYERS
    assert run["losses"][-1] < run["losses"][0]
    assert set(run["gradients"]) == set(run["names"])
    assert all(size > 0 for size in run["gradients"].values())


RECOMPUTED = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}


@pytest.mark.parametrize("kind", RECOMPUTED)
def test_recomputed_layers_give_adapters_their_gradients(kind, plain, tmp_path):
    learned, run = plain
    given = {"recompute": RECOMPUTED[kind], "gist_net": learned}
    again = call(steps_of, given, workdir=tmp_path).check().values[0]
    for name in ("losses", "gradients"):
        # Parts of a gradient are added up in another order.
        assert again.pop(name) == pytest.approx(run[name], rel=1e-5)
    assert again == {name: value for name, value in run.items() if name in again}


def test_recomputed_layers_of_a_frozen_base_would_learn_nothing(tmp_path):
    """Why embeddings ask for a gradient: without that there is none at all, and Megatron skips the backward pass."""
    given = {"recompute": RECOMPUTED["full"], "gist_net": False, "start_gradients": False}
    found = call(steps_of, given, workdir=tmp_path).check().values[0]
    assert found["gradients"] == {}
    assert len(found["losses"]) == 1
