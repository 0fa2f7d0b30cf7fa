#!/usr/bin/env bash
# Install Debian packages that the selected tests use: SLURM and ssh daemons, network tools, a browser.
# Tests whose packages cannot be installed are skipped and name what is missing.
# usage: tests/install_system_packages.sh PACKAGE ...
set -euo pipefail
log() { printf 'system packages: %s\n' "$*" >&2; }
# Several test processes may call this at once.
exec 9>"${TMPDIR:-/tmp}/sas_megatron_system_packages.lock"
flock 9
missing=()
for package in "$@"; do
  status=$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null || true)
  if [ "$status" != installed ]; then missing+=("$package"); fi
done
if [ ${#missing[@]} = 0 ]; then exit 0; fi
if ! command -v apt-get >/dev/null; then
  log "no apt-get on this system, so these are not installed: ${missing[*]}; tests that need them are skipped"
elif [ "$(id -u)" != 0 ]; then
  log "not root, so these are not installed: ${missing[*]}; tests that need them are skipped"
else
  log "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  # The tests start the daemons themselves, not as services.
  if ! { apt-get update && apt-get install --yes --no-install-recommends "${missing[@]}"; } >/dev/null; then
    log "could not be installed; tests that need them are skipped"
  fi
fi
