"""The benchmark of the GRAPE recipe's step: its prediction, and that its arms compute the same."""

import pytest
import torch

from scripts.benchmarks import recipe_step
from scripts.benchmarks.inputs import Shape
from tests.launch import call


def test_the_step_is_predicted_from_floors():
    size, shape = recipe_step.Size(), recipe_step.SHAPES[-1]
    factors = [recipe_step.predicted(size, shape, arm) for arm in (recipe_step.FOLD, recipe_step.REACH)]
    assert [round(factor, 2) for factor in factors] == [1.43, 1.64]
    milliseconds = [1e3 * recipe_step.floor_seconds(size, shape, a) for a in (recipe_step.PLAIN, recipe_step.REACH)]
    assert milliseconds == pytest.approx([386.8, 235.9], abs=0.2)
    targets = {}
    for arms in (recipe_step.arms_of(qk_norm=False), recipe_step.arms_of(qk_norm=True)):
        targets |= {c.name: c.target.bound for c in recipe_step.comparisons(size, shape, arms) if c.target}
    assert targets == {
        "plain rope, all rows / ours, folded bias": 1.43,
        "plain rope, all rows / ours, reach skip": 1.64,
        "Transformer Engine's windows and rope / ours, reach skip": 1.15,
    }
    assert not any(
        c.target for c in recipe_step.comparisons(size, recipe_step.SHAPES[0], recipe_step.arms_of(qk_norm=True))
    )


def recipe_gate():
    """Build small layers without a GPU, check them as group L does, and run each arm's step."""
    from megacontext_megatron import cpu

    cpu.install()
    size = recipe_step.Size(
        hidden=128, ffn=256, query_heads=4, groups=2, impl="local", dtype=torch.float32, device="cpu"
    )
    checks = []
    with cpu.pretended_device(), recipe_step.one_rank("gloo"):
        for qk_norm in (False, True):
            checks += recipe_step.gate(size, 192, qk_norm=qk_norm)
            stacks = recipe_step.built(size, 192, recipe_step.arms_of(qk_norm=qk_norm), qk_norm=qk_norm)
            case = recipe_step.case(stacks, size, Shape(rows=192, batch=1), qk_norm=qk_norm)
            for contender in case.contenders:
                assert contender.call is not None
                contender.call()
            for arm, layers in stacks.items():
                names = [name for name, p in layers.named_parameters() if p.grad is None or not p.grad.norm() > 0]
                assert not names, (arm.name, names)
    return [(check.name, check.error, check.passed) for check in checks]


def test_the_recipes_layers_agree_where_they_must(tmp_path):
    (found,) = call(recipe_gate, workdir=tmp_path).check().values
    assert len(found) == 7 + 8
    assert all(passed for *_, passed in found), found
