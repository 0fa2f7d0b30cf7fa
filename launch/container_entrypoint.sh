#!/usr/bin/env bash
# Entry point of the containers: check the node with `sas-megatron doctor`, then run COMMAND.
# usage: container_entrypoint.sh COMMAND [arguments]
# SKIP_DOCTOR=1 skips the check.
set -euo pipefail
if [ "${SKIP_DOCTOR:-0}" = 0 ]; then
  # A single process checks this node; the processes of the run are not started yet.
  env -u RANK -u WORLD_SIZE sas-megatron doctor >&2
fi
exec "$@"
