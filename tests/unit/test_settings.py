"""Command lines become settings, or are refused by name, through Megatron's own parser and validation."""

import dataclasses
import json
import re
from importlib.util import find_spec

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megacontext_megatron.attention_config import AttentionConfig
from megacontext_megatron.config import ContextConfig, GaussianRopeConfig, GistConfig, RotaryConfig, Settings
from megacontext_megatron.flags import (
    ContextFlags,
    GistFlags,
    ObjectiveFlags,
    PositionFlags,
    PredictionFlags,
    WatchFlags,
)
from megacontext_megatron.refusals import REFUSALS, SPAN_REFUSALS
from tests.small import TOKENS_ONLY, parse_only, refusal, small_flags

DOCUMENTS = {
    "MTP": [["--mtp-num-layers", "1"]],
    "--reset-position-ids": [["--reset-position-ids"]],
    "--reset-attention-mask": [["--reset-attention-mask"]],
    "packing/SFT": [["--sft"], ["--dataloader-inter-document-masking"]],
    "FIM": [["--fim-data"]],
    "CUDA graphs": [
        ["--cuda-graph-impl", "local"],
        ["--cuda-graph-impl", "transformer_engine"],
        ["--cuda-graph-impl", "full_iteration"],
        ["--enable-cuda-graph"],
        ["--external-cuda-graph"],
        ["--optimizer-cuda-graph"],
    ],
    "MoE communication overlap": [["--overlap-moe-expert-parallel-comm"]],
    "FSDP": [["--use-megatron-fsdp"], ["--use-torch-fsdp2"]],
    "HybridModel": [["--hybrid-layer-pattern", "M*"], ["--hybrid-override-pattern", "M*"], ["--is-hybrid-model"]],
    "MLA": [["--multi-latent-attention"]],
    "flash decode": [["--flash-decode"]],
    "--fused-single-qkv-rope": [["--fused-single-qkv-rope"]],
    "cyclic and external data loaders": [["--dataloader-type", "cyclic"], ["--dataloader-type", "external"]],
    "--full-validation": [["--full-validation"]],
    "--multiple-validation-sets": [["--multiple-validation-sets"]],
    "--hybrid-context-parallel": [["--hybrid-context-parallel"]],
    "--phase-transition-iterations": [["--phase-transition-iterations", "2,4"]],
}
"""What the documents contract refuses until a test of that layout proves it, each with the ways to ask for it."""

