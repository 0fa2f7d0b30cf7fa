#!/usr/bin/env bash
# Installs the system's packages that tests start: daemons of SLURM and ssh, networks, all on this machine alone, and
# a browser.
# Without them, or where they cannot be installed, those tests are skipped and name what they lack.
# usage: tests/install_system_packages.sh
set -euo pipefail
say() { printf 'system packages: %s\n' "$*" >&2; }
packages=(slurmctld slurmd slurm-client munge openssh-server openssh-client pdsh iproute2 chromium)
missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null || true)
  if [ "$status" != installed ]; then missing+=("$package"); fi
done
if [ ${#missing[@]} = 0 ]; then exit 0; fi
if ! command -v apt-get >/dev/null; then
  say "no apt-get here, so these are not installed: ${missing[*]}; tests that need them will be skipped"
elif [ "$(id -u)" != 0 ]; then
  say "not root, so these are not installed: ${missing[*]}; tests that need them will be skipped"
else
  say "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  # The tests start the daemons themselves: none is to be started as a service.
  if ! { apt-get update && apt-get install --yes --no-install-recommends "${missing[@]}"; } >/dev/null; then
    say "could not be installed; tests that need them will be skipped"
  fi
fi
