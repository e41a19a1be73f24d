"""The resolved layer table on Transformer Engine's layers, and norms that leave no extra state in checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from megacontext_megatron.attention.layer_spec import ResolvedLayer, resolved_layers
from megacontext_megatron.attention.norm import without_extra_state
from megacontext_megatron.attention.transformer_config import MegaContextTransformerConfig
from megacontext_megatron.config import ContextConfig, GaussianRopeConfig, RotaryConfig, Settings

LAYERS = 3


def table(**overrides: Any) -> list[ResolvedLayer]:
    """Return the table of a model on Transformer Engine's layers, the second of which rotates nothing."""
    config = MegaContextTransformerConfig(
        num_layers=LAYERS,
        hidden_size=64,
        num_attention_heads=4,
        transformer_impl="transformer_engine",
        mc_settings=Settings(
            encoding="gaussian_rope",
            rotary=RotaryConfig(head_dim=16),
            context=ContextConfig.tokens_only(64),
            gaussian=GaussianRopeConfig(),
            backend="triton",
            no_rope_layers=(2,),
        ),
        **overrides,
    )
    return resolved_layers(config)


def attention(**overrides: Any) -> list[str]:
    """Return the core attention of every layer."""
    return [layer.backend for layer in table(**overrides)]


def test_the_table_names_what_was_asked_of_transformer_engine():
    assert attention() == ["transformer_engine, auto"] * LAYERS
    assert attention(attention_backend=AttnBackend.fused) == ["transformer_engine, fused"] * LAYERS


@pytest.mark.parametrize(
    ("asked", "each"),
    [(None, ["p2p"] * LAYERS), ("all_gather", ["all_gather"] * LAYERS), (["a2a", "p2p", "a2a"], ["a2a", "p2p", "a2a"])],
)
def test_the_table_names_how_each_layer_exchanges_rows(asked, each):
    found = attention(context_parallel_size=2, cp_comm_type=asked)
    assert found == [f"transformer_engine, auto, {kind}" for kind in each]


def test_the_table_names_what_rotates_each_layer():
    assert [layer.as_row()[1:3] for layer in table()] == [
        ("gaussian_rope", "triton"),
        ("none", "none"),
        ("gaussian_rope", "triton"),
    ]


class WithState(torch.nn.LayerNorm):
    """A norm with an entry of its own in checkpoints, as Transformer Engine's have."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0)

    def set_extra_state(self, state: torch.Tensor) -> None:
        assert state.numel() == 0


def test_norms_without_extra_state_load_what_plain_norms_saved():
    plain = torch.nn.LayerNorm(8).state_dict()
    norm = without_extra_state(WithState)(normalized_shape=8)
    assert isinstance(norm, WithState)
    norm.load_state_dict(plain, strict=True)
    assert norm.state_dict().keys() == plain.keys()
    with pytest.raises(RuntimeError, match="_extra_state"):
        WithState(8).load_state_dict(plain, strict=True)
