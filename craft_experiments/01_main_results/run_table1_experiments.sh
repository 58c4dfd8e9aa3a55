#!/usr/bin/env bash
# Table 1: for every method and LIBERO suite: train, find the newest checkpoint, evaluate, record the success rate.
# A failing suite is recorded with a failure code and the run goes on. Settings: environment variables, see README.md.
#
#   bash run_table1_experiments.sh                          CRaFT on four suites, one GPU
#   METHODS="plain craft" bash run_table1_experiments.sh    with the plain fine-tuning baseline
#   PRESET=tiny bash run_table1_experiments.sh              the whole chain in minutes on a CPU
set -u
set -o pipefail

SCRIPT_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
REPO_ROOT="$(cd "$SCRIPT_DIR/../.." && pwd)"
INVOKED_FROM="$PWD"

# --- Settings ---------------------------------------------------------------------------------------------------------

PRESET="${PRESET:-paper}"
case "$PRESET" in
  paper)
    : "${SUITES:=libero_spatial libero_object libero_goal libero_10}"
    : "${TASK_IDS=}" "${NUM_TRIALS:=50}" "${NUM_GPUS:=1}"
    : "${CONFIG_FILE_PATH:=pretrained_models/configs}" "${DATA_ROOT_DIR:=data/libero}"
    : "${BATCH_SIZE:=8}" "${MAX_STEPS:=20000}" "${SAVE_FREQ:=5000}" "${LORA_RANK:=32}"
    : "${RENDER_MODE=}" "${SAVE_VIDEOS:=failures}" "${MUJOCO_GL:=egl}"
    : "${COLLECT_DEMOS:=False}" "${USE_LORA:=True}"
    ;;
  tiny)
    : "${SUITES:=libero_spatial}"
    : "${TASK_IDS=9}" "${NUM_TRIALS:=2}" "${NUM_GPUS:=0}"
    : "${CONFIG_FILE_PATH:=pretrained_models/tiny-libero-object}"
    : "${DATA_ROOT_DIR:=datasets/rlds}" "${DATASET_SUFFIX=_scripted_no_noops}"
    : "${BATCH_SIZE:=16}" "${MAX_STEPS:=20}" "${SAVE_FREQ:=10}" "${LORA_RANK:=32}"
    : "${RENDER_MODE=lazy}" "${SAVE_VIDEOS:=none}" "${MUJOCO_GL:=osmesa}"
    : "${COLLECT_DEMOS:=True}" "${USE_LORA:=True}"
    ;;
  *)
    echo "PRESET: found '$PRESET', expected paper or tiny" >&2
    exit 2
    ;;
esac

METHODS="${METHODS:-craft}"
LEARNING_RATE="${LEARNING_RATE:-5e-4}"
RETENTION_WEIGHT="${RETENTION_WEIGHT:-1.0}"
RETENTION_BUDGET="${RETENTION_BUDGET:-0.1}"
DUAL_LR="${DUAL_LR:-0.01}"
ENABLE_PROJECTION="${ENABLE_PROJECTION:-True}"
VLM_PATH="${VLM_PATH:-}"
DATASET_SUFFIX="${DATASET_SUFFIX-_no_noops}"
RUN_ROOT_DIR="${RUN_ROOT_DIR:-runs}"
NUM_IMAGES="${NUM_IMAGES:-2}"
CENTER_CROP="${CENTER_CROP:-True}"
NUM_WORKERS="${NUM_WORKERS:-1}"
RESULTS_DIR="${RESULTS_DIR:-$SCRIPT_DIR}"
RUN_TAG="${RUN_TAG:-$(date +%Y%m%d_%H%M%S)}"
NUM_DEMOS="${NUM_DEMOS:-3}"
SKIP_TRAINING="${SKIP_TRAINING:-False}"
EXTRA_TRAIN_ARGS="${EXTRA_TRAIN_ARGS:-}"
EXTRA_EVAL_ARGS="${EXTRA_EVAL_ARGS:-}"
PYTHON="${PYTHON:-python}"
TORCHRUN="${TORCHRUN:-torchrun}"

for method in $METHODS; do
  case "$method" in
    craft | plain) ;;
    *)
      echo "METHODS: found '$method', expected craft and/or plain" >&2
      exit 2
      ;;
  esac
