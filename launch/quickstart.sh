#!/usr/bin/env bash
# Sets the package up in .venv, then trains MHA and SAS side by side on real text and compares them.
# usage: launch/quickstart.sh [options of `sas-megatron quickstart`]
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
enter_environment ''
exec sas-megatron quickstart "$@"
