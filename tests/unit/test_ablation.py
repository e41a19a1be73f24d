"""scripts/ablation.sh and its table: which runs start, with which flags, and what is made of what they print."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import ablation_table
from tests.parity import GRAPE, MOE

ROOT = Path(__file__).parents[2]
ABLATION = ROOT / "scripts" / "ablation.sh"
BASH = shutil.which("bash") or "/bin/bash"
OWN = ("ARMS", "SEEDS", "JOBS", "OUT", "SUBMIT", "TRAIN_DATA", "VALID_DATA", "NPROC_PER_NODE", "STEPS", "MC_CPU")
ARMS = ["recipe", "grapem", "nope", "rope"]

LOG = """\
 > number of parameters on (tensor, gtp_weight_remat, pipeline) model parallel rank (0, 0, 0): 1000
 > number of parameters on (tensor, gtp_weight_remat, pipeline) model parallel rank (0, 0, 1): 200
 [now] iteration       10/      40 | elapsed time per iteration (ms): 900.0 | lm loss: 5.0E+00 |
 validation loss at iteration 20 | lm loss value: 9.9E+00 | lm loss PPL: 2.0E+04 |
 [now] iteration       20/      40 | elapsed time per iteration (ms): 30.0 | lm loss: 4.0E+00 |
"""
END = """\
 > number of parameters on (tensor, gtp_weight_remat, pipeline) model parallel rank (0, 0, 0): 1000
 > number of parameters on (tensor, gtp_weight_remat, pipeline) model parallel rank (0, 0, 1): 200
 [now] iteration       30/      40 | elapsed time per iteration (ms): 20.0 | lm loss: 3.0E+00 |
 [now] iteration       40/      40 | elapsed time per iteration (ms): 40.0 | lm loss: 3.0E+00 |
 validation loss at iteration 40 | lm loss value: 8.8E+00 | lm loss PPL: 2.0E+04 |
 validation loss at iteration 40 on validation set | lm loss value: 2.5E+00 | lm loss PPL: 1.2E+01 | \
