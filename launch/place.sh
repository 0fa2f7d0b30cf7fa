# Sourced by the scripts that start processes: what they all find out in the same way.
# shellcheck shell=bash

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# Processes where nobody says how many: one a GPU, or one alone.
count_gpus() { if has_gpu; then nvidia-smi -L | grep -c '^GPU'; else echo 1; fi; }

# needs NAME WHY: ends the script where a variable is not set.
needs() {
  if [ -z "${!1:-}" ]; then
    printf '%s: is not set; %s\n' "$1" "$2" >&2
    exit 2
  fi
}

# usage_of SCRIPT: the comment at its top.
usage_of() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1" >&2; }

# check_variable NAME VALUE PATTERN RULE: ends where what a cluster variable holds is of another form.
check_variable() {
  [[ $2 =~ ^($3)$ ]] && return
  echo "$0: error: $1=$2: must be $4" >&2
  exit 2
}

# check_place PROCESSES NNODES NODE_RANK: one node alone has no place, nor have those that come and go.
check_place() {
  check_variable GPUS_PER_NODE "$1" '[1-9][0-9]*' 'how many processes a node is to have; leave it out for one a GPU'
  check_variable NNODES "$2" '[1-9][0-9]*(:[1-9][0-9]*)?' 'how many nodes there are, or MIN:MAX'
  check_variable NODE_RANK "$3" '(0|[1-9][0-9]*)?' "a node's place, from 0"
  if [ -n "$3" ] && [[ $2 != 1 && $2 != *:* ]] && [ "$3" -ge "$2" ]; then
    echo "$0: error: NODE_RANK=$3: must be below NNODES=$2; number the nodes from 0" >&2
    exit 2
  fi
}

# What decides before Python starts: threads of a rank, and one queue to the GPU, which Megatron-core's
# overlap of sending and computing relies on for its order.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Into a log file as it is said, not when a buffer is full.
export PYTHONUNBUFFERED=1
