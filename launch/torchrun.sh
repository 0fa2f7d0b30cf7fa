#!/usr/bin/env bash
# Trains with PROCESSES processes on this node, one a GPU (or CPU core).
# usage: launch/torchrun.sh PROCESSES CONFIG [section.field=value ...]
# On several nodes: the same on each, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set.
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,4s/^# //p' "$0" >&2; exit 2; fi
processes=$1; shift
nodes=${NNODES:-1}
# What the user can mend is said once, before any process is started.
WORLD_SIZE=$((processes * nodes)) sas-megatron train --check "$@"
# Threads of one rank; Megatron-core's overlap on GPUs needs one connection, set before Python starts.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
if [ "$nodes" = 1 ]; then
  place=(--standalone)
else
  place=(--nnodes "$nodes" --node-rank "${NODE_RANK:?}" --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:?}")
fi
# What asks a run to save and stop reaches the ranks; torchrun gives them 30 seconds for it.
signals=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
exec torchrun "${place[@]}" --signals-to-handle "$signals" --nproc-per-node "$processes" -m sas_megatron train "$@"