mc/nll_last/64/recency value: 2.25E+00 | mc/nll_last/64/recency PPL: 9E+00 | mc/nll_last/64/random value: 2.125E+00 |
"""

# Stands in for the interpreter: all is installed, a launch is written down and prints a log, and the rest is real.
RUNTIME = """#!/bin/sh
if [ "$1" = -c ]; then exit 0; fi
if [ "$2" != torch.distributed.run ]; then exec {python} "$@"; fi
while [ "$1" != --save ]; do shift; done
echo "$ARM $SEED $CUDA_VISIBLE_DEVICES" >>{folder}/started
if [ "$ARM" = "$FAILING" ]; then echo "no"; exit 3; fi
cat {folder}/log
"""
# The operations are in a checkpoint, which these runs do not have.
TABLE = """
import sys
sys.path.insert(0, {root!r})
from scripts import ablation_table
ablation_table.trained_flops = lambda run: 1e15
raise SystemExit(ablation_table.main())
"""


class Ablation:
    """The script over launches that only print; `started` are the runs that were launched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "results"
        (folder / "log").write_text(LOG + END)
        self.root = folder / "checkout"
        shutil.copytree(ROOT / "scripts", self.root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "examples", self.root / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        (self.root / "scripts" / "ablation_table.py").write_text(TABLE.format(root=str(ROOT)))
        self.runtime = folder / "python"
        self.runtime.write_text(RUNTIME.format(python=shlex.quote(sys.executable), folder=folder))
        self.runtime.chmod(0o755)
        for name in ("train", "valid"):
            self.write_text(name, "as it is")

    def write_text(self, name: str, digest: str) -> None:
        (self.folder / f"text_{name}.manifest.json").write_text(digest)

    def run(self, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name not in OWN}
        settings = {
            "MC_RUNTIME": str(self.runtime),
            "MC_GPU_COUNT": "0",
            "OUT": str(self.out),
            "TRAIN_DATA": str(self.folder / "text_train"),
            "VALID_DATA": str(self.folder / "text_valid"),
        }
        return subprocess.run(
            [BASH, str(self.root / "scripts" / "ablation.sh"), *flags],
            env=kept | settings | variables,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def started(self) -> list[str]:
        """The arm, the seed and the GPUs of each launch since this was asked last, sorted."""
        path = self.folder / "started"
        lines = sorted(path.read_text().splitlines()) if path.exists() else []
        path.unlink(missing_ok=True)
        return [line.strip() for line in lines]


@pytest.fixture
def ablation(tmp_path: Path) -> Ablation:
    return Ablation(tmp_path)


def recipe_flags(*flags: str, **variables: str) -> dict[str, list[str]]:
    """The flags that the recipe hands to the training command, with their values."""
    kept = {name: value for name, value in os.environ.items() if name not in OWN}
    settings = {"DRY_RUN": "1", "MC_RUNTIME": sys.executable, "MC_GPU_COUNT": "0", "TRAIN_DATA": "text", "OUT": "out"}
    said = subprocess.run(
        [BASH, str(ROOT / "examples" / "grape_recipe.sh"), *flags],
        env=kept | settings | variables,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    words = shlex.split(said)
    found: dict[str, list[str]] = {}
    for word in words[words.index("megacontext_megatron.pretrain") + 1 :]:
        if word.startswith("--"):
            last = found.setdefault(word, [])
            last.clear()
        else:
            last.append(word)
    return found


def test_the_recipe_has_the_flags_whose_layouts_are_tested():
    found = recipe_flags()
    named = {f"--{name.replace('_', '-')}" for name in {**GRAPE, **MOE}}
    assert named <= found.keys()
    for name in (
        "no_rope_freq",
        "window_attn_skip_freq",
        "moe_router_score_function",
        "moe_router_topk_scaling_factor",
    ):
        assert found[f"--{name.replace('_', '-')}"] == [str({**GRAPE, **MOE}[name])]
    assert found["--window-size"] == ["127,0"]
    assert "--cpu" in found
    assert "--bf16" not in found


@pytest.mark.parametrize("history", [3232, 65536])
def test_the_gentlest_slope_takes_one_off_the_oldest_token(history: int):
    scale = float(recipe_flags(HISTORY=str(history))["--bias-slope-scale"][0])
    assert scale * 2**-8 * history == pytest.approx(1, rel=1e-4)


def test_with_gpus_the_recipe_is_larger_and_in_half_precision():
    found = recipe_flags("--seed", "9", MC_GPU_COUNT="2")
    assert "--bf16" in found
    assert "--cpu" not in found
    assert found["--transformer-impl"] == ["local"]
    assert found["--moe-layer-freq"] == ["([0]*1+[1]*11)"]
    assert found["--seed"] == ["9"]
    assert recipe_flags(MC_GPU_COUNT="2", MC_CPU="1")["--num-layers"] == ["4"]


def test_arms_differ_in_positions_alone():
    found = {arm: recipe_flags(ARM=arm) for arm in ARMS}
    encodings = {arm: flags.pop("--position-embedding-type") for arm, flags in found.items()}
    assert encodings == {"recipe": ["grapem"], "grapem": ["grapem"], "nope": ["grapem"], "rope": ["rope"]}
    own = {arm: set(flags) - set(found["rope"]) for arm, flags in found.items()}
    learned = {"--grapem-learnable-freq"}
    assert own["grapem"] == learned
    assert own["nope"] == learned | {"--no-rope-freq"}
    assert own["recipe"] == own["nope"] | {"--grape-a", "--grape-a-learnable", "--bias-slope-scale"}
    shared = set(found["rope"])
    assert all({name: flags[name] for name in shared} == found["rope"] for flags in found.values())


def test_each_arm_runs_once_and_the_table_has_them_in_order(ablation: Ablation):
    done = ablation.run()
    assert done.returncode == 0, done.stderr
    assert ablation.started() == sorted(f"{arm} 1234" for arm in ARMS)
    lines = done.stdout.splitlines()
    titles, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == ARMS
    assert titles[1:6] == ["seeds", "parameters", "FLOPs", "ms a step", "held-out loss"]
    assert titles[6:] == ["newest rows, recency context", "newest rows, random context"]
    assert {tuple(row[1:]) for row in rows} == {("1", "1,200", "1e+15", "30", "2.5000", "2.2500", "2.1250")}


def test_what_is_finished_is_kept_unless_its_settings_or_its_text_are_others(ablation: Ablation):
    ablation.run()
    ablation.started()
    again = ablation.run(ARMS="rope grapem")
    assert (again.returncode, ablation.started()) == (0, [])
    assert again.stderr.count(": kept") == 2
    assert [line.split()[1] for line in again.stdout.splitlines()[2:]] == ["rope", "grapem"]

    assert ablation.run("--lr", "1", ARMS="rope", SEEDS="1 2").returncode == 0
    assert ablation.started() == ["rope 1", "rope 2"]
    ablation.write_text("valid", "grown")
    assert ablation.run(ARMS="rope").returncode == 0
    assert ablation.started() == ["rope 1234"]
    # none has cost another its result
    assert len(list(ablation.out.glob("*/result.json"))) == len(ARMS) + 3


def test_an_interrupted_run_goes_on_in_its_folder(ablation: Ablation):
    (ablation.folder / "log").write_text(LOG)
    cut = ablation.run(ARMS="rope")
    assert cut.returncode == 1
    assert "its last validation is not in its log" in cut.stderr
    assert "No run has a result yet" in cut.stdout
    (ablation.folder / "log").write_text(END)
    assert ablation.run(ARMS="rope").returncode == 0
    assert len(ablation.started()) == 2
    [folder] = ablation.out.iterdir()
    assert (folder / "log").read_text() == LOG + END
    result = json.loads((folder / "result.json").read_text())
    assert (result["parameters"], result["step_ms"], result["iterations"]) == (1200, 30, 40)


def test_a_failure_leaves_the_others_alone_and_is_the_exit_code(ablation: Ablation):
    done = ablation.run(FAILING="nope")
    assert done.returncode == 1
    assert "nope, seed 1234: FAILED, see" in done.stderr
    assert len(ablation.started()) == len(ARMS)
    assert [line.split()[1] for line in done.stdout.splitlines()[2:]] == ["recipe", "grapem", "rope"]


def test_jobs_share_out_the_gpus(ablation: Ablation):
    done = ablation.run(MC_GPU_COUNT="4", JOBS="2")
    assert done.returncode == 0, done.stderr
    assert ablation.started() == ["grapem 1234 2,3", "nope 1234 0,1", "recipe 1234 0,1", "rope 1234 2,3"]
    assert (
        ablation.run("--lr", "1", MC_GPU_COUNT="2", JOBS="2", CUDA_VISIBLE_DEVICES="5,7", ARMS="rope").returncode == 0
    )
    assert ablation.started() == ["rope 1234 5"]
    refused = ablation.run(MC_GPU_COUNT="3", JOBS="2")
    assert refused.returncode == 1
    assert "does not share out 3 GPUs evenly" in refused.stderr


def test_an_arm_that_is_none_is_refused_before_anything_runs(ablation: Ablation):
    refused = ablation.run(ARMS="rope alibi")
    assert refused.returncode == 1
    assert "ARM=alibi is none of" in refused.stderr
    assert ablation.started() == []


def test_runs_can_be_jobs_of_slurm(ablation: Ablation):
    """What is queued is the recipe at its size for GPUs, on a machine that has none."""
    sbatch = ablation.folder / "sbatch"
    sbatch.write_text(
        f'#!/bin/sh\necho "$PWD" "$@" >>{ablation.folder}/queued\n'
        f'while [ "$1" != --output ]; do shift; done\ncat {ablation.folder}/log >>"$2"\n'
    )
    sbatch.chmod(0o755)
    done = ablation.run("--bf16", ARMS="recipe", SUBMIT=f"{sbatch} --wait --nodes 2")
    assert done.returncode == 0, done.stderr
    [folder] = ablation.out.iterdir()
    words = shlex.split((ablation.folder / "queued").read_text())
    assert words[:4] == [str(ablation.root), "--wait", "--nodes", "2"]
    assert words[4:8] == ["--job-name", "recipe-1234", "--output", str(folder / "log")]
    assert words[8:] == ["scripts/train.sbatch", str(ablation.root / "examples" / "grape_recipe.sh"), "--bf16"]
    settings = json.loads((folder / "result.json").read_text())["settings"]
    assert "--num-layers 12 " in settings
    assert "--cpu" not in settings


def test_several_seeds_become_a_mean_and_its_spread():
    def result(arm: str, seed: int, loss: float, flops: float = 1e9) -> ablation_table.Result:
        figures = {"settings": "", "iterations": 4, "parameters": 7, "step_ms": 10.0 * seed, "flops": flops}
        return ablation_table.Result(arm=arm, seed=seed, loss=loss, last={"recency": loss - 1}, **figures)

    results = [result("b", 1, 2.0), result("b", 2, 2.2), result("a", 1, 3.0), result("b", 3, 2.4, 2e9)]
    _, _, *rows = ablation_table.table_lines(results)
    assert rows == [
        "| b | 3 | 7 | 1e+09 / 2e+09 | 20 | 2.2000 ± 0.2000 | 1.2000 ± 0.2000 |",
        "| a | 1 | 7 | 1e+09 | 10 | 3.0000 | 2.0000 |",
    ]


def test_a_missing_checkpoint_or_a_misspelt_command_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "log").write_text(LOG + END)
    assert ablation_table.main(["record", str(tmp_path), "rope", "1", "-"]) == 1
    assert "latest_checkpointed_iteration.txt" in capsys.readouterr().err
    assert ablation_table.main(["finished", str(tmp_path), "-"]) == 1
    assert ablation_table.main(["tabel"]) == 2
