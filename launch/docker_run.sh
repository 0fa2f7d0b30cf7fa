#!/usr/bin/env bash
# Trains in a container of this node, with launch/torchrun.sh's command line and variables.
# usage: launch/docker_run.sh [PROCESSES] CONFIG [section.field=value ...]
# Paths are of the current folder, which the container sees; on several nodes start the same on each.
# More variables:
#   IMAGE             (sas-megatron:gpu where there are GPUs, sas-megatron:cpu elsewhere)
#   CONTAINER_ENGINE  (docker) podman takes the same options
set -euo pipefail
# shellcheck source=launch/place.sh
source "$(dirname "${BASH_SOURCE[0]}")/place.sh"
if [ $# -lt 1 ]; then usage_of "$0"; exit 2; fi
# NCCL moves data between processes through shared memory, and pins memory for the network.
options=(--rm --init --ipc host --network host --ulimit memlock=-1 --ulimit stack=67108864)
# Files come out as the user's.
options+=(--user "$(id -u):$(id -g)" --env HOME=/tmp --volume "$PWD:$PWD" --workdir "$PWD")
if has_gpu; then
  options+=(--gpus all)
  image=${IMAGE:-sas-megatron:gpu}
else
  image=${IMAGE:-sas-megatron:cpu}
fi
if [ -t 1 ]; then options+=(--tty); fi
for name in GPUS_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT MAX_RESTARTS JOIN_SECONDS LOG_DIR RUN_ID \
  SKIP_DOCTOR   OMP_NUM_THREADS CUDA_DEVICE_MAX_CONNECTIONS; do
  if [ -n "${!name:-}" ]; then options+=(--env "$name"); fi
done
# NCCL's own settings, such as the network interface.
while IFS= read -r name; do options+=(--env "$name"); done < <(compgen -e NCCL_ || true)
scripts=/opt/sas_megatron/launch
exec "${CONTAINER_ENGINE:-docker}" run "${options[@]}" --entrypoint "$scripts/container_entrypoint.sh" \
  "$image" "$scripts/torchrun.sh" "$@"
