"""Bad input ends the training command with exit code 2 and one sentence, before anything is made or lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.launch import train
from tests.small import TOKENS_ONLY, command, parse_only, refusal, small_flags, tree

CONTEXTS = {
    "C not a multiple of K": ({"mc_source_length": 500}, "--mc-source-length 500", "--mc-block-size 8", "496 and 504"),
    "C shorter than W": ({"mc_source_length": 56}, "--mc-source-length 56", "--seq-length 64"),
    "no C": ({"mc_source_length": None}, "--megacontext needs --mc-source-length"),
    "tail shorter than the horizon": ({"mc_horizon": 17}, "--mc-horizon 17", "--mc-recent-tokens 16"),
    "no horizon": ({"mc_horizon": 0}, "--mc-horizon 0"),
    "tail beyond the window": ({"mc_recent_tokens": 65}, "--mc-recent-tokens 65", "72", "--seq-length 64"),
    "window out of reach": (
        {"mc_source_length": 4096},
        "--seq-length 64",
        "--mc-source-length 4096",
        "--mc-recent-tokens 16",
    ),
    "window out of reach with level 1": (
        {"mc_max_level": 1},
        "--seq-length 64",
        "--mc-source-length 512",
        "--mc-max-level 1",
        "fewest rows reachable are about 78",
    ),
    "nothing to collapse": ({"mc_source_length": 64}, "--mc-source-length 64", "--seq-length 64", "--mc-plan recency"),
    "no variants": ({"mc_variants": 0}, "--mc-variants 0"),
    "the same variant twice": (
        {"mc_plan": "recency", "mc_level2_prob": None},
        "--mc-plan recency",
        "--mc-variants 2",
    ),
    "a probability that no plan reads": ({"mc_plan": "heuristic"}, "--mc-level2-prob", "--mc-plan heuristic"),
    "a level to learn that no context has": (
        {"mc_block_size": 32, "mc_recent_tokens": 32, "seq_length": 128},
        "--gaussian-rope-learnable-sigma level",
        "--mc-max-level 1",
    ),
    "block of one": ({"mc_block_size": 1}, "--mc-block-size 1"),
    "probability above 1": ({"mc_level2_prob": 1.5}, "--mc-level2-prob 1.5"),
    "variants of a sample in two micro-batches": (
        {"micro_batch_size": 3, "global_batch_size": 9},
        "--micro-batch-size 3",
        "--mc-variants 2",
    ),
    "the same in evaluation": ({"eval_micro_batch_size": 1}, "--eval-micro-batch-size 1", "--mc-variants 2"),
    "evaluation that no batch divides": ({"eval_micro_batch_size": 3}, "--eval-micro-batch-size 3"),
    "no window": ({"seq_length": None, "max_position_embeddings": 64}, "--seq-length is needed"),
}
ENCODINGS = {
    "unknown": ({"position_embedding_type": "gausian_rope"}, "--position-embedding-type gausian_rope", "gaussian_rope"),
    "not run by this command": ({"position_embedding_type": "relative"}, "--position-embedding-type relative"),
    "no encoding of spans": (
        {"position_embedding_type": None, "gaussian_rope_learnable_sigma": None},
        "--megacontext needs --position-embedding-type",
    ),
    "Transformer Engine on a CPU": (
        {"transformer_impl": "transformer_engine"},
        "--transformer-impl transformer_engine with --cpu",
    ),
    "Transformer Engine by default, in fp32": (
        {"cpu": None},
        "--transformer-impl transformer_engine without --bf16",
        "add --bf16, or --transformer-impl local",
    ),
    "without effect": ({**TOKENS_ONLY, "mc_horizon": 8}, "--mc-horizon has no effect without --megacontext"),
    "without effect on rope": (
        {**TOKENS_ONLY, "position_embedding_type": "rope", "gaussian_rope_sides": "k"},
        "--gaussian-rope-sides has no effect without --position-embedding-type gaussian_rope",
    ),
}
PARSER = {
    "unknown flag": (["--mc-sauce-length", "512"], "unrecognized arguments: --mc-sauce-length 512"),
    "abbreviated flag": (["--mc-rec", "16"], "unrecognized arguments: --mc-rec 16"),
    "unknown plan": (["--mc-plan", "oracle"], "--mc-plan: invalid choice: 'oracle'"),
    "level 3": (["--mc-max-level", "3"], "--mc-max-level: invalid choice: 3"),
    "no number": (["--mc-horizon", "many"], "--mc-horizon: invalid int value: 'many'"),
    "no value": (["--mc-variants"], "--mc-variants: expected"),
}
LAYOUTS = {
    "W over context-parallel ranks": (
        {"seq_length": 66, "context_parallel_size": 2},
        "--seq-length 66",
        "--context-parallel-size 2",
    ),
    "W over sequence-parallel ranks": (
        {"seq_length": 65, "tensor_model_parallel_size": 2, "sequence_parallel": True},
        "--seq-length 65",
        "--tensor-model-parallel-size 2",
    ),
    "query groups over tensor-parallel ranks": (
        {"num_query_groups": 1, "tensor_model_parallel_size": 2},
        "--num-query-groups 1",
        "--tensor-model-parallel-size 2",
    ),
}


HEAD = {"mc_gist_kind": "gistnet", "mc_gist_span_head": True}
GISTS = {
    "layers of a mean": ({"mc_gist_layers": 3}, "--mc-gist-layers has no effect without --mc-gist-kind gistnet"),
    "a width of a mean": ({"mc_gist_hidden_size": 16}, "--mc-gist-hidden-size has no effect without"),
    "pooling of a mean": ({"mc_gist_pooling": "slot"}, "--mc-gist-pooling has no effect without"),
    "moves of a mean": ({"mc_gist_span_head": True}, "--mc-gist-span-head has no effect without"),
    "no layers": ({"mc_gist_kind": "gistnet", "mc_gist_layers": 0}, "--mc-gist-layers 0"),
    "no width": ({"mc_gist_kind": "gistnet", "mc_gist_hidden_size": 0}, "--mc-gist-hidden-size 0", "multiple of 4"),
    "a width without heads": ({"mc_gist_kind": "gistnet", "mc_gist_hidden_size": 18}, "--mc-gist-hidden-size 18"),
    "gists that no plan makes": (
        {"mc_gist_kind": "gistnet", "mc_plan": "recency", "mc_variants": 1, "mc_level2_prob": None}
        | {"gaussian_rope_learnable_sigma": None},
        "--mc-gist-kind gistnet has no effect with --mc-plan recency",
    ),
    "moves off the integers": ({**HEAD, "gaussian_rope_phase": "megatron"}, "--gaussian-rope-phase exact"),
    "nothing to scale": (
        {**HEAD, "gaussian_rope_sigma": "none", "gaussian_rope_learnable_sigma": None},
        "--mc-gist-span-head",
        "--gaussian-rope-sigma none",
    ),
    "no rotary to move in": ({**HEAD, "no_rope_freq": 1}, "--mc-gist-span-head", "--no-rope-freq"),
    "no rotary in any layer": ({**HEAD, "no_rope_freq": "[1,1]"}, "--mc-gist-span-head", "--no-rope-freq"),
}
CURRICULA = {
    "a stage of nothing": ({"mc_curriculum": ["soon"]}, "--mc-curriculum soon", "SAMPLES:TOKENS"),
    "a late start": ({"mc_curriculum": ["8:128"]}, "--mc-curriculum must begin with a stage at 0"),
    "a stage as short as the window": ({"mc_curriculum": ["0:64"]}, "--mc-curriculum stage of 64", "--seq-length 64"),
    "variants in two stages": ({"mc_curriculum": ["0:128", "9:512"]}, "--mc-curriculum stage at 9", "--mc-variants 2"),
}


@pytest.mark.parametrize(
    "cases", [CONTEXTS, ENCODINGS, GISTS, CURRICULA], ids=["contexts", "encodings", "gists", "curricula"]
)
def test_impossible_settings_are_refused_by_name(refused, cases):
    refused(cases)


def test_layouts_that_cannot_share_out_the_rows_are_refused(refused):
    refused(LAYOUTS, world_size=2)


def test_moved_spans_over_pipeline_stages_are_refused(refused):
    stages = {**HEAD, "pipeline_model_parallel_size": 2}
    refused({"stages": (stages, "--mc-gist-span-head", "--pipeline-model-parallel-size 2", "one stage")}, world_size=2)


def test_the_parser_refuses_what_it_does_not_know(corpus, place, tmp_path):
    flags = small_flags(corpus, save=place / "save", tensorboard_dir=place / "tb")
    outcomes = parse_only([[*flags, *words] for words, _ in PARSER.values()], tmp_path / "work")
    for (_, expected), outcome in zip(PARSER.values(), outcomes, strict=True):
        assert expected in refusal(outcome)
    assert tree(place) == {}


@pytest.fixture
def damaged(corpus, tmp_path):
    """Copy the corpus and damage the copy; returns its prefix."""

    def copy(name: str, suffix: str | None = None, content=None) -> Path:
        prefix = tmp_path / "data" / name
        prefix.parent.mkdir(exist_ok=True)
        for ending in (".bin", ".idx"):
            shutil.copy(f"{corpus}{ending}", f"{prefix}{ending}")
        if suffix is not None:
            path = Path(f"{prefix}{suffix}")
            whole = path.read_bytes()
            path.unlink() if content is None else path.write_bytes(content(whole))
        return prefix

    return copy


def test_damaged_data_are_refused_by_the_name_of_the_file(refused, damaged, corpus, tmp_path):
    missing = tmp_path / "missing"
    cut = damaged("cut", ".idx", lambda whole: whole[: len(whole) // 2])
    header = damaged("header", ".idx", lambda whole: whole[:20])
    foreign = damaged("foreign", ".idx", lambda whole: b"not an index of Megatron's" * 100)
    longer = damaged("longer", ".idx", lambda whole: whole + b"\0")
    short = damaged("short", ".bin", lambda whole: whole[:-2])
    half = damaged("half", ".bin")
    good = damaged("good")
    refused(
        {
            "missing": ({"data_path": missing}, f"{missing}.idx", "--data-path"),
            "with its ending": ({"data_path": f"{corpus}.bin"}, "--data-path", str(corpus), "without .bin"),
            "truncated index": ({"data_path": cut}, f"{cut}.idx is truncated"),
            "truncated header": ({"data_path": header}, f"{header}.idx is truncated"),
            "foreign index": ({"data_path": foreign}, f"{foreign}.idx is not a Megatron index"),
            "longer index": ({"data_path": longer}, f"{longer}.idx is corrupt"),
            "truncated data": ({"data_path": short}, f"{short}.bin is truncated"),
            "data without tokens": ({"data_path": half}, f"{half}.bin does not exist"),
            "one of a blend": ({"data_path": ["0.5", good, "0.5", cut]}, f"{cut}.idx is truncated"),
            "validation data": (
                {"data_path": None, "split": None, "train_data_path": good, "valid_data_path": cut},
                f"{cut}.idx is truncated",
            ),
            "none": ({"data_path": None}, "--data-path"),
        }
    )


def test_data_of_another_tokenizer_are_refused(refused, corpus, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text("text " * 1000)
    prefix = tmp_path / "bytes"
    built = command(
        "data.corpus", ["--input", tmp_path / "text", "--output-prefix", prefix], workdir=tmp_path / "build"
    )
    built.check()
    refused(
        {
            "another end of document": ({"null_tokenizer_eod_id": 10}, f"{prefix}.bin", "--null-tokenizer-eod-id 256"),
            "fewer tokens": ({"vocab_size": 200}, "--vocab-size 200", f"{prefix}.bin"),
        },
        data_path=prefix,
    )
    for ending in (".bin", ".idx"):
        shutil.copy(f"{corpus}{ending}", f"{prefix}{ending}")
    refused({"an index of another build": ({}, f"{prefix}.idx is not the one")}, data_path=prefix)


def test_checkpoints_of_other_runs_are_refused_and_kept(refused, small_run, place, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(small_run.save_dir, own)
    before = tree(own)
    refused(
        {
            "another model": ({"load": own, "num_layers": 4}, str(own), "--num-layers: checkpoint 2, this run 4"),
            "another data order": ({"load": own, "mc_variants": 1}, "--mc-variants: checkpoint 2, this run 1"),
            "into itself": ({"load": own, "save": own, "hidden_size": 64}, "--hidden-size: checkpoint 32, this run 64"),
            "another encoding": (
                {**TOKENS_ONLY, "load": own, "save": own, "position_embedding_type": "rope"},
                "--position-embedding-type: checkpoint gaussian_rope, this run rope",
            ),
            "another padding": ({"load": own, "save": own, "make_vocab_size_divisible_by": 128}, "320", "384"),
            "missing": ({"load": place / "nothing"}, f"--load {place / 'nothing'}", "random weights"),
            "missing step": ({"load": own, "ckpt_step": 3}, "iter_0000003", "--ckpt-step 3"),
        }
    )
    assert tree(own) == before


def test_a_refused_job_ends_on_every_rank_and_says_so_once(corpus, place, tmp_path):
    flags = small_flags(
        corpus, seq_length=66, context_parallel_size=2, save=place / "save", data_cache_path=place / "c"
    )
    result = train([*flags, "--tensorboard-dir", str(place / "tb")], 2, workdir=tmp_path / "work")
    assert result.returncode == 2
    assert result.seconds < 60
    lines = [line for line in result.log.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: --seq-length 66 ")
    assert "Traceback" not in result.log
    assert tree(place) == {}


def test_an_accepted_command_line_does_make_its_folders(corpus, place, tmp_path):
    flags = small_flags(corpus, save=place / "save", tensorboard_dir=place / "tb", data_cache_path=place / "cache")
    (outcome,) = parse_only([flags], tmp_path / "work")
    assert outcome["code"] == 0
    assert "tb" in tree(place)
