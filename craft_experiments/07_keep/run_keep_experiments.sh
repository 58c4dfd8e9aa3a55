#!/usr/bin/env bash
# Keep: two new tasks one after the other, and what is kept of the old ones.
# Settings: environment variables, see ../01_main_results/README.md. Arguments are passed on.
#
#   bash run_keep_experiments.sh                 paper scale, one GPU; run it again to continue
#   PRESET=tiny bash run_keep_experiments.sh     the small model on a CPU
#   bash run_keep_experiments.sh --dry-run       print each command and run none
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # `sh script` is another shell
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../common_utils/run_table.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../common_utils/run_table.sh" # the script may be a link
run_table keep "$@"
