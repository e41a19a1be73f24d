"""The doctor finds what a model runs on, and what is missing from it."""

# Faults are planted here by hand, and some libraries export less than they offer.
# pyright: reportAttributeAccessIssue=false, reportOptionalSubscript=false

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megacontext_megatron.position.registry import BIAS_ENTRIES, ENTRIES, FEATURES
from tests import mutations
from tests.parity import TWO_RANKS
from tests.small import TOKENS_ONLY, command, small_flags

REPOSITORY = Path(__file__).parents[2]


def findings(log: str) -> dict[str, str]:
    """Return what the doctor found, by subject; layers of several ranks together."""
    lines = (line.strip().split(maxsplit=1) for line in log.splitlines() if line.startswith("  "))
    found = {}
    for line in lines:
        if len(line) == 2 and line[0] in ("layer", "pipeline"):
            number, rest = line[1].removeprefix("stage ").split(maxsplit=1)
            found[f"{line[0]} {number}"] = rest.strip()
        elif len(line) == 2:
            found[line[0]] = line[1].strip()
    return found


def test_the_doctor_finds_what_was_asked_for(corpus, tmp_path):
    result = command("doctor", small_flags(corpus, log_interval=1), workdir=tmp_path).check()
    found = findings(result.log)
    assert found["encoding"] == "gaussian_rope"
    assert found["context"] == "64 rows over 512 tokens, K = 8, levels 0 to 2, 2 variant(s), plan random"
    assert found["carrier"] == "span metadata"
    assert found["apply_rope_fusion"] == "False"
    for layer in (1, 2):
        assert (
            found[f"layer {layer}"]
            == "SpanSelfAttention, gaussian_rope, rotary torch, core DotProductAttention (dense)"
        )
    for package in ("python", "megatron-core", "torch", "numpy"):
        assert found[package][0].isdigit()
    assert "NOT ACTIVE" not in result.log
    assert result.log.count("--mtp-num-layers") == 1
    assert found["start-up"]


@pytest.mark.full
@pytest.mark.parametrize("name", TWO_RANKS)
def test_the_doctor_examines_every_rank_of_a_layout(corpus, tmp_path, name):
    result = command("doctor", small_flags(corpus, **TWO_RANKS[name]), 2, workdir=tmp_path).check()
    backend = "dense, gathered keys" if name == "cp" else "dense"
    core = "GatheredKeyAttention" if name == "cp" else "DotProductAttention"
    expected = f"SpanSelfAttention, gaussian_rope, rotary torch, core {core} ({backend})"
    layers = [line.split(maxsplit=2) for line in result.log.splitlines() if line.startswith("  layer ")]
    assert {line[2] for line in layers} == {expected}
    assert sorted(line[1] for line in layers) == (["1", "2"] if name == "pp" else ["1", "1", "2", "2"])
    assert result.log.count("\nversions\n") == 1


def test_the_doctor_says_what_a_stock_encoding_runs(corpus, tmp_path):
    flags = small_flags(corpus, **TOKENS_ONLY, position_embedding_type="rope")
    found = findings(command("doctor", flags, workdir=tmp_path).check().log)
    assert found["encoding"] == "rope"
    assert found["layer 2"] == "SelfAttention, rope, rotary Megatron, core DotProductAttention (dense)"
    assert "carrier" not in found


def one_stock_layer() -> None:
    """Let the second layer be Megatron's own."""
    from megatron.core.transformer.attention import SelfAttention

    from megacontext_megatron.model import gpt

    real = gpt.decoder_block_spec

    def with_stock(*args: Any, **kwargs: Any) -> Any:
        spec = real(*args, **kwargs)
        spec.layer_specs[1].submodules.self_attention.module = SelfAttention
        return spec

    gpt.decoder_block_spec = with_stock


def one_still_layer() -> None:
    """Let the rotary of the first layer leave queries and keys as they are."""
    from megacontext_megatron.attention.self_attention import SpanSelfAttention

    real = SpanSelfAttention.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        if self.layer_number == 1:
            self.rotary.forward = lambda query, key, spans: (query, key)

    SpanSelfAttention.__init__ = init


def nothing_learned() -> None:
    """Let all layers forget that sigma is learned."""
    from megacontext_megatron.position.gaussian import GaussianRotary

    real = GaussianRotary.__init__

    def init(self: Any, *args: Any) -> None:
        real(self, *args[:3])

    GaussianRotary.__init__ = init


def stock_carrier() -> None:
    """Let the model keep Megatron's rotary embedding."""
    from megacontext_megatron.model import gpt

    gpt.SpanCarrier = lambda *args: None


FAULTS = {
    one_stock_layer: ("layer 2", "NOT ACTIVE: gaussian_rope (the layer is SelfAttention)"),
    one_still_layer: ("layer 1", "NOT ACTIVE: rotation by gaussian_rope"),
    mutations.zero_sigma: ("layer 2", "NOT ACTIVE: rotation by gaussian_rope"),
    nothing_learned: ("layer 1", "NOT ACTIVE: --gaussian-rope-learnable-sigma"),
    stock_carrier: ("carrier", "NOT ACTIVE"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_doctor_exits_with_1_where_something_is_not_active(corpus, tmp_path, fault: Callable[[], None]):
    result = command("doctor", small_flags(corpus), workdir=tmp_path, before=fault)
    assert result.returncode == 1
    assert "error: something requested is not active" in result.log
    subject, expected = FAULTS[fault]
    found = findings(result.log)
    assert found[subject].endswith(expected)
    others = {"layer 1", "layer 2", "carrier"} - {subject}
    if fault in (one_stock_layer, one_still_layer, stock_carrier):
        assert not [name for name in others if "NOT ACTIVE" in found[name]]


def test_the_doctor_exits_with_2_where_a_request_is_refused(corpus, tmp_path):
    result = command("doctor", small_flags(corpus, mc_source_length=500), workdir=tmp_path)
    assert result.returncode == 2
    assert "error: --mc-source-length 500 must be a multiple of --mc-block-size 8" in result.log
    assert "Traceback" not in result.log


def test_the_doctor_alone_shows_the_installation(tmp_path):
    result = command("doctor", ["--cpu"], workdir=tmp_path).check()
    assert "this run" not in result.log
    assert "not supported" in result.log


def test_the_doctor_prints_the_tables_of_the_readme(tmp_path):
    printed = command("doctor", ["--tables"], workdir=tmp_path).check().log
    lines = [line for line in printed.splitlines() if line.startswith("| `")]
    for entry in (*ENTRIES, *BIAS_ENTRIES):
        (line,) = (line for line in lines if line.startswith(f"| `{entry.name}` |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[2 : 2 + len(FEATURES)] == [entry.support(feature) for feature in FEATURES]
    ours = ENTRIES[0]
    assert ours.name == "gaussian_rope"
    assert ours.support("spans") == "yes" != ours.support("packed sequences")
    assert any(line.startswith("| `--mc-source-length` |") for line in lines)
    assert any(line.startswith("| `mc/lod_loss/{level}` |") for line in lines)
    readme = (REPOSITORY / "README.md").read_text()
    for name in ("flags", "support", "metrics"):
        assert readme.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0].strip() in printed
