"""The shell logic of Table 1, with a stub in place of training and evaluation: failure codes, tee, carrying on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
DRIVER = REPO / "craft_experiments" / "01_main_results" / "run_table1_experiments.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

STUB = """#!{python}
import os, sys
from pathlib import Path
args = sys.argv[1:]
if args[:1] == ["-m"] and args[1].startswith("craft_experiments"):
    os.execv("{python}", ["{python}", *args])
def flag(name): return args[args.index("--" + name) + 1]
def fails(stage, suite): return suite in os.environ.get("STUB_" + stage, "").split()
with open(os.environ["STUB_CALLS"], "a") as calls: calls.write(" ".join([Path(sys.argv[0]).name, *args]) + "\\n")
if "experiments.robot.libero.collect_demos" in args:
    sys.exit(5 if fails("COLLECT_FAILS", flag("task_suite_name")) else 0)
if "vla-scripts/finetune.py" in args:
    suite = flag("dataset_name").removesuffix("_no_noops")
    print("training", suite, "PYTHONPATH" in os.environ)
    print("a warning on standard error", file=sys.stderr)
    if fails("TRAIN_FAILS", suite): sys.exit(17)
    if not fails("NO_CHECKPOINT", suite):
        for step in (5000, 20000, 15000):
            (Path(flag("run_root_dir")) / f"{{flag('run_id_override')}}--{{step}}_chkpt").mkdir(parents=True)
else:
    suite = flag("task_suite_name")
    lines = [f"Task suite: {{suite}}"] + ["Success: True"] * 3 + ["Success: False"]
    final = ["Total episodes: 4", "Total successes: 3", "Overall success rate: 0.7500 (75.0%)"]
    if not fails("NO_FINAL_LINE", suite): lines += final
    print("\\n".join(lines))
    if not fails("CONSOLE_ONLY", suite):
        folder = Path(flag("local_log_dir")); folder.mkdir(parents=True)
        (folder / f"EVAL-{{suite}}-openvla-2026_01_01-00_00_00.txt").write_text("\\n".join(lines) + "\\n")
    if fails("EVAL_FAILS", suite): sys.exit(3)
