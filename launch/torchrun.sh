#!/usr/bin/env bash
# Train with torchrun and one process per GPU (or CPU core), on one or several nodes.
# usage: launch/torchrun.sh [PROCESSES] CONFIG [section.field=value ...]
# A repeated command resumes its run (checkpoint.resume=auto), unless its arguments set checkpoint.resume.
# On several nodes, run the same command on each. Variables of the cluster, with their defaults in parentheses:
#   GPUS_PER_NODE  the default of PROCESSES (the number of GPUs of this node)
#   NNODES         the number of nodes (1). MIN:MAX: start, and continue after losing a node, with any number between
#   MASTER_ADDR    the name or address of the first node, reachable from all nodes
#   MASTER_PORT    the port on which the first node listens (29500)
#   NODE_RANK      the rank of this node, 0 on the first (SLURM_NODEID); if unset, nodes are ranked by arrival
#   MAX_RESTARTS   how often failed processes are restarted (0); nodes are then ranked by arrival
#   JOIN_SECONDS   how long nodes wait for each other (50)
#   LOG_DIR        a directory for one log file per process, in a subdirectory per node
#   CHECK_LAYOUT   1: instead of training, compare a small version of CONFIG at its layout with one process (0)
#   RUN_ID         a name for the run, equal on all nodes, to distinguish runs with the same address
set -euo pipefail
# shellcheck source=launch/cluster_variables.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster_variables.sh"
name_command "$0" "$@"
processes=${GPUS_PER_NODE:-}
if [[ ${1:-} =~ ^[0-9]+$ ]]; then processes=$1; shift; fi
if [ $# -lt 1 ]; then print_usage "$0"; exit 2; fi
resume_by_default "$@"
processes=${processes:-$(count_gpus)}
nodes=${NNODES:-1}
join_seconds=${JOIN_SECONDS:-50}
port=${MASTER_PORT:-29500}
node_rank=${NODE_RANK-${SLURM_NODEID-}}
restarts=${MAX_RESTARTS:-0}
check_node_variables "$processes" "$nodes" "$node_rank"
check_variable CHECK_LAYOUT "${CHECK_LAYOUT:-0}" '[01]' '0 or 1'
if [ "${CHECK_LAYOUT:-0}" = 1 ]; then command=(doctor --layout); else command=(train); fi
check_variable MAX_RESTARTS "$restarts" '[0-9]+' 'the number of restarts of failed processes'
options=(--nproc-per-node "$processes" --max-restarts "$restarts")
# torchrun passes the signals that ask a run to save and stop on to the processes.
signals='SIGTERM,SIGINT,SIGQUIT,SIGUSR1'
# torchrun would otherwise handle a SIGHUP that nohup has made this shell ignore.
if ! ignores_sighup; then signals+=',SIGHUP'; fi
options+=(--signals-to-handle "$signals")
if [ "$restarts" != 0 ] || [[ $nodes == *:* ]]; then
  # Restarted processes need a new store. torch otherwise keeps one store for all restarts, in which they find the
  # addresses of processes that have ended (torch 2.13).
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  restarts_processes=true
else
  restarts_processes=false
fi
if [ "$nodes" = 1 ]; then
  # In a container the name of this host may not be resolvable.
  options+=(--standalone --local-addr 127.0.0.1)
else
  require_variable MASTER_ADDR "with NNODES=$nodes it is the address of the first node"
  export MASTER_ADDR MASTER_PORT=$port
  # `sas-megatron train --check` reads these.
  export NODE_RANK=$node_rank JOIN_SECONDS=$join_seconds
  options+=(--nnodes "$nodes" --rdzv-id "${RUN_ID:-sas-megatron}")
  if [ -n "$node_rank" ] && [ "$restarts_processes" = false ]; then
    options+=(--node-rank "$node_rank" --master-addr "$MASTER_ADDR" --master-port "$port")
    options+=(--rdzv-conf "timeout=$join_seconds")
  else
    # The c10d backend ranks nodes by arrival. Only this backend can assign ranks again after a restart.
    conf="join_timeout=$join_seconds,read_timeout=$join_seconds"
    if [ -n "$node_rank" ]; then conf+=",is_host=$([ "$node_rank" = 0 ] && echo true || echo false)"; fi
    options+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$port" --rdzv-conf "$conf")
  fi
fi
if [ -n "${LOG_DIR:-}" ]; then
  # Write the output of each process to its file and to this terminal, without prefixes.
  options+=(--log-dir "$LOG_DIR/node${node_rank:-_$(hostname)}" --tee 3 --role '')
  # shellcheck disable=SC2016  # torchrun expands it
  export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='${role_name}'
else
  # Without a folder for logs, torchrun would leave an empty one among the temporary files.
  options+=(--log-dir /dev/null)
fi
# Report user errors once, before any process is started.
WORLD_SIZE=$((processes * ${nodes#*:})) sas-megatron train --check "${arguments[@]}" >/dev/null
exec torchrun "${options[@]}" -m sas_megatron "${command[@]}" "${arguments[@]}"
