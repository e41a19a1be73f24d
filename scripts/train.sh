#!/usr/bin/env bash
# Train on one node or several: every flag, Megatron's or the plugin's, is handed on.
#
#   NPROC_PER_NODE=2 scripts/train.sh --tensor-model-parallel-size 2 ...
#
#   NPROC_PER_NODE            processes on this node (default: its GPUs, or 1 without one)
#   NNODES, NODE_RANK         nodes in all, and which one this is (default: 1, 0)
#   MASTER_ADDR, MASTER_PORT  where node 0 listens (default: this machine and a free port; 29500
#                             with several nodes, where MASTER_ADDR and NODE_RANK must be given)
#   MC_MODULE                 what to launch (default: megacontext_megatron.pretrain)
#   DRY_RUN=1                 print the command instead
#
# --cpu is added where there is no GPU. Runs in .venv, or with MC_RUNTIME; installs nothing.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

mc_check_installed

flags=("$@")
on_cpu=
for flag in "$@"; do
  if [[ $flag == --cpu ]]; then on_cpu=yes; fi
done
if [[ -z $on_cpu ]] && ! mc_has_gpu; then
  on_cpu=yes
  flags+=(--cpu)
fi

nodes=${NNODES:-1}
if [[ -n $on_cpu ]]; then
  processes=${NPROC_PER_NODE:-1}
  mc_use_cpu "$processes" "$nodes"
else
  processes=${NPROC_PER_NODE:-$MC_GPU_COUNT}
  mc_use_gpu
fi

launcher=(--nnodes "$nodes" --nproc-per-node "$processes")
if [[ $nodes == 1 && -z ${MASTER_ADDR:-}${MASTER_PORT:-} ]]; then
  launcher+=(--standalone --local-addr 127.0.0.1)
else
  if ((nodes > 1)) && [[ -z ${MASTER_ADDR:-} || -z ${NODE_RANK:-} ]]; then
    mc_say "NNODES=$nodes needs MASTER_ADDR and NODE_RANK as well."
    exit 1
  fi
  launcher+=(--node-rank "${NODE_RANK:-0}")
  launcher+=(--master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}")
fi
command=("$(mc_python)" -m torch.distributed.run "${launcher[@]}"
  -m "${MC_MODULE:-megacontext_megatron.pretrain}" "${flags[@]}")

if [[ ${DRY_RUN:-0} == 1 ]]; then
  for name in PYTHONPATH CUDA_DEVICE_MAX_CONNECTIONS TORCHDYNAMO_DISABLE GLOO_SOCKET_IFNAME \
    OMP_NUM_THREADS; do
    if [[ -n ${!name:-} ]]; then printf '%s=%q ' "$name" "${!name}"; fi
  done
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi
exec "${command[@]}"
