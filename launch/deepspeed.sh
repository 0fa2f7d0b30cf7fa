#!/usr/bin/env bash
# Train with DeepSpeed's launcher and one process per GPU (or CPU core), on one or several nodes.
# usage: launch/deepspeed.sh [PROCESSES] CONFIG [section.field=value ...]
# Variables of the cluster, with their defaults in parentheses:
#   GPUS_PER_NODE  the default of PROCESSES (the number of GPUs of this node)
#   HOSTFILE       a file with lines `name slots=PROCESSES`: start on all these nodes from here, over ssh (pdsh)
#   NNODES, NODE_RANK, MASTER_ADDR   without ssh: run the same command on each node
#   MASTER_PORT    the port on which the first node listens (29500)
#   JOIN_SECONDS   how long ranks wait for each other at the start (50)
#   LOG_DIR        a directory for one log file per process
# HOSTFILE requires the package, the config and the data at the same paths on all nodes.
set -euo pipefail
# shellcheck source=launch/cluster_variables.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster_variables.sh"
name_command "$0" "$@"
processes=${GPUS_PER_NODE:-}
if [[ ${1:-} =~ ^[0-9]+$ ]]; then processes=$1; shift; fi
if [ $# -lt 1 ]; then print_usage "$0"; exit 2; fi
resume_by_default "$@"
processes=${processes:-$(count_gpus)}
check_node_variables "$processes" "${NNODES:-1}" "${NODE_RANK:-}"
check_variable NNODES "${NNODES:-1}" '[0-9]+' 'a number, because DeepSpeed starts on all nodes at once'
options=(--master_port "${MASTER_PORT:-29500}" --no_local_rank)
if [ -n "${LOG_DIR:-}" ]; then options+=(--enable_each_rank_log "$LOG_DIR"); fi
has_gpu || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}

# as_file DESCRIPTOR: make standard input readable at /dev/fd/DESCRIPTOR, as a file that is deleted already.
as_file() {
  local file
  file=$(mktemp)
  cat >"$file"
  eval "exec $1<\"\$file\""
  rm "$file"
}

# over_ssh ARGUMENTS: pass the environment variables that each process needs, which ssh does not forward.
over_ssh() {
  local argument
  for argument in "$@"; do
    if [[ $argument =~ [^][A-Za-z0-9_./:=,@%+-] ]]; then
      echo "$0: error: $argument: the remote shell would change it; write it into the config" >&2
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
  over_ssh "${arguments[@]}"
  options+=(--hostfile "$HOSTFILE" --launcher pdsh)
  if [ -n "${MASTER_ADDR:-}" ]; then options+=(--master_addr "$MASTER_ADDR"); fi
  world_size=$(awk '!/^ *(#|$)/ { sub(/.*slots=/, ""); sum += $1 } END { print sum + 0 }' "$HOSTFILE")
elif [ "${NNODES:-1}" != 1 ]; then
  require_variable NODE_RANK "with NNODES=$NNODES it is the rank of this node, counted from 0"
  require_variable MASTER_ADDR "with NNODES=$NNODES it is the address of the first node"
  options+=(--no_ssh --node_rank "$NODE_RANK")
  export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
  options+=(--master_addr "$MASTER_ADDR" --hostfile /dev/fd/9)
  as_file 9 < <(for ((node = 0; node < NNODES; node++)); do echo "node$node slots=$processes"; done)
  world_size=$((processes * NNODES))
else
  options+=(--num_gpus "$processes")
  world_size=$processes
  # The rendezvous address that DeepSpeed uses for a single node.
  rendezvous=(MASTER_ADDR=127.0.0.1 "MASTER_PORT=${MASTER_PORT:-29500}" NODE_RANK=0)
fi
# Report user errors once, before any process is started.
env WORLD_SIZE="$world_size" ${rendezvous[@]+"${rendezvous[@]}"} sas-megatron train --check "${arguments[@]}" >/dev/null
exec deepspeed "${options[@]}" --module sas_megatron train "${arguments[@]}"
