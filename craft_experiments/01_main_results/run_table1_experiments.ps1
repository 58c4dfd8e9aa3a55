# Table 1 in PowerShell: the logic and the environment variables of run_table1_experiments.sh (see README.md).
#
#   powershell -File run_table1_experiments.ps1
#   $env:METHODS = "plain craft"; ./run_table1_experiments.ps1
#   $env:PRESET = "tiny"; ./run_table1_experiments.ps1

Set-StrictMode -Version 2
# Continue: a program that writes to standard error (progress bars do) is no error of this script.
$ErrorActionPreference = "Continue"

$RepoRoot = (Resolve-Path (Join-Path $PSScriptRoot "../..")).Path

# --- Settings ---------------------------------------------------------------------------------------------------------

function Setting([string]$Name, [string]$Default) {
    $value = [Environment]::GetEnvironmentVariable($Name)
    if ([string]::IsNullOrEmpty($value)) { return $Default }
    return $value
}

function Stop-Usage([string]$Message) {
    [Console]::Error.WriteLine($Message)
    exit 2
}

$Preset = Setting "PRESET" "paper"
switch ($Preset) {
    "paper" {
        $D = @{
            SUITES = "libero_spatial libero_object libero_goal libero_10"; TASK_IDS = ""; NUM_TRIALS = "50"; NUM_GPUS = "1"
            CONFIG_FILE_PATH = "pretrained_models/configs"; DATA_ROOT_DIR = "data/libero"
            DATASET_SUFFIX = "_no_noops"
            BATCH_SIZE = "8"; MAX_STEPS = "20000"; SAVE_FREQ = "5000"; LORA_RANK = "32"
            RENDER_MODE = ""; SAVE_VIDEOS = "failures"; MUJOCO_GL = "egl"; COLLECT_DEMOS = "False"; USE_LORA = "True"
        }
    }
    "tiny" {
        $D = @{
            SUITES = "libero_spatial"; TASK_IDS = "9"; NUM_TRIALS = "2"; NUM_GPUS = "0"
            CONFIG_FILE_PATH = "pretrained_models/tiny-libero-object"
            DATA_ROOT_DIR = "datasets/rlds"; DATASET_SUFFIX = "_scripted_no_noops"
            BATCH_SIZE = "16"; MAX_STEPS = "20"; SAVE_FREQ = "10"; LORA_RANK = "32"
            RENDER_MODE = "lazy"; SAVE_VIDEOS = "none"; MUJOCO_GL = "osmesa"; COLLECT_DEMOS = "True"
            USE_LORA = "True"
        }
    }
    default { Stop-Usage "PRESET: found '$Preset', expected paper or tiny" }
}
# MuJoCo on Windows has neither EGL nor OSMesa; its own OpenGL (WGL) is chosen when the variable is not set.
if ($env:OS -eq "Windows_NT") { $D["MUJOCO_GL"] = "" }
$S = @{}
foreach ($name in @($D.Keys)) { $S[$name] = Setting $name $D[$name] }

$Methods = (Setting "METHODS" "craft").Split(" ", [StringSplitOptions]::RemoveEmptyEntries)
$Suites = $S["SUITES"].Split(" ", [StringSplitOptions]::RemoveEmptyEntries)
$LearningRate = Setting "LEARNING_RATE" "5e-4"
$RetentionWeight = Setting "RETENTION_WEIGHT" "1.0"
$RetentionBudget = Setting "RETENTION_BUDGET" "0.1"
$DualLr = Setting "DUAL_LR" "0.01"
$EnableProjection = Setting "ENABLE_PROJECTION" "True"
$VlmPath = Setting "VLM_PATH" ""
$DatasetSuffix = $S["DATASET_SUFFIX"]
$RunRootDir = Setting "RUN_ROOT_DIR" "runs"
$NumImages = Setting "NUM_IMAGES" "2"
$CenterCrop = Setting "CENTER_CROP" "True"
$NumWorkers = Setting "NUM_WORKERS" "1"
$ResultsDir = Setting "RESULTS_DIR" $PSScriptRoot
$RunTag = Setting "RUN_TAG" (Get-Date -Format "yyyyMMdd_HHmmss")
$NumDemos = Setting "NUM_DEMOS" "3"
$SkipTraining = Setting "SKIP_TRAINING" "False"
$ExtraTrainArgs = (Setting "EXTRA_TRAIN_ARGS" "").Split(" ", [StringSplitOptions]::RemoveEmptyEntries)
$ExtraEvalArgs = (Setting "EXTRA_EVAL_ARGS" "").Split(" ", [StringSplitOptions]::RemoveEmptyEntries)
$Python = Setting "PYTHON" "python"
$Torchrun = Setting "TORCHRUN" "torchrun"

