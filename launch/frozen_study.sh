#!/usr/bin/env bash
# Run a study from a copy of the package at one commit, at low priority, so that edits of this checkout cannot reach it.
# usage: launch/frozen_study.sh COMMIT STUDY [options of `sas-megatron study run`]
# STUDY is a path in the checkout, as it is at that commit. Data and runs are in the working directory. The first call
# creates a git worktree with an environment of its own. SIGTERM or SIGINT: the started runs save a checkpoint and stop;
# the same command resumes them. Variables, with their defaults in parentheses:
#   FROZEN_FOLDER  the folder of worktrees (../sas_megatron_frozen, next to this checkout)
#   FROZEN_VENV    an existing environment with the requirements, which is not changed (a new one in the worktree)
#   STUDY_NICE     the priority, from 0 to 19, the lowest (19)
#   STUDY_COMMAND  the command of `sas-megatron study` (run); for example export, import, status
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -lt 2 ]; then sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | grep -v '^set' >&2; exit 2; fi
name=$1 study=$2
shift 2
fail() { printf 'frozen_study: %s\n' "$*" >&2; exit 2; }
if [[ ! ${STUDY_NICE:-19} =~ ^(1?[0-9])$ ]]; then fail "STUDY_NICE=$STUDY_NICE: must be from 0 to 19; use 19"; fi
commit=$(git -C "$root" rev-parse --verify --quiet "$name^{commit}") ||
  fail "$name: is not a commit of $root; name one that git log shows"
worktree=${FROZEN_FOLDER:-$root/../sas_megatron_frozen}/${commit:0:12}
mkdir -p "$(dirname "$worktree")"
worktree=$(cd "$(dirname "$worktree")" && pwd)/${commit:0:12}
(
  # Two calls at the same time must not create it both.
  flock 9
  # A worktree whose folder was removed is still registered.
  git -C "$root" worktree prune
  if [ ! -e "$worktree/.git" ]; then git -C "$root" worktree add --quiet --detach "$worktree" "$commit"; fi
) 9>"$worktree.lock"
if [ "$(git -C "$worktree" rev-parse HEAD)" != "$commit" ] || [ -n "$(git -C "$worktree" status --porcelain -uno)" ]; then
  fail "$worktree: was changed; restore it with git -C $worktree checkout --force $commit, or remove it"
fi
if [ ! -f "$worktree/$study" ]; then fail "$study: does not exist at commit ${commit:0:12}"; fi
if [ -n "${FROZEN_VENV:-}" ]; then
  export PATH="$FROZEN_VENV/bin:$PATH"
else
  # An environment of the checkout must not be changed to the package of the worktree.
  export SAS_MEGATRON_VENV=$worktree/.venv
  # shellcheck source=launch/environment.sh
  source "$worktree/launch/environment.sh"
  enter_environment ''
fi
# The runs import the package of the worktree, also if the working directory contains another one.
export PYTHONPATH=$worktree PYTHONSAFEPATH=1
printf 'frozen_study: commit %s in %s, process %s\n' "${commit:0:12}" "$worktree" $$ >&2
# exec keeps the process id, to which signals are sent.
exec nice -n "${STUDY_NICE:-19}" python -m sas_megatron study "${STUDY_COMMAND:-run}" "$worktree/$study" "$@"
