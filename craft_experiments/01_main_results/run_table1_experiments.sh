#!/usr/bin/env bash
# Table 1: plain fine-tuning and CRaFT on each LIBERO suite, with the control rows.
# Settings: environment variables, see README.md here. Arguments are passed on.
#
#   bash run_table1_experiments.sh                 paper scale, one GPU; run it again to continue
#   PRESET=tiny bash run_table1_experiments.sh     the small model on a CPU
#   bash run_table1_experiments.sh --dry-run       print each command and run none
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # `sh script` is another shell
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../common_utils/run_table.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../common_utils/run_table.sh" # the script may be a link
run_table table1 "$@"
