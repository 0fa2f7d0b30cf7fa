#!/usr/bin/env bash
# Train in a container on this node, with the command line and variables of launch/torchrun.sh.
# usage: launch/docker_run.sh [PROCESSES] CONFIG [section.field=value ...]
# The current directory is mounted at the same path. On several nodes, run the same command on each.
# Further variables, with their defaults in parentheses:
#   IMAGE             the image (sas-megatron:gpu on a node with GPUs, sas-megatron:cpu otherwise)
#   CONTAINER_ENGINE  the command (docker); podman accepts the same options
#   INFINIBAND        the folder of the node's InfiniBand devices, if it has any (/dev/infiniband)
set -euo pipefail
# shellcheck source=launch/cluster_variables.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster_variables.sh"
if [ $# -lt 1 ]; then print_usage "$0"; exit 2; fi
name_command "$0" "$@"
# NCCL exchanges data between processes through shared memory, and pins memory for the network.
options=(--rm --init --ipc host --network host --ulimit memlock=-1 --ulimit stack=67108864)
# Files are written with the user and group of the caller.
options+=(--user "$(id -u):$(id -g)" --env HOME=/tmp --volume "$PWD:$PWD" --workdir "$PWD")
if has_gpu; then
  options+=(--gpus all)
  image=${IMAGE:-sas-megatron:gpu}
else
  image=${IMAGE:-sas-megatron:cpu}
fi
# NCCL finds InfiniBand only with these files.
infiniband=${INFINIBAND:-/dev/infiniband}
if [ -d "$infiniband" ]; then options+=(--device "$infiniband:/dev/infiniband"); fi
if [ -t 1 ]; then options+=(--tty); fi
for name in GPUS_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT MAX_RESTARTS JOIN_SECONDS LOG_DIR RUN_ID \
  CHECK_LAYOUT SKIP_DOCTOR SAS_MEGATRON_COMMAND TORCH_ELASTIC_SHUTDOWN_TIMEOUT OMP_NUM_THREADS \
  CUDA_DEVICE_MAX_CONNECTIONS CUDA_VISIBLE_DEVICES; do
  if [ -n "${!name:-}" ]; then options+=(--env "$name"); fi
done
# Pass on the settings of the network, such as its interfaces: NCCL, torch's use of it, gloo, UCX and libfabric.
for prefix in NCCL_ TORCH_NCCL_ GLOO_ UCX_ FI_; do
  while IFS= read -r name; do options+=(--env "$name"); done < <(compgen -e "$prefix" || true)
done
scripts=/opt/sas_megatron/launch
exec "${CONTAINER_ENGINE:-docker}" run "${options[@]}" --entrypoint "$scripts/container_entrypoint.sh" \
  "$image" "$scripts/torchrun.sh" "$@"