OTHERS = [
    ["--perform-rl-step"],
    ["--logits-load-dir", "logits"],
    ["--heterogeneous-layers-config-path", "layers.json"],
    ["--heterogeneous-layers-config-encoded-json", "{}"],
    ["--experimental-attention-variant", "dsa"],
    ["--spec", "some.module", "spec"],
    ["--qk-l2-norm"],
    ["--use-kitchen-attention"],
    ["--kitchen-config-file", "recipe.yaml"],
    ["--kitchen-recipe-number", "1"],
    ["--dynamic-context-parallel"],
    ["--ckpt-format", "torch"],
    ["--ckpt-format", "torch_dcp"],
    ["--yaml-cfg", "run.yaml"],
    ["--inprocess-restart"],
    ["--log-straggler"],
    ["--transformer-impl", "inference_optimized"],
    ["--seed", "-1"],
    ["--dist-ckpt-strictness", "log_all"],
    ["--dist-ckpt-strictness", "ignore_all"],
    ["--non-persistent-ckpt-type", "global"],
    ["--attention-backend", "local"],
    ["--use-transformer-engine-op-fuser"],
    ["--use-grouped-gemm-for-dense-mlp"],
]
WITH_SPANS = [
    ["--transformer-impl", "transformer_engine"],
    ["--apply-layernorm-1p"],
    ["--fp8-format", "hybrid"],
    ["--fp4-format", "e2m1"],
    ["--attention-backend", "flash"],
    ["--attention-backend", "fused"],
    ["--window-size", "16,1"],
    ["--window-size", "16"],
    ["--cp-comm-type", "all_gather"],
    ["--fp32-residual-connection", "--bf16"],
    ["--fused-residual-rmsnorm"],
    ["--tp-comm-overlap"],
    ["--fine-grained-activation-offloading"],
    ["--fp8-dot-product-attention"],
    ["--fp8-multi-head-attention"],
    ["--mc-backend", "triton"],
    *(
        ["--bias-fold", "--position-bias", "alibi", *words]
        for words in (
            ["--retrofit", "slow-bands"],
            ["--softmax-type", "off-by-one"],
            ["--fp16"],
            ["--attention-output-gate"],
            ["--qk-clip"],
        )
    ),
    ["--cpu-offloading-num-layers", "1"],
    ["--te-precision-config-file", "precision.yaml"],
    ["--use-distributed-optimizer", "--retrofit", "slow-bands"],
]
ON_TE = {"cpu": None, "transformer_impl": "transformer_engine", "bf16": True}
CP = ["--context-parallel-size", "2"]
WITH_TE = {
    "fp32": ({"bf16": None}, ["--transformer-impl", "transformer_engine"], "without --bf16", "TF32", "local"),
    "a kernel without norms": (
        {},
        ["--mc-backend", "triton", "--gaussian-rope-renorm", "rms"],
        "--gaussian-rope-renorm",
    ),
    "a kernel of exact phases": (
        {},
        ["--mc-backend", "triton", "--gaussian-rope-phase", "megatron"],
        "--gaussian-rope-phase",
    ),
    "a wider key": ({}, ["--gaussian-rope-log-width-bias"], "--transformer-impl transformer_engine"),
    "a fold in rounded scores": (
        {},
        ["--bias-fold", "--position-bias", "alibi", "--attention-backend", "unfused"],
        "--bias-fold with --attention-backend unfused",
        "leave the flag out",
    ),
    "a bias on scores": ({}, ["--position-bias", "fire"], "--transformer-impl local alone"),
    "steps behind a norm": (
        {"gaussian_rope_learnable_sigma": None},
        ["--grapem-contextual", "--position-embedding-type", "grapem"],
        "add --transformer-impl local",
    ),
    "sums over rows without an order": (
        {"transformer_impl": "local"},
        ["--deterministic-mode", "--position-bias", "fox"],
        "no deterministic kernel",
    ),
    "dense attention": ({"transformer_impl": "local"}, ["--attention-backend", "unfused"], "--mc-global-backend"),
    "4 bits": ({}, ["--fp4-format", "e2m1"]),
    "rows of one rank": ({}, ["--attention-backend", "unfused", *CP], "--context-parallel-size"),
    "no such exchange": ({}, ["--cp-comm-type", "ring", *CP], "p2p, a2a, all_gather, a2a+p2p"),
    "three exchanges for two layers": ({}, ["--cp-comm-type", "p2p", "a2a", "p2p", *CP], "--num-layers"),
    "sinks in a ring": ({}, ["--softmax-type", "learnable", *CP], "--context-parallel-size", "a2a"),
}
"""Overrides, words behind the small run's on Transformer Engine's layers, and parts of the refusal."""

FOR_TE = [
    CP,
    ["--cp-comm-type", "all_gather", *CP],
    ["--cp-comm-type", "a2a", "--window-size", "16,0", *CP],
    ["--cp-comm-type", "a2a", "p2p", "--window-size", "16,0", "--window-attn-skip-freq", "[1,0]", *CP],
    ["--window-size", "16,0"],
    ["--fp8-format", "hybrid"],
    ["--attention-backend", "flash"],
    ["--attention-backend", "unfused"],
    ["--apply-layernorm-1p"],
]
"""Words that Transformer Engine's layers take."""

NOT_IN_MEGATRON = {
    "--fused-single-qkv-rope",
    "--dynamic-context-parallel",
    "--kitchen-config-file",
    "--kitchen-recipe-number",
    "--fp8-dot-product-attention",
    "--fp8-multi-head-attention",
}
"""Flags of other releases, or of packages that are not installed: the parser itself refuses them by name."""

