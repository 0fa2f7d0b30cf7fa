#!/usr/bin/env bash
# Trains by torchrun with one process a GPU (or CPU core), on this node or on several.
# usage: launch/torchrun.sh [PROCESSES] CONFIG [section.field=value ...]
# On several nodes: the same on each. Variables, of the cluster alone:
#   GPUS_PER_NODE  in place of PROCESSES; without either, as many as this node has GPUs
#   NNODES         nodes (1). MIN:MAX: begin, and go on after a loss, with any number between
#   MASTER_ADDR    the first node's name or address, which all can reach; MASTER_PORT (29500)
#   NODE_RANK      this node's place, 0 on the first (SLURM_NODEID); unset: in the order of arrival
#   MAX_RESTARTS   how often (0) failed processes start again, then with places by arrival; give
#                  checkpoint.resume=true with it
#   JOIN_SECONDS   how long (50) nodes wait for each other
#   LOG_DIR        a folder for a log file of each process, node by node
#   RUN_ID         a name, equal on all nodes, that tells runs at one address apart
set -euo pipefail
# shellcheck source=launch/place.sh
source "$(dirname "${BASH_SOURCE[0]}")/place.sh"
processes=${GPUS_PER_NODE:-}
if [[ ${1:-} =~ ^[0-9]+$ ]]; then processes=$1; shift; fi
if [ $# -lt 1 ]; then usage_of "$0"; exit 2; fi
processes=${processes:-$(count_gpus)}
nodes=${NNODES:-1}
join_seconds=${JOIN_SECONDS:-50}
port=${MASTER_PORT:-29500}
node_rank=${NODE_RANK-${SLURM_NODEID-}}
restarts=${MAX_RESTARTS:-0}
check_place "$processes" "$nodes" "$node_rank"
check_variable MAX_RESTARTS "$restarts" '[0-9]+' 'how often failed processes start again'
options=(--nproc-per-node "$processes" --max-restarts "$restarts")
# What asks a run to save and stop reaches the processes through torchrun.
options+=(--signals-to-handle 'SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1')
if [ "$restarts" != 0 ] || [[ $nodes == *:* ]]; then
  # Processes that start again need a store of their own: in the one that torch otherwise keeps for all
  # attempts they find the addresses of those that are gone (torch 2.13).
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  starts_again=true
else
  starts_again=false
fi
if [ "$nodes" = 1 ]; then
  # In a container this host's own name may stand for nothing.
  options+=(--standalone --local-addr 127.0.0.1)
else
  needs MASTER_ADDR "with NNODES=$nodes it names the first node"
  export MASTER_ADDR MASTER_PORT=$port
  # What `train --check` asks of this place.
  export NODE_RANK=$node_rank JOIN_SECONDS=$join_seconds
  options+=(--nnodes "$nodes" --rdzv-id "${RUN_ID:-sas-megatron}")
  if [ -n "$node_rank" ] && [ "$starts_again" = false ]; then
    options+=(--node-rank "$node_rank" --master-addr "$MASTER_ADDR" --master-port "$port")
    options+=(--rdzv-conf "timeout=$join_seconds")
  else
    # Places by arrival, the only ones that can be given anew.
    conf="join_timeout=$join_seconds,read_timeout=$join_seconds"
    if [ -n "$node_rank" ]; then conf+=",is_host=$([ "$node_rank" = 0 ] && echo true || echo false)"; fi
    options+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$port" --rdzv-conf "$conf")
  fi
fi
if [ -n "${LOG_DIR:-}" ]; then
  # Each process's output goes to its file and to here as well, the lines as they are.
  options+=(--log-dir "$LOG_DIR/node${node_rank:-_$(hostname)}" --tee 3 --role '')
  # shellcheck disable=SC2016  # torchrun fills it in
  export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='${role_name}'
fi
# What the user can mend is said once, before any process is started.
WORLD_SIZE=$((processes * ${nodes#*:})) sas-megatron train --check "$@" >/dev/null
exec torchrun "${options[@]}" -m sas_megatron train "$@"
