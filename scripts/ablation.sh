#!/usr/bin/env bash
# What the positions of examples/grape_recipe.sh are worth: the recipe against GRAPE-M on all layers
# (grapem), global layers without biases (nope) and plain rope; same windows, experts, text and order
# of samples. Ends with a table.
#
#   bash scripts/ablation.sh [FLAG...]     flags go to all runs; so do the variables of the recipe
#                                          (--bias-fold is for the recipe alone: ARMS=recipe)
#
#   ARMS    which of recipe grapem nope rope (default: all)
#   SEEDS   of weights and samples, each for all arms (default: 1234)
#   JOBS    runs at a time, which share out the cores or the GPUs (default: 2 without a GPU, else 1)
#   OUT     where results go (default: runs/ablation)
#   SUBMIT  the command that queues each run as a job of SLURM, JOBS at a time:
#           SUBMIT='sbatch --wait --nodes 2 --gpus-per-node 8 --exclusive' JOBS=4 bash scripts/ablation.sh
#
# A run whose result is there with the same settings is kept, one that was interrupted goes on from its
# checkpoint, and one with other settings has a folder of its own. A few minutes on two cores.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
mc_check_installed

# absolute PATH: the same from every folder.
absolute() {
  if [[ $1 == /* ]]; then printf '%s\n' "$1"; else printf '%s\n' "$PWD/$1"; fi
}

read -ra arms <<<"${ARMS:-recipe grapem nope rope}"
read -ra seeds <<<"${SEEDS:-1234}"
read -ra submit <<<"${SUBMIT:-}"
out=$(absolute "${OUT:-$MC_ROOT/runs/ablation}")
recipe=$MC_ROOT/examples/grape_recipe.sh
table=("$(mc_python)" -W ignore "$MC_ROOT/scripts/ablation_table.py")

devices=()
jobs=${JOBS:-1}
if ((${#submit[@]})); then
  export MC_CPU=0
elif [[ ${MC_CPU:-} == 1 ]] || { [[ ${MC_CPU:-} != 0 ]] && ! mc_has_gpu; }; then
  export MC_CPU=1
  jobs=${JOBS:-$(($(nproc) > 1 ? 2 : 1))}
  threads=$(($(nproc) / jobs))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads < 1 ? 1 : threads))}
elif ((jobs > 1)) && mc_has_gpu; then
  IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((MC_GPU_COUNT - 1)))}"
  if ((${#devices[@]} % jobs)); then
    mc_say "JOBS=$jobs does not share out ${#devices[@]} GPUs evenly."
    exit 1
  fi
fi

# command_of ARM SEED FLAG...: the command line of a run, but for its folder and its launcher.
command_of() {
  local line gpus=${MC_GPU_COUNT:-}
  # the machine that queues a job need not have the GPUs of the one that runs it
  if ((${#submit[@]})); then gpus=1; fi
  line=$(ARM=$1 SEED=$2 OUT=OUT DRY_RUN=1 MC_GPU_COUNT=$gpus bash "$recipe" "${@:3}") || return 1
  printf '%s\n' "${line##* megacontext_megatron.pretrain }"
}

# train ARM SEED FOLDER FLAG...: start a run or go on with it.
train() {
  export ARM=$1 SEED=$2 OUT=$3
  if ((${#submit[@]})); then
    cd "$MC_ROOT"
    exec "${submit[@]}" --job-name "$ARM-$SEED" --output "$OUT/log" scripts/train.sbatch "$recipe" "${@:4}"
  fi
  exec bash "$recipe" "${@:4}" >>"$OUT/log" 2>&1
}

# run NUMBER FLAG...: do one run, unless it is done. Sets child, and fails as the run does.
run() {
  local number=$1 arm=${run_arms[$1]} seed=${run_seeds[$1]} folder=${folders[$1]} setting=${settings[$1]}
  shift
  if "${table[@]}" finished "$folder" "$setting"; then
    mc_say "$arm, seed $seed: kept"
    return 0
  fi
  mkdir -p "$folder"
  train "$arm" "$seed" "$folder" "$@" &
  child=$!
  if wait "$child" && "${table[@]}" record "$folder" "$arm" "$seed" "$setting" >&2; then
    return 0
  fi
  mc_say "$arm, seed $seed: FAILED, see $folder/log"
  return 1
}

# work WORKER FLAG...: every JOBS-th run, one after another, on this worker's GPUs.
work() {
  local worker=$1 number share=$((${#devices[@]} / jobs)) failed=0 child=
  shift
  trap 'kill -TERM "$child" 2>/dev/null; wait; exit 143' TERM
  if ((share)); then
    CUDA_VISIBLE_DEVICES=$(IFS=, && printf '%s' "${devices[*]:worker * share:share}")
    export CUDA_VISIBLE_DEVICES MC_GPU_COUNT=$share
  fi
  for ((number = worker; number < ${#folders[@]}; number += jobs)); do
    run "$number" "$@" || failed=1
  done
  return "$failed"
}

if [[ -z ${TRAIN_DATA:-} ]]; then
  # the recipe makes this text where it is missing, once for all runs
  command_of recipe 0 >/dev/null
  TRAIN_DATA=$MC_ROOT/runs/stdlib/text_train VALID_DATA=$MC_ROOT/runs/stdlib/text_valid
fi
TRAIN_DATA=$(absolute "$TRAIN_DATA")
VALID_DATA=$(absolute "${VALID_DATA:-$TRAIN_DATA}")
export TRAIN_DATA VALID_DATA
# of the text itself, which may be another by the same name
text=$(cat "$TRAIN_DATA.manifest.json" "$VALID_DATA.manifest.json" 2>/dev/null | sha256sum | cut -c 1-16)

run_arms=()
run_seeds=()
settings=()
folders=()
for seed in "${seeds[@]}"; do
  for arm in "${arms[@]}"; do
    line="$(command_of "$arm" "$seed" "$@") text $text"
    run_arms+=("$arm")
    run_seeds+=("$seed")
    settings+=("$line")
    folders+=("$out/$arm-$seed-$(sha256sum <<<"$line" | cut -c 1-8)")
  done
done

workers=()
trap 'kill -TERM "${workers[@]}" 2>/dev/null; wait; exit 130' INT TERM
for ((worker = 0; worker < jobs; worker++)); do
  work "$worker" "$@" &
  workers+=($!)
done
failed=0
for worker in "${workers[@]}"; do
  wait "$worker" || failed=1
done
"${table[@]}" table "${folders[@]}"
exit "$failed"
