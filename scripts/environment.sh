#!/usr/bin/env bash
# The set-up that every script here shares. Source it for its functions, or run it:
#
#   bash scripts/environment.sh [EXTRA...]
#
# makes .venv and installs the project into it, with these of its extras: te, analysis, dev.
#
#   MC_PYTHON    the Python >= 3.12 that .venv is made from, instead of the one found
#   MC_RUNTIME   an interpreter that has all dependencies, of a container say: nothing is installed

MC_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
MC_VENV=$MC_ROOT/.venv

mc_say() {
  printf '%s\n' "$*" >&2
}

# mc_python: the interpreter to run things with.
mc_python() {
  printf '%s\n' "${MC_RUNTIME:-$MC_VENV/bin/python}"
}

# mc_python_version PYTHON: its version; fails unless it runs, is new enough and can make a .venv.
mc_python_version() {
  # Debian's python3 has ensurepip only with python3-venv; uv makes environments without it
  local needs=ensurepip
  if command -v uv >/dev/null; then needs=venv; fi
  "$1" -c "
import sys
if sys.version_info < (3, 12):
    sys.exit(1)
import $needs
print('%d.%d' % sys.version_info[:2])" 2>/dev/null </dev/null
}

# mc_python_candidates: paths that may be a Python, one a line.
mc_python_candidates() {
  local name root request
  for name in python3.12 python3.13 python3.14 python3 python; do
    type -aP "$name" || true
  done
  if command -v uv >/dev/null; then
    for request in 3.12 '>=3.12'; do
      # from /, or it would answer with this folder's .venv
      (cd / && uv python find "$request" 2>/dev/null) || true
    done
  fi
  # pyenv's shims fail for a version that is installed but not selected, so look behind them
  for root in "${PYENV_ROOT:-}" "$(pyenv root 2>/dev/null)" "${HOME:-}/.pyenv"; do
    [[ -z $root ]] || printf '%s\n' "$root"/versions/*/bin/python
  done
}

# mc_find_python: the Python to make .venv from. 3.12 and then 3.13 are preferred, wherever they
# are: Megatron-Core has binary wheels for these two and must be compiled for any other.
mc_find_python() {
  local candidate version first='' second='' third=''
  if [[ -n ${MC_PYTHON:-} ]]; then
    if mc_python_version "$MC_PYTHON" >/dev/null; then
      printf '%s\n' "$MC_PYTHON"
      return 0
    fi
    mc_say "MC_PYTHON=$MC_PYTHON is not a Python >= 3.12 that can make virtual environments:" \
      "correct or unset it."
    return 1
  fi
  while read -r candidate; do
    [[ -x $candidate && $candidate != "$MC_VENV"/* ]] || continue
    version=$(mc_python_version "$candidate") || continue
    case $version in
      3.12) first=$candidate && break ;;
      3.13) second=${second:-$candidate} ;;
      *) third=${third:-$candidate} ;;
    esac
  done < <(mc_python_candidates)
  if [[ -z $first$second$third ]]; then
    mc_say "No Python >= 3.12 that can make virtual environments was found on PATH, through uv" \
      "or under pyenv: install one (your system's python3.12 and python3.12-venv," \
      "\`uv python install 3.12\` or \`pyenv install 3.12\`) or set MC_PYTHON to its path."
    return 1
  fi
  printf '%s\n' "${first:-${second:-$third}}"
}

# mc_make_venv: .venv with an interpreter that runs and something to install with.
mc_make_venv() {
  local python
  local new_enough='import sys; print(sys.version_info >= (3, 12))'
  case $("$MC_VENV/bin/python" -c "$new_enough" 2>/dev/null) in
    True)
      if command -v uv >/dev/null || "$MC_VENV/bin/python" -c 'import pip' 2>/dev/null; then
        return 0
      fi
      ;;
    False)
      mc_say "$MC_VENV was made with a Python older than 3.12: remove it and run this again."
      return 1
      ;;
  esac
  python=$(mc_find_python) || return 1
  # what is there cannot run or was never finished
  rm -rf "$MC_VENV"
  if command -v uv >/dev/null; then
    uv venv --quiet --python "$python" "$MC_VENV" && return 0
  else
    "$python" -m venv "$MC_VENV" && return 0
  fi
  mc_say "Making $MC_VENV with $python failed."
  return 1
}

# mc_pip_install ARG...: installs into .venv. What it prints goes to a log; if it fails, the log's
# end is shown, without addresses, since an index may be private.
mc_pip_install() {
  local log=$MC_VENV/install.log python=$MC_VENV/bin/python
  local -a tool=("$python" -m pip install --quiet --no-input --disable-pip-version-check)
  if command -v uv >/dev/null; then
    tool=(uv pip install --quiet --python "$python")
  fi
  if (cd "$MC_ROOT" && "${tool[@]}" "$@") >"$log" 2>&1 </dev/null; then
    return 0
  fi
  tail -n 15 "$log" |
    sed -E "s#[a-z+]+://[^] ,)'\"]+#(address)#g; s#host='[^']*'#host=(address)#g" >&2
  mc_say "Installing into .venv failed; all of the log is in $log, and the next run tries again."
  return 1
}

# mc_install EXTRA...: the project and its extras in .venv, unless the stamp says they are there.
mc_install() {
  local stamp=$MC_VENV/installed started=$SECONDS key extra list
  local -a kept=() missing=()
  # of the folder too: an environment that was moved has wrong paths in it
  key=$("$MC_VENV/bin/python" -c '
import hashlib, pathlib, sys
text = pathlib.Path(sys.argv[1], "pyproject.toml").read_bytes()
print(hashlib.sha256(text + sys.argv[1].encode()).hexdigest())' "$MC_ROOT") || return 1
  for extra in base "$@"; do
    grep -qxF "$key $extra" "$stamp" 2>/dev/null || missing+=("$extra")
  done
  if ((${#missing[@]} == 0)); then
    return 0
  fi
  mapfile -t kept < <(grep "^$key " "$stamp" 2>/dev/null)
  # gone until all is installed, so that an interrupted run is done again
  rm -f "$stamp"
  list=$(IFS=, && printf '%s' "$*")
  mc_say "Installing the project${list:+ with $list} into .venv" \
    "(PyTorch is a few GB: minutes the first time) ..."
  if [[ ,$list, == *,te,* ]]; then
    # Transformer Engine is compiled against the torch it finds: torch and the build tools go first
    mc_pip_install -e . hatchling ninja pybind11 setuptools wheel || return 1
    mc_pip_install --no-build-isolation -e ".[$list]" || return 1
  else
    mc_pip_install -e ".${list:+[$list]}" || return 1
  fi
  printf '%s\n' "${kept[@]}" "${missing[@]/#/$key }" | grep . >"$stamp"
  mc_say "Installed in $((SECONDS - started)) s."
}

# mc_setup EXTRA...: what is needed to run the project; quick when it is there. One run at a time.
mc_setup() {
  if [[ -n ${MC_RUNTIME:-} ]]; then
    mc_check_installed
    return
  fi
  (
    if command -v flock >/dev/null && ! flock -n 9; then
      mc_say "Waiting for another set-up of .venv to finish ..."
      flock 9
    fi
    mc_make_venv && mc_install "$@"
  ) 9>"$MC_ROOT/.venv.lock"
}

# mc_check_installed: fails if there is nothing to run the project with. Installs nothing.
mc_check_installed() {
  if [[ -z ${MC_RUNTIME:-} ]]; then
    [[ -e $MC_VENV/installed ]] && return 0
    mc_say "There is no complete .venv yet: run \`bash scripts/environment.sh\` once."
    return 1
  fi
  export PYTHONPATH=$MC_ROOT${PYTHONPATH:+:$PYTHONPATH}
  "$MC_RUNTIME" -c '
import importlib.util, sys
sys.exit(importlib.util.find_spec("megatron.core") is None)' 2>/dev/null && return 0
  mc_say "MC_RUNTIME=$MC_RUNTIME does not run or lacks megatron-core: correct or unset it."
  return 1
}

# mc_has_gpu: whether PyTorch can use a GPU. Asks once and sets MC_GPU_COUNT.
mc_has_gpu() {
  if [[ -z ${MC_GPU_COUNT:-} ]]; then
    MC_GPU_COUNT=0
    # without a driver the answer is known before the seconds that importing torch takes
    if nvidia-smi -L >/dev/null 2>&1 || [[ -e /dev/nvidiactl ]]; then
      MC_GPU_COUNT=$("$(mc_python)" -c '
import torch
print(torch.cuda.device_count() if torch.cuda.is_available() else 0)' 2>/dev/null) || MC_GPU_COUNT=0
      if ((MC_GPU_COUNT == 0)) && [[ -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
        mc_say "There is a GPU, but PyTorch cannot use it (an old driver?): running on the CPU."
      fi
    fi
  fi
  ((MC_GPU_COUNT > 0))
}

# mc_use_gpu: the environment that Megatron needs on a GPU; what is set already stays.
mc_use_gpu() {
  # one hardware queue keeps communication in its place among the kernels; Megatron asserts it
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
}

# mc_use_cpu [PROCESSES [NODES]]: the environment without a GPU; what is set already stays.
mc_use_cpu() {
  local processes=${1:-1} nodes=${2:-1} threads
  mc_use_gpu
  # read when torch is imported; compiling Megatron's small fusions takes longer than they save
  export TORCHDYNAMO_DISABLE=${TORCHDYNAMO_DISABLE:-1}
  if ((nodes == 1)); then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
  fi
  # models that fit a CPU gain nothing from more than 8 threads
  threads=$(($(nproc) / processes))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads < 1 ? 1 : threads > 8 ? 8 : threads))}
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  mc_setup "$@"
fi