CHANGED = {
    "mc_source_length": 1024,
    "mc_variants": 4,
    "mc_block_size": 16,
    "mc_max_level": 1,
    "mc_recent_tokens": 32,
    "mc_horizon": 8,
    "mc_plan": "heuristic",
    "mc_level2_prob": 0.75,
    "mc_eod_policy": "no-cross",
    "gaussian_rope_sigma": "width",
    "gaussian_rope_learnable_sigma": "head",
    "gaussian_rope_sides": "k",
    "gaussian_rope_renorm": "rms",
    "gaussian_rope_phase": "megatron",
    "gaussian_rope_log_width_bias": True,
    "mc_gist_kind": "gistnet",
    "mc_gist_layers": 3,
    "mc_gist_hidden_size": 16,
    "mc_gist_pooling": "slot",
    "mc_gist_span_head": True,
    "mc_loss_gist_rows": 0.5,
    "mc_loss_advantage": 0.25,
    "mc_loss_contrast": 0.125,
    "mc_loss_after_token": 7,
    "mc_predict_level1": 0.5,
    "mc_predict_level2": 0.25,
    "mc_predict_readout": "infonce",
    "mc_probe_interval": 10,
    "mc_probe_samples": 3,
    "mc_guards": "warn",
    "mc_guard_after": 7,
    "mc_curriculum": "0:128",
}
"""Another value than the small run's for every flag that becomes a setting."""

GISTNET = {"mc_gist_kind": "gistnet"}

NEEDED = {
    "mc_variants": {"micro_batch_size": 4},
    "mc_max_level": {"mc_source_length": 256},
    "mc_block_size": {"mc_max_level": 2, "mc_source_length": 768},
    "mc_plan": {"mc_level2_prob": None},
    **{f"mc_gist_{name}": GISTNET for name in ("layers", "hidden_size", "pooling", "span_head")},
    "mc_loss_contrast": GISTNET,
    "mc_predict_readout": {"mc_predict_level1": 1.0},
    "mc_probe_interval": {"log_interval": 5},
}
"""What else must change with a flag for its value to be possible."""

SHORT = re.compile(r"^(gaussian_rope|mc_gist|mc_loss|mc_predict|mc)_")
"""What the name of a flag has before that of its setting."""

WRITTEN = {
    "mc_loss_after_token": "after_token=(7,)",
    "mc_curriculum": "curriculum=(CurriculumStage(samples=0, history=128, level2_prob=0.3),)",
}
"""Settings that look otherwise than the flag."""

TOGETHER = {f"mc_{name}" for name in ("loss_kl", "loss_pooling", "phase", "pooling_samples", "teacher", "teacher_path")}
"""Flags that need each other; test_objective_arguments has them."""


@pytest.fixture(scope="module")
def outcomes(corpus, tmp_path_factory):
    """Try command lines in one process: the small run's with overrides, and the same with more words behind it."""

    def attempt(*cases, more=((),)):
        whole = [[*small_flags(corpus, **overrides), *words] for overrides in cases for words in more]
        return parse_only(whole, tmp_path_factory.mktemp("parse"))

    return attempt


def by_name(outcome, line):
    """Return how a command line was refused, which must be by the name of its first flag."""
    said = refusal(outcome)
    if line[0] in NOT_IN_MEGATRON:
        assert f"error: unrecognized arguments: {line[0]}" in said
    else:
        assert said.startswith(f"error: {line[0]} ")
        assert " not supported" in said
        assert said.endswith(".")
    return said


@pytest.mark.parametrize("encoding", ["gaussian_rope", "rope"])
def test_every_entry_of_the_documents_contract_is_refused_by_name(outcomes, encoding):
    ours = encoding == "gaussian_rope"
    lines = [line for entry in DOCUMENTS.values() for line in (entry if ours else entry[:1])]
    overrides = {} if ours else {**TOKENS_ONLY, "position_embedding_type": encoding}
    accepted, *refused = outcomes(overrides, more=[[], *lines])
    assert accepted["code"] == 0, accepted["err"]
    for outcome, line in zip(refused, lines, strict=True):
        by_name(outcome, line)


def test_every_other_refusal_is_by_name(outcomes):
    lines = [*OTHERS, *WITH_SPANS]
    for outcome, line in zip(outcomes({"ckpt_format": None}, more=lines), lines, strict=True):
        by_name(outcome, line)


