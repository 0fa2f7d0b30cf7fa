#!/usr/bin/env bash
# Trains by DeepSpeed's launcher with one process a GPU (or CPU core), on this node or on several.
# usage: launch/deepspeed.sh [PROCESSES] CONFIG [section.field=value ...]
# Variables, of the cluster alone:
#   GPUS_PER_NODE  in place of PROCESSES; without either, as many as this node has GPUs
#   HOSTFILE       lines of `name slots=PROCESSES`: starts on all of them from here, over ssh (pdsh)
#   NNODES, NODE_RANK, MASTER_ADDR   without ssh: start the same on each node
#   MASTER_PORT    (29500) at which the first node listens
#   JOIN_SECONDS   how long (50) ranks wait for each other at the start
#   LOG_DIR        a folder for a log file of each process
# With HOSTFILE the package, the config and the data lie at the same places on all nodes.
set -euo pipefail
# shellcheck source=launch/place.sh
source "$(dirname "${BASH_SOURCE[0]}")/place.sh"
processes=${GPUS_PER_NODE:-}
if [[ ${1:-} =~ ^[0-9]+$ ]]; then processes=$1; shift; fi
if [ $# -lt 1 ]; then usage_of "$0"; exit 2; fi
processes=${processes:-$(count_gpus)}
check_place "$processes" "${NNODES:-1}" "${NODE_RANK:-}"
check_variable NNODES "${NNODES:-1}" '[0-9]+' 'a number: DeepSpeed begins with all nodes'
options=(--master_port "${MASTER_PORT:-29500}" --no_local_rank)
if [ -n "${LOG_DIR:-}" ]; then options+=(--enable_each_rank_log "$LOG_DIR"); fi
has_gpu || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}

# as_file DESCRIPTOR: standard input as a file that nobody has to delete, at /dev/fd/DESCRIPTOR.
as_file() {
  local file
  file=$(mktemp)
  cat >"$file"
  eval "exec $1<\"\$file\""
  rm "$file"
}

# What ssh would leave behind, and each process is to have.
over_ssh() {
  local argument
  for argument in "$@"; do
    if [[ $argument =~ [^][A-Za-z0-9_./:=,@%+-] ]]; then
      echo "$0: error: $argument: the far shell would not leave it as it is; write it into the config" >&2
      exit 2
    fi
  done
  as_file 8 < <(
    grep -hs = ~/.deepspeed_env .deepspeed_env || true
    env | grep -E '^(OMP_NUM_THREADS|CUDA_DEVICE_MAX_CONNECTIONS|DS_ACCELERATOR|JOIN_SECONDS)='
  )
  export DS_ENV_FILE=${DS_ENV_FILE:-/dev/fd/8}
}

if [ -n "${HOSTFILE:-}" ]; then
  over_ssh "$@"
  options+=(--hostfile "$HOSTFILE" --launcher pdsh)
  if [ -n "${MASTER_ADDR:-}" ]; then options+=(--master_addr "$MASTER_ADDR"); fi
  world_size=$(awk '!/^ *(#|$)/ { sub(/.*slots=/, ""); sum += $1 } END { print sum + 0 }' "$HOSTFILE")
elif [ "${NNODES:-1}" != 1 ]; then
  needs NODE_RANK "with NNODES=$NNODES it tells the place of this node, from 0"
  needs MASTER_ADDR "with NNODES=$NNODES it names the first node"
  options+=(--no_ssh --node_rank "$NODE_RANK")
  export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
  options+=(--master_addr "$MASTER_ADDR" --hostfile /dev/fd/9)
  as_file 9 < <(for ((node = 0; node < NNODES; node++)); do echo "node$node slots=$processes"; done)
  world_size=$((processes * NNODES))
else
  options+=(--num_gpus "$processes")
  world_size=$processes
  # Where DeepSpeed has the processes of one node meet.
  meeting=(MASTER_ADDR=127.0.0.1 "MASTER_PORT=${MASTER_PORT:-29500}" NODE_RANK=0)
fi
# What the user can mend is said once, before any process is started.
env WORLD_SIZE="$world_size" ${meeting[@]+"${meeting[@]}"} sas-megatron train --check "$@" >/dev/null
exec deepspeed "${options[@]}" --module sas_megatron train "$@"
