"""What a run says of its gists and terms when it starts."""

from __future__ import annotations

import dataclasses

from megacontext_megatron.config import ContextConfig, GistConfig, ObjectiveConfig, RotaryConfig, Settings
from megacontext_megatron.run import gist_line

MEANS = Settings(
    encoding="gaussian_rope",
    rotary=RotaryConfig(head_dim=64),
    context=ContextConfig(window=256, source_length=1024),
    megacontext=True,
)


def test_means_and_no_terms_are_named():
    assert gist_line(MEANS) == "gists: means | terms beside next-token loss: none | phase: substitution"


def test_gistnet_and_its_terms_are_named():
    gist = GistConfig(hidden=512, kind="gistnet", hidden_size=256, pooling="slot", span_head=True)
    learned = dataclasses.replace(MEANS, gist=gist, objective=ObjectiveConfig(advantage=0.1, contrast=0.05))
    line = gist_line(learned)
    assert "GistNet, 2 layers of 256, slot pooling, moving its spans" in line
    assert "advantage 0.1, contrast 0.05" in line