foreach ($method in $Methods) {
    if ($method -notin @("craft", "plain")) { Stop-Usage "METHODS: found '$method', expected craft and/or plain" }
}
$NumGpus = 0
if (-not [int]::TryParse($S["NUM_GPUS"], [ref]$NumGpus) -or $NumGpus -lt 0) {
    Stop-Usage "NUM_GPUS: found '$($S["NUM_GPUS"])', expected a whole number (0: plain python, no torchrun)"
}

if (-not [IO.Path]::IsPathRooted($ResultsDir)) { $ResultsDir = Join-Path (Get-Location).Path $ResultsDir }
$LogDir = Join-Path $ResultsDir "eval_logs"
New-Item -ItemType Directory -Force -Path $LogDir | Out-Null
Push-Location $RepoRoot

if ($env:PYTHONPATH) { $env:PYTHONPATH = $RepoRoot + [IO.Path]::PathSeparator + $env:PYTHONPATH } else { $env:PYTHONPATH = $RepoRoot }
$env:PYTHONUNBUFFERED = "1"
$env:PYTHONIOENCODING = "utf-8"
if ($S["MUJOCO_GL"]) { $env:MUJOCO_GL = $S["MUJOCO_GL"] }

# --- Steps ------------------------------------------------------------------------------------------------------------

function Get-ResultsFile([string]$Method) {
    if ($Method -eq "craft") { return (Join-Path $ResultsDir "table1_results.log") }
    return (Join-Path $ResultsDir "table1_results_$Method.log")
}

function Get-FormattedFile([string]$Method) {
    if ($Method -eq "craft") { return (Join-Path $ResultsDir "table1_formatted.md") }
    return (Join-Path $ResultsDir "table1_formatted_$Method.md")
}

function Add-Line([string]$File, [string]$Line) {
    # UTF-8 without byte order mark and "\n", whatever the PowerShell version writes by default.
    [IO.File]::AppendAllText($File, $Line + "`n", (New-Object Text.UTF8Encoding $false))
}

# Runs a program; output goes to the terminal and to a file at once. Returns the exit code.
function Invoke-Tee([string]$File, [string]$Program, [string[]]$Arguments) {
    Write-Host "+ $Program $($Arguments -join ' ')"
    [IO.File]::WriteAllText($File, "+ $Program $($Arguments -join ' ')`n", (New-Object Text.UTF8Encoding $false))
    if ($null -eq (Get-Command $Program -ErrorAction SilentlyContinue)) {
        Write-Host "$Program not found"
        Add-Line $File "$Program not found"
        return 127
    }
    & $Program @Arguments 2>&1 | ForEach-Object {
        $line = "$_"
        Write-Host $line
        Add-Line $File $line
    }
    return $LASTEXITCODE
}

function Invoke-LogParser([string[]]$Arguments) {
    & $Python -m craft_experiments.common_utils.log_parser @Arguments
}

# Scripted demonstrations, when COLLECT_DEMOS is True and the data set is not there. Returns the exit code.
function Invoke-Collection([string]$Suite) {
    $name = "$Suite$DatasetSuffix"
    if ($S["COLLECT_DEMOS"] -ne "True" -or (Test-Path (Join-Path $S["DATA_ROOT_DIR"] $name))) { return 0 }
    $flags = @(
        "-m", "experiments.robot.libero.collect_demos",
        "--task_suite_name", $Suite, "--episodes_per_task", $NumDemos, "--num_workers", $NumWorkers,
        "--task_ids", $(if ($S["TASK_IDS"]) { $S["TASK_IDS"] } else { "all" }),
        "--output_dir", $S["DATA_ROOT_DIR"], "--dataset_name", $name
    )
    return Invoke-Tee (Join-Path $LogDir "collect_${Suite}_$RunTag.log") $Python $flags
}

function Invoke-Training([string]$Method, [string]$Suite, [string]$RunId) {
    $flags = @(
        "vla-scripts/finetune.py",
        "--config_file_path", $S["CONFIG_FILE_PATH"], "--data_root_dir", $S["DATA_ROOT_DIR"],
        "--dataset_name", "$Suite$DatasetSuffix", "--run_root_dir", $RunRootDir, "--run_id_override", $RunId,
        "--use_proprio", "True", "--num_images_in_input", $NumImages,
        "--use_lora", $S["USE_LORA"], "--lora_rank", $S["LORA_RANK"],
        "--batch_size", $S["BATCH_SIZE"], "--learning_rate", $LearningRate,
        "--max_steps", $S["MAX_STEPS"], "--save_freq", $S["SAVE_FREQ"]
    )
    if ($VlmPath) { $flags += @("--vlm_path", $VlmPath) }
    if ($Method -eq "craft") {
        $flags += @(
            "--use_craft", "True", "--craft_retention_weight", $RetentionWeight,
            "--craft_retention_budget", $RetentionBudget, "--craft_dual_lr", $DualLr,
            "--craft_enable_projection", $EnableProjection
        )
    } else {
        $flags += @("--use_craft", "False")
    }
    $program = $Python
    if ($NumGpus -ge 1) {
        $program = $Torchrun
        $flags = @("--standalone", "--nnodes", "1", "--nproc-per-node", "$NumGpus") + $flags
    }
    return Invoke-Tee (Join-Path $LogDir "train_${Method}_${Suite}_$RunTag.log") $program ($flags + $ExtraTrainArgs)
}

