#!/usr/bin/env bash
# Run the tests, on the CPU unless told otherwise; sets up .venv first.
#
#   scripts/test.sh           the quick suite
#   scripts/test.sh --full    everything that needs no GPU
#   scripts/test.sh --gpu     everything that needs one or two; sets up Transformer Engine as well.
#                             What this machine cannot run is skipped by name; two GPUs run it all
#                             in less than ten minutes. MC_REPORT_DIR takes the figures as files
#
# Other arguments go to pytest: scripts/test.sh tests/unit -k plan
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

suite=(-m "not full and not gpu and not multigpu")
on_gpu=
arguments=()
for argument in "$@"; do
  case $argument in
    --full) suite=(--full -m "not gpu and not multigpu") ;;
    --gpu) suite=(--full -m "gpu or multigpu") on_gpu=yes ;;
    *) arguments+=("$argument") ;;
  esac
done

mc_setup dev
if [[ -z $on_gpu ]]; then
  # the tests run several processes on however few cores there are
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  mc_use_cpu
elif mc_has_gpu; then
  mc_use_gpu
  if ! mc_setup dev te; then
    mc_say "Without Transformer Engine the tests of its layers are skipped."
    mc_setup dev
  fi
else
  mc_say "--gpu needs a GPU that PyTorch can use, and there is none."
  exit 1
fi
cd "$MC_ROOT"
exec "$(mc_python)" -m pytest "${suite[@]}" "${arguments[@]}"
