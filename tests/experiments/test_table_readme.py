"""The settings table of the README says what the presets say.

`python tests/experiments/test_table_readme.py` prints the rows as they should be.
"""

import re
from dataclasses import fields
from pathlib import Path

from craft_experiments.presets import QWEN, SUITES, TINY, Preset
from craft_experiments.settings import RunConfig

EXPERIMENTS = Path(__file__).parents[2] / "craft_experiments"
README = EXPERIMENTS / "01_main_results" / "README.md"
MEANINGS = {
    "PRESET": "which column applies",
    "METHODS": "rows; empty: all of the table",
    "CONTROLS": "with the control rows",
    "SUITES": "",
    "SEEDS": "training seeds",
    "SHOTS": "demonstrations per task, Table 3",
    "TASK_IDS": "task numbers to evaluate, for every suite",
    "NUM_TRIALS": "episodes per task",
    "CONFIG_FILE_PATH": "start: checkpoint folder or preset name",
    "VLM_PATH": "`--vlm_path`, native Prismatic weights",
    "DATA_ROOT_DIR": "",
    "DATASET_SUFFIX": "data set = suite + suffix",
    "COLLECT_DEMOS": "collect scripted demonstrations when the data set is missing",
    "NUM_DEMOS": "demonstrations per task",
    "BATCH_SIZE": "per GPU",
    "LEARNING_RATE": "",
    "MAX_STEPS": "optimizer steps",
    "SAVE_FREQ": "",
    "USE_LORA": "LoRA needs a checkpoint folder as start, not a preset name",
    "LORA_RANK": "",
    "RETENTION_WEIGHT": "initial λ",
    "RETENTION_BUDGET": "ε",
    "DUAL_LR": "η_λ",
    "ENABLE_PROJECTION": "",
    "NUM_IMAGES": "",
    "CENTER_CROP": "",
    "RENDER_MODE": "`published` or `lazy`; not passed: the checkpoint's",
    "SAVE_VIDEOS": "`none`, `failures`, `first`, `all`",
    "NUM_WORKERS": "simulator processes of one evaluation",
    "NUM_GPUS": "1 or more: `torchrun`; 0: plain `python`",
    "EXTRA_TRAIN_ARGS": "further flags of `finetune.py`, separated by blanks",
    "EXTRA_EVAL_ARGS": "further flags of `run_libero_eval.py`",
    "PYTHON": "interpreter of the driver and the programs; empty: `python`",
    "TORCHRUN": "command",
    "RUN_ROOT_DIR": "checkpoints and records",
    "RECORDS_DIR": "empty: in `RUN_ROOT_DIR`",
    "RESULTS_DIR": "empty: the folder of the table",
    "SLOTS": "jobs at the same time",
    "DRY_RUN": "print each command and run none",
}


def value(preset: Preset, variable: str) -> object:
    """What holds when the variable is not set."""
    flag = {"RUN_ROOT_DIR": "work_dir"}.get(variable, variable.lower())
    special = {
        "PRESET": preset.name,
        "SUITES": "the four suites" if preset.suites == SUITES else " ".join(preset.suites),
        "TASK_IDS": "; ".join(preset.task_ids.values()).strip("; ") or "all",
        "CONFIG_FILE_PATH": preset.start,
        "COLLECT_DEMOS": preset.collect is not None,
        "NUM_DEMOS": preset.demos_per_task,
    }
    if variable in special:
        return special[variable]
    for found in (preset.train, preset.evaluate):
        if flag in found:
            return found[flag]
    if f"craft_{flag}" in preset.craft:
        return preset.craft[f"craft_{flag}"]
    return getattr(preset, flag, getattr(RunConfig(), flag))


def shown(found: object) -> str:
    if found is None or found == "":
        return "-"
    if isinstance(found, tuple):
        return " ".join(map(str, found))
    return f"{found:g}" if isinstance(found, float) else str(found)


def expected_rows() -> list[str]:
    return [
        f"| `{variable}` | {shown(value(QWEN, variable))} | {shown(value(TINY, variable))} | {meaning} |"
        for variable, meaning in MEANINGS.items()
    ]


def test_the_settings_table_is_what_the_presets_say():
    rows = [
        line
        for line in README.read_text(encoding="utf-8").splitlines()
        if re.match(r"\| `[A-Z_]+` \| .*\|.*\|.*\|", line)
    ]
    settings = [row for row in rows if row.count("|") == 5]
    assert settings == expected_rows()


def test_the_settings_table_has_every_variable():
    text = (EXPERIMENTS / "common_utils" / "run_table.sh").read_text()
    listed = [line.split() for line in text.split('TABLE_FLAGS="\n')[1].split('"\n')[0].splitlines()]
    assert [variable for variable, _ in listed] == list(MEANINGS)
    assert len(listed) == len(fields(RunConfig))


if __name__ == "__main__":
    print("\n".join(expected_rows()))
