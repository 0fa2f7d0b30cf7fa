# Functions and defaults for the cluster variables; sourced by the scripts that start processes.
# shellcheck shell=bash

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# count_gpus: print the default number of processes per node: one per GPU, or one without GPUs.
count_gpus() { if has_gpu; then nvidia-smi -L | grep -c '^GPU'; else echo 1; fi; }

# require_variable NAME REASON: exit with status 2 if a variable is not set.
require_variable() {
  if [ -z "${!1:-}" ]; then
    printf '%s: is not set; %s\n' "$1" "$2" >&2
    exit 2
  fi
}

# print_usage SCRIPT: print the comment at the top of a script.
print_usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1" >&2; }

# check_variable NAME VALUE PATTERN RULE: exit with status 2 if the value does not match the pattern.
check_variable() {
  [[ $2 =~ ^($3)$ ]] && return
  echo "$0: error: $1=$2: must be $4" >&2
  exit 2
}

# check_node_variables PROCESSES NNODES NODE_RANK: check the cluster variables. NODE_RANK may be empty: a single node
# and nodes that join by arrival have none.
check_node_variables() {
  check_variable GPUS_PER_NODE "$1" '[1-9][0-9]*' 'the number of processes per node; leave it unset for one per GPU'
  check_variable NNODES "$2" '[1-9][0-9]*(:[1-9][0-9]*)?' 'the number of nodes, or MIN:MAX'
  check_variable NODE_RANK "$3" '(0|[1-9][0-9]*)?' 'the rank of this node, counted from 0'
  if [ -n "$3" ] && [[ $2 != 1 && $2 != *:* ]] && [ "$3" -ge "$2" ]; then
    echo "$0: error: NODE_RANK=$3: must be below NNODES=$2; number the nodes from 0" >&2
    exit 2
  fi
}

# name_command COMMAND...: record the command that the user has started, which messages repeat.
name_command() {
  export SAS_MEGATRON_COMMAND
  [ -n "${SAS_MEGATRON_COMMAND:-}" ] || printf -v SAS_MEGATRON_COMMAND '%q ' "$@"
}

# resume_by_default ARGUMENTS: copy the arguments of `sas-megatron train` to `arguments`, with the default that a
# repeated command resumes its run.
resume_by_default() {
  arguments=("$@")
  [[ " $* " == *" checkpoint.resume="* ]] || arguments+=(checkpoint.resume=auto)
}

# The threads of a rank, which must be set before Python starts.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Write each line to a log file immediately.
export PYTHONUNBUFFERED=1

# ignores_sighup: whether this shell was started to ignore SIGHUP, as by nohup.
ignores_sighup() {
  local mask
  mask=$(awk '/^SigIgn:/ { print $2 }' "/proc/$$/status" 2>/dev/null) || return 1
  [ -n "$mask" ] && (( 0x$mask & 1 ))
}
