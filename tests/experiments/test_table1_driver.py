"""The table driver through its shell script, with stand-ins for training and evaluation: codes, tee, carrying on."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import stub_programs

from craft_experiments.records import read_record

REPO = Path(__file__).parents[2]
DRIVER = REPO / "craft_experiments" / "01_main_results" / "run_table1_experiments.sh"
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def drive(tmp_path):
    """drive(**variables) runs the script; returns the process and the programs it ran since the last call."""
    variables = stub_programs.install(tmp_path)
    seen = []

    def environment(**settings):
        one_row = {"METHODS": "craft", "CONTROLS": "False", "NUM_TRIALS": "4"}
        return stub_programs.clean_environment() | one_row | variables | settings

    def run(*arguments, **settings):
        command = ["bash", str(DRIVER), *arguments]
        done = subprocess.run(command, env=environment(**settings), cwd=tmp_path, capture_output=True, text=True)
        calls = tmp_path / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        new, seen[:] = lines[len(seen) :], lines
        return done, new

    run.out, run.environment = tmp_path / "out", environment
    run.work = tmp_path / "work"
    run.manifest = lambda preset="qwen25-0_5b": json.loads((run.work / preset / "records/manifest.json").read_text())
    return run


def stages(calls):
    """ "train libero_goal_no_noops", "evaluate libero_goal", ... of a list of command lines."""
    found = []
    for call in calls:
        words = call.split()
        name, flag = (
            ("train", "dataset_name") if "vla-scripts/finetune.py" in words else ("evaluate", "task_suite_name")
        )
        name = "collect" if "experiments.robot.libero.collect_demos" in words else name
        found.append(f"{name} {words[words.index('--' + flag) + 1]}")
    return found


def test_all_suites_recorded_and_formatted(drive):
    done, calls = drive()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert (drive.out / "table1_results.log").read_text() == "".join(f"{s}: 0.7500\n" for s in SUITES)
    table = (drive.out / "table1_formatted.md").read_text()
    assert table.startswith("# Table 1: Main results on LIBERO (CRaFT)\n")
    assert "| libero_10 | 0.7500 (75.0%) |" in table and "| **Average** | **0.7500 (75.0%)** |" in table
    each = [(f"train {s}_no_noops", f"evaluate {s}", f"evaluate {s}_swap") for s in SUITES]
    assert sorted(stages(calls)) == sorted(word for words in each for word in words)


def test_paper_settings_reach_the_programs(drive):
    _, calls = drive(SUITES="libero_goal", NUM_TRIALS="")
    train, evaluate, perturbed = calls
    assert train.startswith("torchrun-stub --standalone --nnodes 1 --nproc-per-node 1 vla-scripts/finetune.py ")
    for flags in (
        "--config_file_path pretrained_models/configs --data_root_dir data/libero",
        "--dataset_name libero_goal_no_noops",
        "--batch_size 8 --learning_rate 0.0005 --max_steps 20000 --save_freq 5000",
        "--use_lora True --lora_rank 32",
        "--use_proprio True --num_images_in_input 2",
        "--use_craft True",
        "--craft_retention_weight 1.0 --craft_retention_budget 0.1 --craft_dual_lr 0.01 --craft_enable_projection True",
    ):
        assert flags in train
    for flags in (
        "--num_trials_per_task 50",
        "--center_crop True",
        "--use_l1_regression True --use_proprio True --num_images_in_input 2",
        "--unnorm_key libero_goal_no_noops",
    ):
        assert flags in evaluate and flags in perturbed
    assert "craft--goal--seed0--20000_chkpt " in evaluate  # newest by step number
    assert "--task_ids" not in evaluate and "--render_mode" not in evaluate and "--vlm_path" not in train
    assert "--task_suite_name libero_goal_swap " in perturbed


def test_variables_replace_what_the_preset_says(drive):
    _, calls = drive(
        SUITES="libero_goal", CENTER_CROP="False", MAX_STEPS="3", SAVE_FREQ="1", LEARNING_RATE="1e-4", TASK_IDS="1,2",
        RETENTION_BUDGET="0.2", ENABLE_PROJECTION="False", NUM_GPUS="0", DATA_ROOT_DIR="elsewhere", RENDER_MODE="lazy",
        DATASET_SUFFIX="_mine", EXTRA_TRAIN_ARGS="--craft_log_freq 5", EXTRA_EVAL_ARGS="--device cpu",
    )  # fmt: skip
    train, evaluate, _ = calls
    assert train.startswith("python-stub vla-scripts/finetune.py ") and train.endswith(" --craft_log_freq 5")
    assert "--max_steps 3 --save_freq 1 " in train and "--learning_rate 0.0001 " in train
    assert "--dataset_name libero_goal_mine " in train and "--data_root_dir elsewhere " in train
    assert "--craft_retention_budget 0.2 " in train and "--craft_enable_projection False" in train
    assert "--center_crop False " in evaluate and "--task_ids 1,2" in evaluate and "--render_mode lazy" in evaluate
    assert evaluate.endswith(" --device cpu") and "--unnorm_key libero_goal_mine" in evaluate


FAILING = {
    "STUB_TRAIN_FAILS": "libero_spatial",
    "STUB_NO_CHECKPOINT": "libero_object",
    "STUB_EVAL_FAILS": "libero_goal",  # although its log holds a final line
    "STUB_NO_FINAL_LINE": "libero_10",
}


def test_every_failure_is_recorded_and_the_run_goes_on(drive):
    done, calls = drive(METHODS="plain craft", **FAILING)
    assert done.returncode == 1
    expected = "libero_spatial: TRAINING_FAILED\nlibero_object: NO_CHECKPOINT\nlibero_goal: EVAL_FAILED\n"
    assert (drive.out / "table1_results.log").read_text() == expected + "libero_10: PARSE_FAILED\n"
    assert (drive.out / "table1_results_plain.log").read_text() == expected + "libero_10: PARSE_FAILED\n"
    table = (drive.out / "table1_formatted.md").read_text()
    assert "| libero_object | NO_CHECKPOINT |" in table and "| **Average** | **n/a** |" in table
    assert len(calls) == 2 * (4 + 2 * 2)  # two evaluations of each policy there is
    codes = {name: state["code"] for name, state in drive.manifest().items() if name.startswith("craft--")}
    assert codes == {
        "craft--spatial--seed0": "TRAINING_FAILED",
        "craft--object--seed0": "NO_CHECKPOINT",
        "craft--goal--seed0": "EVAL_FAILED",
        "craft--10--seed0": "PARSE_FAILED",
    }


def test_a_rerun_runs_only_what_failed(drive):
    """First all four kinds of failure, then two of them, then none."""
    whole = lambda suite: [f"train {suite}_no_noops", f"evaluate {suite}", f"evaluate {suite}_swap"]  # noqa: E731
    drive(**FAILING)
    left = {name: FAILING[name] for name in ("STUB_NO_CHECKPOINT", "STUB_NO_FINAL_LINE")}
    second, calls = drive(**left)
    assert second.returncode == 1
    again = [*whole("libero_spatial"), "train libero_object_no_noops", "evaluate libero_goal", "evaluate libero_10"]
    assert sorted(stages(calls)) == sorted(again)
    table = (drive.out / "table1_formatted.md").read_text()
    assert "| **Average** | **0.7500 (75.0%)** |" in table and "Average over 2 of 4 suites" in table
    third, calls = drive()
    assert third.returncode == 0 and sorted(stages(calls)) == sorted(["evaluate libero_10", *whole("libero_object")])
    assert (drive.out / "table1_results.log").read_text() == "".join(f"{s}: 0.7500\n" for s in SUITES)
    assert {state["state"] for state in drive.manifest().values()} == {"evaluated"}
    fourth, calls = drive()
    assert fourth.returncode == 0 and calls == []


def test_a_training_that_was_asked_to_stop_is_continued(drive):
    # It saves and ends with exit code 0: without a look at the step it would be evaluated as if it were finished.
    done, calls = drive(SUITES="libero_goal", STUB_STOPS_EARLY="libero_goal")
    assert done.returncode == 1 and len(calls) == 1
    assert (drive.out / "table1_results.log").read_text() == "libero_goal: TRAINING_FAILED\n"
    assert "stopped before its last step" in done.stdout and "5000_chkpt" in done.stdout
    done, calls = drive(SUITES="libero_goal")
    assert done.returncode == 0 and "--20000_chkpt" in calls[1]
    metrics = (drive.work / "qwen25-0_5b/runs/craft--goal--seed0/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [5000, 10000, 15000, 20000]


@pytest.mark.parametrize("processor", ["", "another"])
def test_the_record_of_a_training_stays_with_its_evaluations(drive, processor):
    drive(SUITES="libero_goal")
    folder = drive.work / "qwen25-0_5b"
    training = folder / "records/craft--goal--seed0/training.json.gz"
    before = training.read_bytes()
    shutil.rmtree(folder / "runs")
    training.with_name("perturbed@libero_goal.json.gz").unlink()
    done, calls = drive(SUITES="libero_goal", STUB_PROCESSOR=processor)
    assert done.returncode == 0 and stages(calls) == ["train libero_goal_no_noops", "evaluate libero_goal_swap"]
    assert training.read_bytes() == before
    assert (f"trained again, and not as in {training}, which stays" in done.stdout) == bool(processor)
    names = ("training", "standard@libero_goal", "perturbed@libero_goal")
    first, same, again = (read_record(training.with_name(f"{name}.json.gz"))["policy"] for name in names)
    assert read_record(training)["data"] == {"libero_goal_no_noops": "all of them"}
    assert first == same and (again == first) == (not processor)
    page = next(drive.work.parent.rglob("table1.md")).read_text()
    told = "* **Of another policy** than the one whose training is recorded, which was made again and differs: "
    assert (f"{told}`evaluate/craft--goal--seed0/perturbed@libero_goal`." in page) == bool(processor)
    assert page.count(told) == bool(processor) and "* Evaluated with simulator 1." in page


def test_a_log_that_contradicts_the_episodes_is_no_result(drive):
    done, _ = drive(SUITES="libero_goal", STUB_OTHER_EPISODES="libero_goal")
    assert done.returncode == 1
    assert (drive.out / "table1_results.log").read_text() == "libero_goal: PARSE_FAILED\n"


def test_a_missing_program_is_a_failed_training(drive):
    done, _ = drive(SUITES="libero_goal libero_10", TORCHRUN="no-such-torchrun")
    assert done.returncode == 1 and "no-such-torchrun" in done.stdout
    expected = "libero_goal: TRAINING_FAILED\nlibero_10: TRAINING_FAILED\n"
    assert (drive.out / "table1_results.log").read_text() == expected


def test_output_goes_to_terminal_and_file(drive):
    done, _ = drive(SUITES="libero_goal")
    log = (drive.out / "eval_logs/qwen25-0_5b" / "train--craft--goal--seed0.log").read_text()
    for text in ("training libero_goal True", "a warning on standard error", "--dataset_name libero_goal_no_noops"):
        assert text in log and text in done.stdout
    console = (drive.out / "eval_logs/qwen25-0_5b/craft--goal--seed0/standard@libero_goal/console.log").read_text()
    assert "Overall success rate: 0.7500 (75.0%)" in console and "Overall success rate: 0.7500" in done.stdout


def test_output_is_on_the_terminal_while_a_program_runs(drive, tmp_path):
    gate = tmp_path / "gate"
    gate.write_text("0")  # the training makes its first step and waits
    environment = drive.environment(SUITES="libero_goal", STUB_GATE=str(gate))
    process = subprocess.Popen(["bash", str(DRIVER)], env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    with process:
        for line in process.stdout:
            if "step 5000" in line:
                break
        assert not list((drive.work / "qwen25-0_5b/records").glob("*/training.json.gz"))
        gate.unlink()
        process.stdout.read()
    assert process.returncode == 0


def test_ctrl_c_ends_the_run(drive, tmp_path):
    (tmp_path / "gate").write_text("0")  # the training waits after its first step
    environment = drive.environment(STUB_GATE=str(tmp_path / "gate"))
    process = subprocess.Popen(
        ["bash", str(DRIVER)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
        # A test run in a script's background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        for line in process.stdout:
            if "step 5000" in line:
                break
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 130 and "interrupted; the same command continues" in rest
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 1  # nothing else was started: the last one that held the pipe has ended
    done, calls = drive(SUITES="libero_spatial")
    assert done.returncode == 0 and len(calls) == 1 + 3  # the first is the interrupted one


def test_plain_baseline_beside_craft(drive):
    done, calls = drive(SUITES="libero_goal libero_10", METHODS="plain craft", STUB_NO_FINAL_LINE="libero_10")
    assert done.returncode == 1
    expected = "libero_goal: 0.7500\nlibero_10: PARSE_FAILED\n"
    assert (drive.out / "table1_results.log").read_text() == expected
    assert (drive.out / "table1_results_plain.log").read_text() == expected
    assert (drive.out / "table1_formatted_plain.md").is_file()
    comparison = (drive.out / "table1_comparison.md").read_text()
    assert "| Task Suite | plain | craft |" in comparison
    assert "| libero_10 | PARSE_FAILED | PARSE_FAILED |" in comparison
    plain = next(call for call in calls if "plain--goal" in call)
    assert "--use_craft False" in plain and "--craft_" not in plain


def test_console_capture_is_the_fallback(drive):
    done, _ = drive(SUITES="libero_goal", STUB_CONSOLE_ONLY="libero_goal")
    assert done.returncode == 0
    assert (drive.out / "table1_results.log").read_text() == "libero_goal: 0.7500\n"


def test_tiny_preset_collects_missing_demonstrations(drive, tmp_path):
    there = tmp_path / "data" / "libero_goal_displaced_no_noops" / "1.0.0"
    there.mkdir(parents=True)
    (there / "dataset_info.json").write_text("{}")
    done, calls = drive(
        PRESET="tiny-archive", SUITES="libero_object libero_goal libero_10", SEEDS="0", NUM_DEMOS="3",
        DATA_ROOT_DIR=str(tmp_path / "data"), STUB_COLLECT_FAILS="libero_10",
    )  # fmt: skip
    assert done.returncode == 1
    collected = [call for call in calls if "collect_demos" in call]
    assert len(collected) == 2  # libero_goal is there
    assert "--task_suite_name libero_object --task_ids 2,5 --episodes_per_task 3" in collected[0]
    assert all(call.startswith("python-stub ") for call in calls)
    assert (drive.out / "table1_results.log").read_text() == (
        "libero_object: 0.7500\nlibero_goal: 0.7500\nlibero_10: TRAINING_FAILED\n"
    )
    assert drive.manifest("tiny-archive")["craft--10--seed0"] == {"state": "failed", "code": "TRAINING_FAILED"}


def test_control_rows_run_beside_the_methods(drive, tmp_path):
    done, calls = drive(
        PRESET="tiny-archive", SUITES="libero_goal", SEEDS="0", CONTROLS="True", DATA_ROOT_DIR=str(tmp_path)
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert sum("--control replay" in call for call in calls) == 2 and sum("grey_images" in c for c in calls) == 2
    assert sum("--pretrained_checkpoint pretrained_models/" in call for call in calls) == 2  # the start itself


def test_seeds_are_averaged_in_the_list(drive, tmp_path):
    done, _ = drive(SUITES="libero_goal", SEEDS="0 1 2", STUB_HASHED="1", NUM_TRIALS="10")
    assert done.returncode == 0
    folders = (drive.out / "eval_logs" / "qwen25-0_5b").glob("craft--goal--seed*/standard@libero_goal/episodes.jsonl")
    rows = [json.loads(line) for path in folders for line in path.read_text().splitlines()]
    rate = sum(row["status"] == "success" for row in rows) / len(rows)
    assert len(rows) == 60 and (drive.out / "table1_results.log").read_text() == f"libero_goal: {rate:.4f}\n"


def test_other_settings_against_old_records_are_an_error(drive):
    drive(SUITES="libero_goal")
    for settings, words in (
        ({"LEARNING_RATE": "1e-4"}, ("--learning_rate 0.0005 (now 0.0001)", "training.json.gz")),
        ({"CENTER_CROP": "False"}, ("--center_crop True (now False)", "standard@libero_goal.json.gz")),
        ({"NUM_TRIALS": "5"}, ("--num_trials_per_task 4 (now 5)", "standard@libero_goal.json.gz")),
        ({"NUM_GPUS": "2"}, ("--nproc-per-node 1 (now 2)", "training.json.gz")),
    ):
        done, calls = drive(SUITES="libero_goal", **settings)
        assert done.returncode == 2 and not calls
        assert all(word in done.stderr for word in words), done.stderr
    same = {"CONFIG_FILE_PATH": str(REPO / "pretrained_models" / "configs")}  # the same folder, spelled otherwise
    done, calls = drive(SUITES="libero_goal", NUM_WORKERS="2", SAVE_VIDEOS="none", DATA_ROOT_DIR="elsewhere", **same)
    assert done.returncode == 0 and not calls  # no setting that changes a result


def test_two_presets_share_a_results_folder(drive, tmp_path):
    """Cells have the same names under both; an evaluation must not continue that of the other."""
    for preset in ("tiny-archive", "qwen25-0_5b", "tiny-archive"):
        done, calls = drive(PRESET=preset, SUITES="libero_10", SEEDS="0", DATA_ROOT_DIR=str(tmp_path / "data"))
        assert done.returncode == 0
    assert calls == [] and len(list(drive.out.rglob("episodes.jsonl"))) == 4


def test_dry_run_prints_and_writes_nothing(drive, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done, calls = drive("--dry-run", SUITES="libero_goal libero_10", METHODS="plain craft")
    assert done.returncode == 0 and calls == []
    lines = [line for line in done.stdout.splitlines() if not line.startswith("# ")]  # what it costs
    assert sum("vla-scripts/finetune.py" in line for line in lines) == 4
    assert sum("run_libero_eval.py" in line for line in lines) == 8 and len(lines) == 12
    assert sorted(tmp_path.rglob("*")) == before


def test_results_go_to_the_folder_relative_to_the_caller(drive, tmp_path):
    done, _ = drive(SUITES="libero_goal", RESULTS_DIR="mine")
    assert done.returncode == 0 and (tmp_path / "mine" / "table1_results.log").is_file()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"PRESET": "huge"}, ("--preset: found 'huge'", "tiny")),
        ({"METHODS": "craft magic"}, ("magic", "expected")),
        ({"SUITES": "libero_90"}, ("--suites", "libero_90", "expected")),
        ({"NUM_GPUS": "two"}, ("num_gpus", "two")),
        ({"NUM_GPUS": "-1"}, ("--num_gpus", "-1", "expected")),
        ({"SEEDS": "0,x"}, ("--seeds", "0,x", "expected")),
        ({"SLOTS": "0"}, ("--slots", "expected at least 1")),
    ],
)
def test_bad_settings_stop_before_any_training(drive, setting, words):
    done, calls = drive(**setting)
    assert done.returncode == 2 and all(word in done.stderr for word in words) and not calls
    assert "Traceback" not in done.stderr and not drive.out.exists() and not drive.work.exists()


def test_states_while_the_driver_runs(drive, tmp_path):
    """What the manifest said at the moment each program was started."""
    path = drive.work / "qwen25-0_5b/records/manifest.json"
    done, calls = drive(SUITES="libero_goal libero_10", STUB_TRAIN_FAILS="libero_10", STUB_MANIFEST=str(path))
    manifests = [json.loads(line) for line in (tmp_path / "calls.states").read_text().splitlines()]
    seen = [tuple(manifest[f"craft--{suite}--seed0"]["state"] for suite in ("goal", "10")) for manifest in manifests]
    assert done.returncode == 1 and len(seen) == len(calls)
    by_call = dict(zip(stages(calls), seen, strict=True))
    assert by_call["train libero_goal_no_noops"] == ("training", "pending")
    assert by_call["train libero_10_no_noops"][1] == "training"
    assert {by_call[f"evaluate {suite}"][0] for suite in ("libero_goal",)} == {"trained"}
    order = ["pending", "training", "trained", "evaluated"]
    assert sorted(seen, key=lambda state: order.index(state[0])) == seen
    assert drive.manifest()["craft--goal--seed0"]["state"] == "evaluated"
    assert drive.manifest()["craft--10--seed0"] == {"state": "failed", "code": "TRAINING_FAILED"}


def test_several_jobs_at_a_time_give_the_same_table(drive, tmp_path):
    one, _ = drive(METHODS="plain craft", SEEDS="0 1", STUB_HASHED="1")
    first = {path.name: path.read_text() for path in drive.out.glob("table1_[!m]*")}
    shutil.rmtree(drive.work)
    shutil.rmtree(drive.out)
    two, _ = drive(METHODS="plain craft", SEEDS="0 1", STUB_HASHED="1", SLOTS="4", STUB_SLEEP="0.01")
    assert one.returncode == two.returncode == 0 and not (tmp_path / "violations").exists()
    assert {path.name: path.read_text() for path in drive.out.glob("table1_[!m]*")} == first