def test_what_transformer_engine_would_get_wrong_is_refused_by_name(outcomes):
    lines = [{**ON_TE, **overrides} for overrides, *_ in WITH_TE.values()]
    for (_, words, *parts), line in zip(WITH_TE.values(), lines, strict=True):
        (outcome,) = outcomes(line, more=[words])
        said = by_name(outcome, words)
        for part in parts:
            assert part in said


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="Transformer Engine is installed")
def test_without_transformer_engine_the_only_refusal_names_the_package(outcomes):
    rope = {**TOKENS_ONLY, "position_embedding_type": "rope"}
    found = [*outcomes(ON_TE, more=[[], *FOR_TE]), *outcomes({**ON_TE, **rope}, {**rope, "cpu": None})]
    for outcome in found:
        said = by_name(outcome, ["--transformer-impl"])
        assert "transformer_engine cannot be imported" in said
        assert "scripts/environment.sh te" in said
        assert "--transformer-impl local" in said


def test_refusals_with_spans_leave_stock_encodings_alone(outcomes):
    stock = {**TOKENS_ONLY, "position_embedding_type": "rope", "normalization": "LayerNorm"}
    assert outcomes(stock, more=[["--apply-layernorm-1p"]])[0]["code"] == 0


def test_every_refusal_can_happen(outcomes):
    plain = [*(line for entry in DOCUMENTS.values() for line in entry), *OTHERS, *WITH_SPANS]
    said = [outcome["err"] for outcome in (*outcomes({"ckpt_format": None}, more=plain), *outcomes(ON_TE))]
    for overrides, words, *_ in WITH_TE.values():
        said += [outcome["err"] for outcome in outcomes({**ON_TE, **overrides}, more=[words])]
    flags = {entry.flag for entry in (*REFUSALS, *SPAN_REFUSALS)}
    never = {flag for flag in flags if not any(f"error: {flag} is not supported" in err for err in said)}
    present = {
        flag for flag in flags if flag.endswith("without Transformer Engine") and find_spec("transformer_engine")
    }
    assert never == present | (NOT_IN_MEGATRON & flags)


def test_flags_become_settings(outcomes):
    (outcome,) = outcomes({})
    expected = Settings(
        encoding="gaussian_rope",
        rotary=RotaryConfig(head_dim=8),
        context=ContextConfig(
            window=64,
            source_length=512,
            variants=2,
            block_size=8,
            max_level=2,
            recent_tokens=16,
            horizon=16,
            plan="random",
            level2_prob=0.3,
            eod_policy="ignore",
        ),
        gaussian=GaussianRopeConfig(learnable_sigma="level"),
        gist=GistConfig(hidden=32, hidden_size=32),
        megacontext=True,
        seed=1234,
        attention=AttentionConfig(backends=("megatron", "megatron")),
    )
    assert outcome["settings"] == repr(expected)


def test_every_flag_of_the_plugin_changes_the_settings(outcomes):
    groups = (ContextFlags, PositionFlags, GistFlags, ObjectiveFlags, PredictionFlags, WatchFlags)
    fields = {field.name for kind in groups for field in dataclasses.fields(kind)}
    assert fields - set(CHANGED) == {"megacontext", "mc_encoding"} | TOGETHER
    changes = [{**NEEDED.get(name, {}), name: value} for name, value in CHANGED.items()]
    found = outcomes(*(NEEDED.get(name, {}) for name in CHANGED), *changes)
    for name, before, after in zip(CHANGED, found[: len(CHANGED)], found[len(CHANGED) :], strict=True):
        assert before["code"] == after["code"] == 0, after["err"]
        assert before["settings"] != after["settings"]
        assert WRITTEN.get(name, f"{SHORT.sub('', name)}={CHANGED[name]!r}") in after["settings"]


def test_flags_of_megatron_that_positions_read_become_settings(outcomes):
    changed = {
        "--rotary-base 500": "base=500",
        "--rotary-percent 0.5": "percent=0.5",
        "--rotary-interleaved": "interleaved=True",
        "--rotary-seq-len-interpolation-factor 4": "interpolation=4",
        "--use-rope-scaling --rope-scaling-factor 2.0": "llama3_factor=2.0",
        "--kv-channels 16": "head_dim=16",
        "--seed 7": "seed=7",
        "--no-rope-freq 2": "no_rope_layers=(2,)",
        "--no-rope-freq [1,0]": "no_rope_layers=(1,)",
    }
    found = outcomes({}, more=[flags.split() for flags in changed])
    for expected, outcome in zip(changed.values(), found, strict=True):
        assert expected in outcome["settings"], outcome["err"]


