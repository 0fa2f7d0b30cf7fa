#!/usr/bin/env bash
# Train as one pod of the Job that render_job.sh prints, which sets the variables of launch/torchrun.sh.
# usage: run_pod.sh CONFIG [section.field=value ...]
# Exits with status 0 only if the run has finished, since a Job never starts a pod that succeeded again; with 75 if the
# run has saved and stopped, and with 2 if the config is refused.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/cluster_variables.sh
source "$launch/cluster_variables.sh"
if [ $# -lt 1 ]; then print_usage "$0"; exit 2; fi
require_variable MASTER_ADDR 'it is the address of the first pod'

# This shell is process 1, for which signals are ignored unless they are trapped.
child=''
stopped=false
trap 'stopped=true; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT

# A restarted pod resumes. Without a checkpoint, this starts from step 0.
arguments=("$@" checkpoint.resume=auto)
run_directory=$(env -u MASTER_ADDR -u NODE_RANK WORLD_SIZE=$((${NNODES:-1} * ${GPUS_PER_NODE:-1})) \
  sas-megatron train --check "${arguments[@]}")

# has_finished: whether the run has finished; then the other pods are not there any more.
has_finished() {
  python3 -c '
import sys
from pathlib import Path
from sas_megatron.scaling.runs import has_finished
sys.exit(not has_finished(Path(sys.argv[1])))' "$run_directory"
}

# stopped.json of an earlier attempt is older than this file.
mkdir -p "$run_directory"
started=$run_directory/.started-${NODE_RANK:-0}
: >"$started"
trap 'rm -f "$started"' EXIT

if has_finished; then echo "the run in $run_directory has finished"; exit 0; fi
# The cluster publishes the name of the first pod some seconds after its start.
deadline=$((SECONDS + ${JOIN_SECONDS:-600}))
until getent hosts "$MASTER_ADDR" >/dev/null || [ "$SECONDS" -ge "$deadline" ] || [ "$stopped" = true ]; do sleep 1; done
if [ "$stopped" = true ]; then exit 75; fi
"$launch/container_entrypoint.sh" "$launch/torchrun.sh" "${arguments[@]}" &
child=$!
status=0
# A signal interrupts `wait`, but not the processes.
while kill -0 "$child" 2>/dev/null; do status=0; wait "$child" || status=$?; done
if has_finished; then exit 0; fi
# All pods stop together, also those that received no signal.
if [ "$stopped" = true ] || [ "$run_directory/stopped.json" -nt "$started" ]; then exit 75; fi
# Status 0 of torchrun without a finished run would be the end of this pod, but not of the others.
exit $((status == 0 ? 1 : status))
