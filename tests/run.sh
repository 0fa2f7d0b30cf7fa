#!/usr/bin/env bash
# Set up the package in .venv, then run the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'TEXT'
usage: tests/run.sh [--all [--part I/N]] [pytest arguments]

Without options: the default run, at most 15 minutes on two cores after installation.
  --all        run all tests, then the tests that depend on Megatron-core again with its newest release, on
               Python 3.12 (PYTHON312 is the interpreter; default: python3.12)
  --part I/N   run part I of the N disjoint parts of --all; .tests_passed records the parts that passed and
               their commit
  -h, --help   print this text
Pytest arguments have their usual meaning: tests/run.sh tests/attention -k gather -x
Tests run in two processes; -n 0 runs them in one, for example for --pdb.
TEXT
}

all=false part=1/1 arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --all) all=true ;;
    --part)
      if [ $# -lt 2 ]; then printf 'tests/run.sh: --part needs I/N, for example --part 1/4\n' >&2; exit 2; fi
      part=$2
      shift
      ;;
    --part=*) part=${1#--part=} ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
if [[ ! $part =~ ^[1-9][0-9]*/[1-9][0-9]*$ ]] || [ "${part%/*}" -gt "${part#*/}" ]; then
  printf 'tests/run.sh: --part %s: must be I/N with 1 <= I <= N, for example --part 1/4\n' "$part" >&2
  exit 2
fi
if [ "$part" != 1/1 ] && [ "$all" = false ]; then
  printf 'tests/run.sh: --part %s: is a part of --all; give both\n' "$part" >&2
  exit 2
fi

# shellcheck source=launch/environment.sh
source launch/environment.sh
export OMP_NUM_THREADS=1

# run_tests [pytest arguments]: two processes, each of which runs entire test files.
run_tests() {
  python tests/measured_run.py python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
    --install-system-packages "$@" ${arguments[@]+"${arguments[@]}"}
}

# record_pass: append the part and commit that passed; tests of selected files are no part.
record_pass() {
  local commit
  if [ ${#arguments[@]} != 0 ]; then return; fi
  commit=$(git rev-parse HEAD 2>/dev/null || echo 'no commit')
  if [ -n "$(git status --porcelain 2>/dev/null)" ]; then commit+=' with uncommitted changes'; fi
  printf '%s  part %s of --all  %s  %s\n' "$(date -u +%Y-%m-%dT%H:%MZ)" "$part" "$(python --version)" \
    "$commit" >>.tests_passed
}

enter_environment test
if [ "$all" = false ]; then
  run_tests
  exit
fi
run_tests --all --part "$part"
record_pass

# The newest Megatron-core needs Python 3.12: the same layers, layouts, data and training there.
newer=${PYTHON312:-python3.12}
if ! "$newer" -c 'import sys; assert sys.version_info[:2] == (3, 12)' 2>/dev/null; then
  say "the tests on megatron-core 0.19 need Python 3.12, and $newer is not it; name one: PYTHON312=/path/to/python3.12"
  exit 2
fi
export PYTHON=$newer SAS_MEGATRON_VENV=${SAS_MEGATRON_VENV_312:-$SAS_MEGATRON_ROOT/.venv312}
enter_environment test
python -c 'import megatron.core, torch; print("megatron-core", megatron.core.__version__, "torch", torch.__version__)' 2>/dev/null
if [ ${#arguments[@]} = 0 ]; then
  run_tests --all --part "$part" \
    tests/attention tests/distributed tests/fault_tolerance tests/platform tests/model tests/data \
    tests/training tests/evaluation
else
  run_tests --all --part "$part"
fi
record_pass
