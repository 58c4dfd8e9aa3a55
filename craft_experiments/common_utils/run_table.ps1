# Dot-sourced by the table scripts. Environment variables become flags of `python -m craft_experiments run TABLE`.
# Windows PowerShell 5.1 and PowerShell 7.

# Variable and flag. What is not set, or empty, passes nothing: the preset decides. run_table.sh has the same list.
$TableFlags = @"
PRESET preset
METHODS methods
CONTROLS controls
SUITES suites
SEEDS seeds
SHOTS shots
TASK_IDS task_ids
NUM_TRIALS num_trials
CONFIG_FILE_PATH config_file_path
VLM_PATH vlm_path
DATA_ROOT_DIR data_root_dir
DATASET_SUFFIX dataset_suffix
COLLECT_DEMOS collect_demos
NUM_DEMOS num_demos
BATCH_SIZE batch_size
LEARNING_RATE learning_rate
MAX_STEPS max_steps
SAVE_FREQ save_freq
USE_LORA use_lora
LORA_RANK lora_rank
RETENTION_WEIGHT retention_weight
RETENTION_BUDGET retention_budget
DUAL_LR dual_lr
ENABLE_PROJECTION enable_projection
NUM_IMAGES num_images
CENTER_CROP center_crop
RENDER_MODE render_mode
SAVE_VIDEOS save_videos
NUM_WORKERS num_workers
NUM_GPUS num_gpus
EXTRA_TRAIN_ARGS extra_train_args
EXTRA_EVAL_ARGS extra_eval_args
PYTHON python
TORCHRUN torchrun
RUN_ROOT_DIR work_dir
RECORDS_DIR records_dir
RESULTS_DIR results_dir
SLOTS slots
DRY_RUN dry_run
"@

function Get-Setting([string]$Name, [string]$Default) {
    $value = [Environment]::GetEnvironmentVariable($Name)
    if ([string]::IsNullOrEmpty($value)) { return $Default }
    return $value
}

function Get-TableFlags {
    $defaults = @{ PRESET = "qwen25-0_5b" }
    foreach ($line in ($TableFlags -split "\r?\n")) {
        $variable, $flag = $line.Trim() -split " "
        $value = Get-Setting $variable $defaults[$variable]
        if ([string]::IsNullOrEmpty($value)) { continue }
        # The driver changes to the repository.
        if ($variable -eq "RESULTS_DIR" -and -not [IO.Path]::IsPathRooted($value)) {
            $value = Join-Path (Get-Location).Path $value
        }
        "--$flag=$value"
    }
}

# The arguments come after the variables and win. $LASTEXITCODE is the driver's exit code.
function Invoke-Table([string]$Table, [string[]]$Arguments) {
    $root = (Resolve-Path (Join-Path $PSScriptRoot "../..")).Path
    $python = Get-Setting "PYTHON" "python"
    $flags = @(Get-TableFlags)
    $before = $env:PYTHONPATH
    Push-Location $root
    try {
        if ($null -eq (Get-Command $python -ErrorAction SilentlyContinue)) {
            [Console]::Error.WriteLine("PYTHON: found '$python', expected a Python interpreter")
            exit 2
        }
        # The programs run from the repository root whether or not the package is installed.
        $env:PYTHONPATH = if ($before) { $root + [IO.Path]::PathSeparator + $before } else { $root }
        & $python -m craft_experiments run $Table @flags @Arguments
    } finally {
        $env:PYTHONPATH = $before
        Pop-Location
    }
}