function Invoke-Evaluation([string]$Method, [string]$Suite, [string]$Checkpoint) {
    $flags = @(
        "experiments/robot/libero/run_libero_eval.py",
        "--pretrained_checkpoint", $Checkpoint, "--task_suite_name", $Suite, "--num_trials_per_task", $S["NUM_TRIALS"],
        "--use_l1_regression", "True", "--use_proprio", "True", "--num_images_in_input", $NumImages,
        "--center_crop", $CenterCrop, "--num_workers", $NumWorkers, "--save_videos", $S["SAVE_VIDEOS"],
        "--local_log_dir", (Join-Path $LogDir "${Method}_${Suite}_$RunTag"), "--unnorm_key", "$Suite$DatasetSuffix"
    )
    if ($S["TASK_IDS"]) { $flags += @("--task_ids", $S["TASK_IDS"]) }
    if ($S["RENDER_MODE"]) { $flags += @("--render_mode", $S["RENDER_MODE"]) }
    return Invoke-Tee (Join-Path $LogDir "eval_${Method}_${Suite}_$RunTag.log") $Python ($flags + $ExtraEvalArgs)
}

# The evaluation's own text log (names end in a time stamp: the last is the newest), or else the captured console.
function Get-EvalLog([string]$Method, [string]$Suite) {
    $folder = Join-Path $LogDir "${Method}_${Suite}_$RunTag"
    $files = @(Get-ChildItem -Path $folder -Filter "EVAL-$Suite-*.txt" -File -ErrorAction SilentlyContinue | Sort-Object Name)
    if ($files.Count -gt 0) { return $files[-1].FullName }
    return (Join-Path $LogDir "eval_${Method}_${Suite}_$RunTag.log")
}

# Returns a rate or a failure code.
function Invoke-Suite([string]$Method, [string]$Suite) {
    $runId = "table1-$Method-$Suite-$RunTag"
    if ($SkipTraining -ne "True") {
        if ((Invoke-Collection $Suite) -ne 0) { return "TRAINING_FAILED" }
        if ((Invoke-Training $Method $Suite $runId) -ne 0) { return "TRAINING_FAILED" }
    }
    $checkpoint = Invoke-LogParser @("checkpoint", $RunRootDir, $runId)
    if ($LASTEXITCODE -ne 0) { return "NO_CHECKPOINT" }
    Write-Host "Newest checkpoint: $checkpoint"
    if ((Invoke-Evaluation $Method $Suite $checkpoint) -ne 0) { return "EVAL_FAILED" }
    $rate = Invoke-LogParser @("rate", (Get-EvalLog $Method $Suite))
    if ($LASTEXITCODE -ne 0) { return "PARSE_FAILED" }
    return $rate
}

# --- Run --------------------------------------------------------------------------------------------------------------

Write-Host "Table 1: preset $Preset, methods: $Methods, suites: $Suites, run tag $RunTag"
$failures = 0
$columns = @()
try {
    foreach ($method in $Methods) {
        $results = Get-ResultsFile $method
        if (Test-Path $results) { Move-Item -Force $results "$results.previous" }
        foreach ($suite in $Suites) {
            Write-Host "=== $method, ${suite}: started $(Get-Date -Format 'yyyy-MM-dd HH:mm:ss')"
            $outcome = Invoke-Suite $method $suite
            Write-Host "${suite}: $outcome"
            Add-Line $results "${suite}: $outcome"
            if ($outcome -match "_FAILED$|^NO_CHECKPOINT$") { $failures += 1 }
        }
        $title = if ($method -eq "craft") { "Table 1: Main results on LIBERO (CRaFT)" } else { "Table 1: Main results on LIBERO ($method)" }
        Invoke-LogParser @("table", $results, "--title", $title, "--output", (Get-FormattedFile $method))
        if ($LASTEXITCODE -eq 0) { Get-Content (Get-FormattedFile $method) }
        $columns += "$method=$results"
    }
    if ($columns.Count -gt 1) {
        $comparison = Join-Path $ResultsDir "table1_comparison.md"
        Invoke-LogParser (@("compare") + $columns + @("--output", $comparison))
        if ($LASTEXITCODE -eq 0) { Get-Content $comparison }
    }
} finally {
    Pop-Location
}
if ($failures -gt 0) {
    [Console]::Error.WriteLine("$failures of the runs failed; their logs are in $LogDir")
    exit 1
}
