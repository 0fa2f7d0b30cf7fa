# Sourced by the scripts that need the package: makes a virtual environment with it, once, and enters it.
# SAS_MEGATRON_VENV names another folder than .venv; PYTHON another interpreter than the first fit one.
# shellcheck shell=bash

SAS_MEGATRON_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SAS_MEGATRON_TORCH='torch>=2.11,<2.15'
# Of the CPU wheels the one that the tests run with.
SAS_MEGATRON_CPU_TORCH='torch==2.13.0'
SAS_MEGATRON_CPU_INDEX='https://download.pytorch.org/whl/cpu'

say() { printf 'set-up: %s\n' "$*" >&2; }

is_fit() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11; do
    if is_fit "$candidate"; then command -v "$candidate"; return; fi
  done
  say 'needs Python 3.11 or 3.12; install one, or name it: PYTHON=/path/to/python'
  return 2
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

# In a GPU container torch is there already, built for its driver: keep it.
brings_torch() { "$1" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; }

install_torch() {
  local pip=("$1" -m pip install --quiet)
  if has_gpu; then
    say 'installing torch for this GPU'
    "${pip[@]}" "$SAS_MEGATRON_TORCH"
  # Without a GPU the CPU build will do: PyPI's is several gigabytes of CUDA. A wheel at hand first.
  elif "${pip[@]}" --no-index --no-deps "$SAS_MEGATRON_TORCH" 2>/dev/null; then
    say 'installed torch from a wheel at hand'
  elif "${pip[@]}" --retries 1 --timeout 20 --index-url "$SAS_MEGATRON_CPU_INDEX" "$SAS_MEGATRON_CPU_TORCH" \
    2>/dev/null; then
    say "installed the CPU build of torch from $SAS_MEGATRON_CPU_INDEX"
  else
    say 'found no CPU build of torch; installing the CUDA build from PyPI, about 3 GB'
    "${pip[@]}" "$SAS_MEGATRON_CPU_TORCH"
  fi
}

# enter_environment EXTRAS: the package with its extras (test, or nothing), in editable form.
enter_environment() {
  local extras=$1 venv=${SAS_MEGATRON_VENV:-$SAS_MEGATRON_ROOT/.venv} base stamp options=()
  base=$(find_python) || return 2
  stamp="$(sha256sum "$SAS_MEGATRON_ROOT/setup.py" | cut -c1-16) $("$base" --version)"
  # What is set up for the tests can do all the rest.
  if [ "$(cat "$venv/set_up_for${extras:+_$extras}" 2>/dev/null)" != "$stamp" ] &&
    [ "$(cat "$venv/set_up_for_test" 2>/dev/null)" != "$stamp" ]; then
    say "making $venv with $("$base" --version); this takes a few minutes, once"
    brings_torch "$base" && options=(--system-site-packages)
    # An environment of another Python, or one whose making was cut short, is made anew.
    if [ "$("$venv/bin/python" --version 2>/dev/null)" != "$("$base" --version)" ] ||
      ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
      "$base" -m venv --clear "${options[@]}" "$venv"
    fi
    "$venv/bin/python" -c 'import torch' 2>/dev/null || install_torch "$venv/bin/python"
    say 'installing the package and what it needs'
    # DeepSpeed ships source only; its compiled operators are built when first used, if at all.
    DS_BUILD_OPS=0 "$venv/bin/python" -m pip install --quiet --editable "$SAS_MEGATRON_ROOT${extras:+[$extras]}"
    printf '%s' "$stamp" >"$venv/set_up_for${extras:+_$extras}"
    say 'done'
  fi
  export PATH="$venv/bin:$PATH"
}
