# Create a virtual environment with the package, once, and activate it; sourced by the scripts that need the package.
# SAS_MEGATRON_VENV is its directory (.venv). PYTHON is the interpreter (the first suitable one in PATH).
# shellcheck shell=bash

SAS_MEGATRON_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SAS_MEGATRON_TORCH='torch>=2.11,<2.15'
# The CPU build with which the tests run.
SAS_MEGATRON_CPU_TORCH='torch==2.13.0'
SAS_MEGATRON_CPU_INDEX='https://download.pytorch.org/whl/cpu'

log() { printf 'setup: %s\n' "$*" >&2; }

is_supported_python() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11; do
    if is_supported_python "$candidate"; then command -v "$candidate"; return; fi
  done
  log 'Python 3.11 or 3.12 is required; install one, or set PYTHON=/path/to/python'
  return 2
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

# GPU containers contain a torch for their driver, which must be kept.
has_cuda_torch() { "$1" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; }

install_torch() {
  local pip=("$1" -m pip install --quiet)
  if has_gpu; then
    log 'installing torch for this GPU'
    "${pip[@]}" "$SAS_MEGATRON_TORCH"
  # Without a GPU install the CPU build; the one on PyPI contains gigabytes of CUDA. Try local wheels first.
  elif "${pip[@]}" --no-index --no-deps "$SAS_MEGATRON_TORCH" 2>/dev/null; then
    log 'installed torch from a local wheel'
  elif "${pip[@]}" --retries 1 --timeout 20 --index-url "$SAS_MEGATRON_CPU_INDEX" "$SAS_MEGATRON_CPU_TORCH" \
    2>/dev/null; then
    log "installed the CPU build of torch from $SAS_MEGATRON_CPU_INDEX"
  else
    log 'found no CPU build of torch; installing the CUDA build from PyPI, about 3 GB'
    "${pip[@]}" "$SAS_MEGATRON_CPU_TORCH"
  fi
}

# enter_environment EXTRAS: install the package in editable mode with its extras (`test`, or none).
enter_environment() {
  local extras=$1 venv=${SAS_MEGATRON_VENV:-$SAS_MEGATRON_ROOT/.venv} base stamp options=()
  base=$(find_python) || return 2
  stamp="$(sha256sum "$SAS_MEGATRON_ROOT/setup.py" | cut -c1-16) $("$base" --version)"
  # An environment for the tests contains everything else as well.
  if [ "$(cat "$venv/set_up_for${extras:+_$extras}" 2>/dev/null)" != "$stamp" ] &&
    [ "$(cat "$venv/set_up_for_test" 2>/dev/null)" != "$stamp" ]; then
    log "creating $venv with $("$base" --version); this takes a few minutes, once"
    has_cuda_torch "$base" && options=(--system-site-packages)
    # Replace an environment for another Python, and one whose creation was interrupted.
    if [ "$("$venv/bin/python" --version 2>/dev/null)" != "$("$base" --version)" ] ||
      ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
      "$base" -m venv --clear "${options[@]}" "$venv"
    fi
    "$venv/bin/python" -c 'import torch' 2>/dev/null || install_torch "$venv/bin/python"
    log 'installing the package and its requirements'
    # DeepSpeed is distributed as source only. Its operators are compiled at first use, if at all.
    DS_BUILD_OPS=0 "$venv/bin/python" -m pip install --quiet --editable "$SAS_MEGATRON_ROOT${extras:+[$extras]}"
    printf '%s' "$stamp" >"$venv/set_up_for${extras:+_$extras}"
    log 'done'
  fi
  export PATH="$venv/bin:$PATH"
}