def test_stock_encodings_have_no_gaussian_settings(outcomes):
    encodings = ("rope", "learned_absolute", "none")
    cases = [{**TOKENS_ONLY, "position_embedding_type": encoding} for encoding in encodings]
    for encoding, outcome in zip(encodings, outcomes(*cases), strict=True):
        assert f"encoding='{encoding}'" in outcome["settings"]
        assert "gaussian=None" in outcome["settings"]
        assert "context=ContextConfig(window=64, source_length=64, variants=1" in outcome["settings"]


GAUSSIAN = "--position-embedding-type gaussian_rope."
WITHOUT = {
    "--gaussian-rope-phase": "a rotary --position-embedding-type over spans.",
    "--gaussian-rope-log-width-bias": "--megacontext.",
}


def test_flags_without_effect_are_refused(outcomes):
    context = [f"--{name.replace('_', '-')}" for name in CHANGED if name.startswith("mc_")]
    position = [f"--{name.replace('_', '-')}" for name in CHANGED if name.startswith("gaussian_")]
    values = {f"--{name.replace('_', '-')}": str(value) for name, value in CHANGED.items() if value is not True}
    lines = [[flag, *([values[flag]] if flag in values else [])] for flag in (*context, *position)]
    tokens = outcomes(TOKENS_ONLY, more=lines[: len(context)])
    stock = outcomes({**TOKENS_ONLY, "position_embedding_type": "rope"}, more=lines[len(context) :])
    for flag, outcome in zip(context, tokens, strict=True):
        assert refusal(outcome) == f"error: {flag} has no effect without --megacontext."
    for flag, outcome in zip(position, stock, strict=True):
        assert refusal(outcome).startswith(f"error: {flag} has no effect without {WITHOUT.get(flag, GAUSSIAN)}")


def test_learning_what_gets_no_gradient_is_refused(outcomes):
    cases = [
        ({**TOKENS_ONLY, "gaussian_rope_learnable_sigma": "level"}, "--gaussian-rope-learnable-sigma"),
        ({**TOKENS_ONLY, "gaussian_rope_log_width_bias": True}, "--gaussian-rope-log-width-bias"),
        ({"mc_plan": "recency", "mc_variants": 1, "mc_level2_prob": None}, "--gaussian-rope-learnable-sigma"),
        ({"gaussian_rope_sigma": "none"}, "--gaussian-rope-learnable-sigma"),
    ]
    found = outcomes(*(overrides for overrides, _ in cases))
    for (_, flag), outcome in zip(cases, found, strict=True):
        assert refusal(outcome).startswith(f"error: {flag} ")


def test_fused_rope_which_rotates_by_slot_is_off(outcomes):
    (outcome,) = outcomes({})
    (line,) = (line for line in outcome["out"].splitlines() if "apply_rope_fusion" in line)
    assert line.split()[-1] == "False"


def test_a_tokenizer_file_needs_no_vocabulary_size(outcomes, tmp_path):
    vocabulary = {chr(ord("a") + place): place for place in range(26)} | {"<eos>": 26, "<unk>": 27}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    model = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tmp_path}
    data = {"data_path": None, "split": None, "mock_data": True}
    found, typical = outcomes({**model, **data, "vocab_size": None, "null_tokenizer_eod_id": None}, {})
    assert found["code"] == 0
    assert found["settings"] == typical["settings"]


def test_padding_that_depends_on_the_layout_is_announced(corpus, tmp_path):
    layout = {"tensor_model_parallel_size": 2}
    lines = [small_flags(corpus, **layout), small_flags(corpus, **layout, make_vocab_size_divisible_by=64)]
    same, more = parse_only(lines, tmp_path, world_size=2)
    assert "the vocabulary is padded" not in same["out"]
    said = "the vocabulary is padded to 384 under --tensor-model-parallel-size 2 and would be to 320 without"
    assert said in more["out"]
