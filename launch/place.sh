# Sourced by the scripts that start processes: what they all find out in the same way.
# shellcheck shell=bash

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# Processes where nobody says how many: one a GPU, or one alone.
count_gpus() { if has_gpu; then nvidia-smi -L | grep -c '^GPU'; else echo 1; fi; }

# usage_of SCRIPT: the comment at its top.
usage_of() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1" >&2; }

# What decides before Python starts: threads of a rank, and one queue to the GPU, which Megatron-core's
# overlap of sending and computing relies on for its order.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Into a log file as it is said, not when a buffer is full.
export PYTHONUNBUFFERED=1