"""


@pytest.fixture
def drive(tmp_path):
    for name in ("python-stub", "torchrun-stub"):
        stub = tmp_path / name
        stub.write_text(STUB.format(python=sys.executable))
        stub.chmod(0o755)
    (tmp_path / "runs").mkdir()

    def run(**settings):
        clean = {
            k: v for k, v in os.environ.items() if k not in ("SUITES", "METHODS", "PRESET", "TASK_IDS", "MAX_STEPS")
        }
        env = clean | {
            "PYTHON": str(tmp_path / "python-stub"),
            "TORCHRUN": str(tmp_path / "torchrun-stub"),
            "STUB_CALLS": str(tmp_path / "calls"),
            "RESULTS_DIR": str(tmp_path / "out"),
            "RUN_ROOT_DIR": str(tmp_path / "runs"),
            "RUN_TAG": "t",
        }
        done = subprocess.run(["bash", str(DRIVER)], env=env | settings, cwd=tmp_path, capture_output=True, text=True)
        calls = tmp_path / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else []

    run.out = tmp_path / "out"
    return run


def test_all_suites_recorded_and_formatted(drive):
    done, calls = drive()
    assert done.returncode == 0, done.stderr
    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    assert (drive.out / "table1_results.log").read_text() == "".join(f"{s}: 0.7500\n" for s in suites)
    table = (drive.out / "table1_formatted.md").read_text()
    assert "| libero_10 | 0.7500 (75.0%) |" in table and "| **Average** | **0.7500 (75.0%)** |" in table
    assert len(calls) == 8


def test_paper_settings_reach_the_programs(drive):
    _, calls = drive(SUITES="libero_goal")
    train, evaluate = calls
    assert train.startswith("torchrun-stub --standalone --nnodes 1 --nproc-per-node 1 vla-scripts/finetune.py ")
    for flags in (
        "--dataset_name libero_goal_no_noops",
        "--batch_size 8 --learning_rate 5e-4 --max_steps 20000 --save_freq 5000",
        "--use_lora True --lora_rank 32",
        "--use_proprio True --num_images_in_input 2",
        "--use_craft True --craft_retention_weight 1.0 --craft_retention_budget 0.1 --craft_dual_lr 0.01",
        "--craft_enable_projection True",
    ):
        assert flags in train
    assert "--num_trials_per_task 50" in evaluate and "--center_crop True" in evaluate
    assert "table1-craft-libero_goal-t--20000_chkpt " in evaluate  # newest by step number, though not written last
    assert "--task_ids" not in evaluate and "--render_mode" not in evaluate and "--vlm_path" not in train


def test_every_failure_is_recorded_and_the_run_goes_on(drive):
    done, calls = drive(
        SUITES="libero_spatial libero_object libero_goal libero_10 libero_90",
        STUB_TRAIN_FAILS="libero_spatial",
        STUB_NO_CHECKPOINT="libero_object",
        STUB_EVAL_FAILS="libero_goal",  # although its log holds a final line
        STUB_NO_FINAL_LINE="libero_10",
    )
    assert done.returncode == 1
    assert (drive.out / "table1_results.log").read_text() == (
        "libero_spatial: TRAINING_FAILED\nlibero_object: NO_CHECKPOINT\nlibero_goal: EVAL_FAILED\n"
        "libero_10: PARSE_FAILED\nlibero_90: 0.7500\n"
    )
    table = (drive.out / "table1_formatted.md").read_text()
    assert "| libero_object | NO_CHECKPOINT |" in table and "| **Average** | **0.7500 (75.0%)** |" in table
    assert "Average over 1 of 5 suites" in table
    assert len(calls) == 5 + 3


def test_output_goes_to_terminal_and_file(drive):
    done, _ = drive(SUITES="libero_goal", STUB_TRAIN_FAILS="libero_goal")
    log = (drive.out / "eval_logs" / "train_craft_libero_goal_t.log").read_text()
    for text in ("training libero_goal True", "a warning on standard error", "--dataset_name libero_goal_no_noops"):
        assert text in log and text in done.stdout


def test_plain_baseline_beside_craft(drive):
    done, calls = drive(SUITES="libero_goal libero_10", METHODS="plain craft", STUB_NO_FINAL_LINE="libero_10")
    assert done.returncode == 1
    expected = "libero_goal: 0.7500\nlibero_10: PARSE_FAILED\n"
    assert (drive.out / "table1_results.log").read_text() == expected
    assert (drive.out / "table1_results_plain.log").read_text() == expected
    assert (drive.out / "table1_formatted_plain.md").is_file()
    comparison = (drive.out / "table1_comparison.md").read_text()
    assert (
        "| Task Suite | plain | craft |" in comparison and "| libero_10 | PARSE_FAILED | PARSE_FAILED |" in comparison
    )
    plain = next(call for call in calls if "table1-plain-libero_goal" in call)
    assert "--use_craft False" in plain and "--craft_" not in plain


def test_console_capture_is_the_fallback(drive):
    done, _ = drive(SUITES="libero_goal", STUB_CONSOLE_ONLY="libero_goal")
    assert done.returncode == 0
    assert (drive.out / "table1_results.log").read_text() == "libero_goal: 0.7500\n"


def test_tiny_preset_is_plain_python_and_overridable(drive):
    done, calls = drive(PRESET="tiny", MAX_STEPS="3", TASK_IDS="1,2", COLLECT_DEMOS="False")
    assert done.returncode == 0, done.stderr
    assert calls[0].startswith(
        "python-stub vla-scripts/finetune.py --config_file_path pretrained_models/tiny-libero-object "
    )
    assert "--dataset_name libero_spatial_scripted_no_noops " in calls[0]
    assert "--unnorm_key libero_spatial_scripted_no_noops" in calls[1]
    assert "--max_steps 3 " in calls[0] and "--task_ids 1,2" in calls[1] and "--num_trials_per_task 2" in calls[1]


def test_tiny_preset_collects_missing_demonstrations(drive, tmp_path):
    (tmp_path / "data" / "libero_goal_scripted_no_noops").mkdir(parents=True)
    done, calls = drive(
        PRESET="tiny",
        SUITES="libero_object libero_goal libero_10",
        DATA_ROOT_DIR=str(tmp_path / "data"),
        STUB_COLLECT_FAILS="libero_10",
    )
    assert done.returncode == 1
    collected = [call for call in calls if "collect_demos" in call]
    assert len(collected) == 2  # libero_goal is there
    assert "--task_suite_name libero_object --episodes_per_task 3" in collected[0] and "--task_ids 9" in collected[0]
    assert (drive.out / "table1_results.log").read_text() == (
        "libero_object: 0.7500\nlibero_goal: 0.7500\nlibero_10: TRAINING_FAILED\n"
    )


def test_extra_arguments_and_evaluation_only(drive, tmp_path):
    (tmp_path / "runs" / "table1-craft-libero_goal-t--7_chkpt").mkdir()
    done, calls = drive(SUITES="libero_goal", SKIP_TRAINING="True", EXTRA_EVAL_ARGS="--seed 3 --device cpu")
    assert done.returncode == 0 and len(calls) == 1
    assert calls[0].endswith("--seed 3 --device cpu") and "--7_chkpt" in calls[0]


def test_an_earlier_result_list_is_kept_apart(drive):
    drive.out.mkdir()
    (drive.out / "table1_results.log").write_text("libero_90: 0.1000\n")
    drive(SUITES="libero_goal")
    assert (drive.out / "table1_results.log").read_text() == "libero_goal: 0.7500\n"
    assert (drive.out / "table1_results.log.previous").read_text() == "libero_90: 0.1000\n"


@pytest.mark.parametrize("setting", [{"PRESET": "huge"}, {"METHODS": "craft magic"}, {"NUM_GPUS": "two"}])
def test_bad_settings_stop_before_any_training(drive, setting):
    done, calls = drive(**setting)
    assert done.returncode == 2 and "found" in done.stderr and not calls
