#!/usr/bin/env bash
# Set up the package in .venv, then train MHA and SAS on real text and compare them.
# usage: launch/quickstart.sh [options of `sas-megatron quickstart`]
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
enter_environment ''
exec sas-megatron quickstart "$@"
