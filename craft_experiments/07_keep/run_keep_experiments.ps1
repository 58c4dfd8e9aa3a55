# Keep: two new tasks one after the other, and what is kept of the old ones.
# Settings: environment variables, see ../01_main_results/README.md. Arguments are passed on.
#
#   powershell -File run_keep_experiments.ps1               paper scale, one GPU; run it again to continue
#   $env:PRESET = "tiny"; ./run_keep_experiments.ps1        the small model on a CPU
#   ./run_keep_experiments.ps1 --dry-run                    print each command and run none

Set-StrictMode -Version 2
# Continue: a program that writes to standard error (progress bars do) is no error of this script.
$ErrorActionPreference = "Continue"

. (Join-Path $PSScriptRoot "../common_utils/run_table.ps1")
Invoke-Table "keep" $args
exit $LASTEXITCODE
