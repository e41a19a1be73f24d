#!/usr/bin/env bash
# Run the tests, on the CPU unless told otherwise; sets up .venv first.
#
#   scripts/test.sh           the quick suite
#   scripts/test.sh --full    everything that needs no GPU
#   scripts/test.sh --gpu     everything that needs one or two; sets up Transformer Engine as well.
#                             What this machine cannot run is skipped by name. With two GPUs, the
#                             tests that need one run beside those that need both, and are printed
#                             last. MC_REPORT_DIR takes the figures as files
#
# Other arguments go to pytest: scripts/test.sh tests/unit -k plan. On the CPU files are shared out
# over as many workers as there are cores, up to four; -n 0 has none, for --pdb.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

suite=(-m "not full and not gpu and not multigpu")
on_gpu=
arguments=()
for argument in "$@"; do
  case $argument in
    --full) suite=(--full -m "not gpu and not multigpu") ;;
    --gpu) on_gpu=yes ;;
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
if [[ -z $on_gpu ]]; then
  # nproc would count threads; whole files to each worker, because their tests share what is made once
  cores=$(env -u OMP_NUM_THREADS nproc)
  workers=$((cores < 4 ? cores : 4))
  exec "$(mc_python)" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "${suite[@]}" "${arguments[@]}"
fi

# mc_gpu_tests MARKER: run them.
mc_gpu_tests() {
  MC_REPORT_DIR=${MC_REPORT_DIR:+$MC_REPORT_DIR/$1} "$(mc_python)" -m pytest --full -m "$1" "${arguments[@]}"
}
log=$(mktemp)
mc_gpu_tests gpu >"$log" 2>&1 &
one=$!
trap 'kill "$one" 2>/dev/null || true; cat "$log"; rm -f "$log"' EXIT
of_one=0
of_two=0
mc_gpu_tests multigpu || of_two=$?
wait "$one" || of_one=$?
# pytest's 5 is a selection without tests: no failure where the other has some
if ((of_one == 5)); then exit "$of_two"; fi
if ((of_two == 5)); then exit "$of_one"; fi
exit $((of_two ? of_two : of_one))