done
case "$NUM_GPUS" in
  '' | *[!0-9]*)
    echo "NUM_GPUS: found '$NUM_GPUS', expected a whole number (0: plain python, no torchrun)" >&2
    exit 2
    ;;
esac

case "$RESULTS_DIR" in
  /*) ;;
  *) RESULTS_DIR="$INVOKED_FROM/$RESULTS_DIR" ;;
esac
LOG_DIR="$RESULTS_DIR/eval_logs"
mkdir -p "$LOG_DIR" || exit 2
cd "$REPO_ROOT" || exit 2

# The scripts run from the repository root whether or not the package is installed.
export PYTHONPATH="$REPO_ROOT${PYTHONPATH:+:$PYTHONPATH}"
# Unbuffered: otherwise a progress bar can land in the middle of a result line of the captured console.
export PYTHONUNBUFFERED=1 PYTHONIOENCODING=utf-8 MUJOCO_GL

# --- Steps ------------------------------------------------------------------------------------------------------------

log_parser() { "$PYTHON" -m craft_experiments.common_utils.log_parser "$@"; }

results_file() { # method -> list of results; CRaFT's carries the plain name
  if [ "$1" = craft ]; then echo "$RESULTS_DIR/table1_results.log"; else echo "$RESULTS_DIR/table1_results_$1.log"; fi
}

formatted_file() {
  if [ "$1" = craft ]; then echo "$RESULTS_DIR/table1_formatted.md"; else echo "$RESULTS_DIR/table1_formatted_$1.md"; fi
}

table_title() {
  if [ "$1" = craft ]; then echo "Table 1: Main results on LIBERO (CRaFT)"; else echo "Table 1: Main results on LIBERO ($1)"; fi
}

run_and_tee() { # FILE COMMAND...: terminal and file at once; the exit code is the command's
  local file="$1"
  shift
  echo "+ $*" | tee "$file"
  "$@" 2>&1 | tee -a "$file"
  return "${PIPESTATUS[0]}"
}

collect_demos() { # suite: scripted demonstrations, when COLLECT_DEMOS is True and the data set is not there
  if [ "$COLLECT_DEMOS" != True ] || [ -d "$DATA_ROOT_DIR/$1$DATASET_SUFFIX" ]; then
    return 0
  fi
  local flags=(--task_suite_name "$1" --episodes_per_task "$NUM_DEMOS" --num_workers "$NUM_WORKERS"
    --task_ids "${TASK_IDS:-all}" --output_dir "$DATA_ROOT_DIR" --dataset_name "$1$DATASET_SUFFIX")
  run_and_tee "$LOG_DIR/collect_$1_$RUN_TAG.log" "$PYTHON" -m experiments.robot.libero.collect_demos "${flags[@]}"
}

train() { # method suite run_id
  local launcher=("$PYTHON") flags
  if [ "$NUM_GPUS" -ge 1 ]; then
    launcher=("$TORCHRUN" --standalone --nnodes 1 --nproc-per-node "$NUM_GPUS")
  fi
  flags=(
    --config_file_path "$CONFIG_FILE_PATH" --data_root_dir "$DATA_ROOT_DIR" --dataset_name "$2$DATASET_SUFFIX"
    --run_root_dir "$RUN_ROOT_DIR" --run_id_override "$3"
    --use_proprio True --num_images_in_input "$NUM_IMAGES"
    --use_lora "$USE_LORA" --lora_rank "$LORA_RANK"
    --batch_size "$BATCH_SIZE" --learning_rate "$LEARNING_RATE" --max_steps "$MAX_STEPS" --save_freq "$SAVE_FREQ"
  )
  if [ -n "$VLM_PATH" ]; then
    flags+=(--vlm_path "$VLM_PATH")
  fi
  if [ "$1" = craft ]; then
    flags+=(
      --use_craft True --craft_retention_weight "$RETENTION_WEIGHT" --craft_retention_budget "$RETENTION_BUDGET"
      --craft_dual_lr "$DUAL_LR" --craft_enable_projection "$ENABLE_PROJECTION"
    )
  else
    flags+=(--use_craft False)
  fi
  # shellcheck disable=SC2086  # EXTRA_TRAIN_ARGS is a list of words
  run_and_tee "$LOG_DIR/train_$1_$2_$RUN_TAG.log" "${launcher[@]}" vla-scripts/finetune.py "${flags[@]}" $EXTRA_TRAIN_ARGS
}

evaluate() { # method suite checkpoint
  local flags=(
    --pretrained_checkpoint "$3" --task_suite_name "$2" --num_trials_per_task "$NUM_TRIALS"
    --use_l1_regression True --use_proprio True --num_images_in_input "$NUM_IMAGES" --center_crop "$CENTER_CROP"
    --num_workers "$NUM_WORKERS" --save_videos "$SAVE_VIDEOS" --local_log_dir "$(eval_dir "$1" "$2")"
    --unnorm_key "$2$DATASET_SUFFIX"
  )
  if [ -n "$TASK_IDS" ]; then
    flags+=(--task_ids "$TASK_IDS")
  fi
  if [ -n "$RENDER_MODE" ]; then
    flags+=(--render_mode "$RENDER_MODE")
  fi
  # shellcheck disable=SC2086
  run_and_tee "$(eval_console "$1" "$2")" "$PYTHON" experiments/robot/libero/run_libero_eval.py "${flags[@]}" $EXTRA_EVAL_ARGS
}

eval_dir() { echo "$LOG_DIR/$1_$2_$RUN_TAG"; }
eval_console() { echo "$LOG_DIR/eval_$1_$2_$RUN_TAG.log"; }

newest_eval_log() { # method suite -> the evaluation's own text log, or else the captured console
  local newest="" file
  for file in "$(eval_dir "$1" "$2")"/EVAL-"$2"-*.txt; do # the names end in a time stamp: the last one is the newest
    if [ -f "$file" ]; then newest="$file"; fi
  done
  if [ -n "$newest" ]; then echo "$newest"; else eval_console "$1" "$2"; fi
}

run_suite() { # method suite: sets OUTCOME to a rate or a failure code
  local run_id="table1-$1-$2-$RUN_TAG" checkpoint
  if [ "$SKIP_TRAINING" != True ] && ! { collect_demos "$2" && train "$1" "$2" "$run_id"; }; then
    OUTCOME=TRAINING_FAILED
    return
  fi
  if ! checkpoint="$(log_parser checkpoint "$RUN_ROOT_DIR" "$run_id")"; then
    OUTCOME=NO_CHECKPOINT
    return
  fi
  echo "Newest checkpoint: $checkpoint"
  if ! evaluate "$1" "$2" "$checkpoint"; then
    OUTCOME=EVAL_FAILED
    return
  fi
  if ! OUTCOME="$(log_parser rate "$(newest_eval_log "$1" "$2")")"; then
    OUTCOME=PARSE_FAILED
  fi
}

trap 'exit 130' INT  # Ctrl-C ends the whole table, not only the current suite

# --- Run --------------------------------------------------------------------------------------------------------------

echo "Table 1: preset $PRESET, methods: $METHODS, suites: $SUITES, run tag $RUN_TAG"
echo "  $MAX_STEPS steps, batch $BATCH_SIZE, lr $LEARNING_RATE, LoRA $USE_LORA rank $LORA_RANK, $NUM_GPUS GPUs;" \
  "eps $RETENTION_BUDGET, eta $DUAL_LR, projection $ENABLE_PROJECTION; $NUM_TRIALS trials per task${TASK_IDS:+, tasks $TASK_IDS}"
failures=0
columns=()
for method in $METHODS; do
  results="$(results_file "$method")"
  if [ -f "$results" ]; then # one earlier list is kept: a table must not mix two runs
    mv -f "$results" "$results.previous"
  fi
  for suite in $SUITES; do
    echo "=== $method, $suite: started $(date '+%Y-%m-%d %H:%M:%S')"
    run_suite "$method" "$suite"
    echo "$suite: $OUTCOME" | tee -a "$results"
    case "$OUTCOME" in
      *_FAILED | NO_CHECKPOINT) failures=$((failures + 1)) ;;
    esac
  done
  log_parser table "$results" --title "$(table_title "$method")" --output "$(formatted_file "$method")" \
    && cat "$(formatted_file "$method")"
  columns+=("$method=$results")
done
if [ "${#columns[@]}" -gt 1 ]; then
  log_parser compare "${columns[@]}" --output "$RESULTS_DIR/table1_comparison.md" && cat "$RESULTS_DIR/table1_comparison.md"
fi
if [ "$failures" -gt 0 ]; then
  echo "$failures of the runs failed; their logs are in $LOG_DIR" >&2
  exit 1
fi
