#!/usr/bin/env bash
# Sets the package up in .venv, then runs the tests.
# usage: tests/run.sh [--all] [pytest arguments]
#   --all: the whole table of layouts, tests that take minutes, and the same on Python 3.12 with the newest
#   Megatron-core
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
all=false
if [ "${1:-}" = --all ]; then all=true; shift; fi
enter_environment test
tests/install_system_packages.sh
export OMP_NUM_THREADS=1
if [ "$all" = false ]; then
  exec python -m pytest "$@"
fi
python -m pytest --whole-table "$@"
# The newest Megatron-core needs Python 3.12: the same layers, layouts, data and training there.
newer=${PYTHON312:-python3.12}
if ! "$newer" -c 'import sys; assert sys.version_info[:2] == (3, 12)' 2>/dev/null; then
  say "the tests on megatron-core 0.19 need Python 3.12, and $newer is not it; name one: PYTHON312=/path/to/python3.12"
  exit 2
fi
(
  export PYTHON=$newer SAS_MEGATRON_VENV=${SAS_MEGATRON_VENV_312:-$SAS_MEGATRON_ROOT/.venv312}
  enter_environment test
  python -c 'import megatron.core, torch; print("megatron-core", megatron.core.__version__, "torch", torch.__version__)' 2>/dev/null
  python -m pytest tests/attention tests/parallel tests/platform tests/model tests/data tests/training tests/evaluation --whole-table "$@"
)
