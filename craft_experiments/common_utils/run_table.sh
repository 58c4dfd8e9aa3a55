# Sourced by the table scripts. Environment variables become flags of `python -m craft_experiments run TABLE`.
# shellcheck shell=bash

# Variable and flag. What is not set, or empty, passes nothing: the preset decides. run_table.ps1 has the same list.
TABLE_FLAGS="
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
"

# run_table TABLE ARGUMENT...: the arguments come after the variables and win. Ends the script with the driver's exit
# code; exec, so that Ctrl-C and signals reach the driver itself.
run_table() {
  local table="$1" root variable flag flags=()
  shift
  root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." >/dev/null && pwd)"
  local PRESET="${PRESET:-qwen25-0_5b}" RESULTS_DIR="${RESULTS_DIR:-}"
  case "$RESULTS_DIR" in
    "" | /*) ;;
    *) RESULTS_DIR="$PWD/$RESULTS_DIR" ;; # the driver changes to the repository
  esac
  while read -r variable flag; do
    if [ -n "$variable" ] && [ -n "${!variable:-}" ]; then
      flags+=("--$flag=${!variable}") # one word: a value may begin with a dash
    fi
  done <<<"$TABLE_FLAGS"
  cd "$root" || return 2
  if ! command -v -- "${PYTHON:-python}" >/dev/null; then
    echo "PYTHON: found '${PYTHON:-python}', expected a Python interpreter" >&2
    return 2
  fi
  # The programs run from the repository root whether or not the package is installed.
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  exec "${PYTHON:-python}" -m craft_experiments run "$table" "${flags[@]}" "$@"
}
