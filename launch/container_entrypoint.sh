#!/usr/bin/env bash
# What a container starts with: looks at the node it was put on, then does what it is told.
# usage: container_entrypoint.sh COMMAND [arguments]
# SKIP_DOCTOR=1 leaves the look out.
set -euo pipefail
if [ "${SKIP_DOCTOR:-0}" = 0 ]; then
  # One process looks at this node; those of the run meet later.
  env -u RANK -u WORLD_SIZE sas-megatron doctor >&2
fi
exec "$@"
