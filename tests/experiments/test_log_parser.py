import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from craft_experiments.common_utils import log_parser
from craft_experiments.common_utils.log_parser import (
    FailureCode,
    LogFormatError,
    average_rate,
    extract_checkpoint_path,
    extract_success_rate_from_log,
    format_results_table,
    parse_all_results,
    parse_eval_log,
)

DATA = Path(__file__).parent / "data"
GOLDEN_LOGS = Path(os.environ.get("CRAFT_GOLDEN_DIR", Path(__file__).parents[1] / "golden")) / "eval_logs"
TASKS = {
    "put both moka pots on the stove": [1, 1, 0],
    "pick up the book and place it in the back compartment of the caddy": [1, 0, 1],
    "turn on the stove and put the moka pot on it": [1, 1, 1],
}
EPISODES = [outcome for outcomes in TASKS.values() for outcome in outcomes]


def plain_messages(tasks=TASKS):
    """The log's messages in the order an evaluation emits them; videos are printed, not logged."""
    yield "Task suite: libero_10"
    yield "Using default initial states"
    done = []
    for task, outcomes in tasks.items():
        for number, success in enumerate(outcomes):
            yield f"\nTask: {task}"
            yield f"Starting episode {number + 1}..."
            done.append(success)
            name = task.replace(" ", "_")[:50]
            video = f"d--episode={len(done)}--success={bool(success)}--task={name}.mp4"
            yield f"Saved rollout MP4 at path ./rollouts/x/{video}"
            yield f"Success: {bool(success)}"
            yield f"# episodes completed so far: {len(done)}"
            yield f"# successes: {sum(done)} ({sum(done) / len(done) * 100:.1f}%)"
        yield f"Current task success rate: {sum(outcomes) / len(outcomes)}"
        yield f"Current total success rate: {sum(done) / len(done)}"
    yield "Final results:"
    yield f"Total episodes: {len(done)}"
    yield f"Total successes: {sum(done)}"
    yield f"Overall success rate: {sum(done) / len(done):.4f} ({sum(done) / len(done) * 100:.1f}%)"


def rich_rows(message, width=80, source="run_libero_eval.py:226"):
    """One message as a Rich console of this width prints it: time, level and source columns, text wrapped between."""
    column = width - 26 - len(source) - 1
    rows, row = [], ">>"
    for word in message.split():
        if len(row) + 1 + len(word) > column:
            rows, row = [*rows, row], word
        else:
            row += " " + word
    rows.append(row)
    head = f"{'':17}INFO     | {rows[0]:<{column}} {source}"
    return [head] + [f"{'':26}{r:<{width - 26}}" for r in rows[1:]]


def console_capture(messages, width=80):
    lines = []
    for message in messages:
        if message.startswith("Saved rollout"):
            lines.append(message)  # a bare print: not wrapped
            continue
        if message.startswith("Current"):
            lines.append("\r100%|█████| 50/50 [06:03<00:00,  7.38s/it]\x1b[A\r100%|██| 50/50 [06:03<00:00,  7.27s/it]")
        if message.startswith("Starting episode"):
            lines.append("[Warning]: datasets path ./datasets does not exist!")
        rows = rich_rows(message, width)
        if message.startswith("\nTask"):
            rows[0] = "\r  2%|▏  | 1/50 [00:05<04:45,  5.82s/it]\x1b[A09/01 [18:26:41] " + rows[0].lstrip()
        lines += rows
    return "\n".join(lines) + "\nException ignored in: <function __del__>\n  File 'binding_utils.py', line 199\n"


def assert_is_the_synthetic_run(log):
    assert log.complete and log.task_suite == "libero_10"
    assert [t.name for t in log.tasks] == list(TASKS)
    assert [t.outcomes for t in log.tasks] == list(TASKS.values())
    assert [t.success_rate for t in log.tasks] == pytest.approx([2 / 3, 2 / 3, 1.0])
    assert (log.overall_success_rate, log.total_episodes, log.total_successes) == (0.7778, 9, 7)
    assert (log.num_video_lines, log.num_video_successes, log.num_episode_errors) == (9, 7, 0)


def test_committed_files_are_the_generated_ones():
    assert (DATA / "eval_plain.txt").read_text() == "\n".join(plain_messages()) + "\n"
    assert (DATA / "eval_console_80.log").read_bytes().decode() == console_capture(plain_messages())


@pytest.mark.parametrize("name", ["eval_plain.txt", "eval_console_80.log"])
def test_plain_and_wrapped_logs_give_the_same_figures(name):
    assert_is_the_synthetic_run(parse_eval_log(DATA / name))
    assert extract_success_rate_from_log(DATA / name) == 0.7778


@pytest.mark.parametrize("width", [72, 79, 100, 132, 400])
def test_any_console_width(tmp_path, width):
    (tmp_path / "log").write_text(console_capture(plain_messages(), width), encoding="utf-8")
    assert_is_the_synthetic_run(parse_eval_log(tmp_path / "log"))


@pytest.mark.parametrize("prefix", ["2025-09-01 18:26:41,123 [INFO] ", "INFO:root:"])
def test_standard_logging_prefixes(tmp_path, prefix):
    lines = [prefix + line.strip() for line in plain_messages()]
    (tmp_path / "log").write_text("\n".join(lines))
    log = parse_eval_log(tmp_path / "log")
    assert log.overall_success_rate == 0.7778
    assert [t.outcomes for t in log.tasks] == list(TASKS.values())


@pytest.mark.parametrize("kept", ["plain", "wrapped"])
def test_a_cut_log_is_partial_and_flagged(tmp_path, kept):
    messages = list(plain_messages())
    cut = messages[: messages.index("# episodes completed so far: 4")]
    text = "\n".join(cut) if kept == "plain" else console_capture(cut)
    (tmp_path / "log").write_text(text, encoding="utf-8")
    log = parse_eval_log(tmp_path / "log")
    assert not log.complete
    assert (log.total_episodes, log.total_successes, log.overall_success_rate) == (4, 3, 0.75)
    assert [t.success_rate for t in log.tasks] == pytest.approx([2 / 3, None])
    assert extract_success_rate_from_log(tmp_path / "log") is None


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("kept", ["plain", "wrapped"])
def test_a_log_cut_at_any_line(tmp_path, kept, end):
    whole = "\n".join(plain_messages()) + "\n" if kept == "plain" else console_capture(plain_messages())
    lines = whole.splitlines()
    last = next(i for i, line in enumerate(lines) if "Overall success rate" in line)
    for cut in range(len(lines)):
        (tmp_path / "log").write_bytes(end.join(lines[:cut]).encode())
        log = parse_eval_log(tmp_path / "log")
        assert log.complete <= (cut > last), (cut, lines[cut - 1])
        outcomes = [success for task in log.tasks for success in task.outcomes]
        assert len(outcomes) <= log.total_episodes + 1 and outcomes == EPISODES[: len(outcomes)]
        if not log.complete:
            assert extract_success_rate_from_log(tmp_path / "log") is None
    (tmp_path / "log").write_bytes(end.join(lines).encode())
    assert_is_the_synthetic_run(parse_eval_log(tmp_path / "log"))


@pytest.mark.slow
@pytest.mark.skipif(not GOLDEN_LOGS.exists(), reason="published logs are outside the repository")
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_published_logs_cut_anywhere(tmp_path, end):
    for file, expected in json.loads((GOLDEN_LOGS / "expected.json").read_text()).items():
        lines = (GOLDEN_LOGS / file).read_bytes().split(b"\n")
        for cut in [*range(0, len(lines), len(lines) // 40), len(lines)]:
            (tmp_path / "log").write_bytes(end.join(lines[:cut]))
            log = parse_eval_log(tmp_path / "log")
            outcomes = [int(success) for task in log.tasks for success in task.outcomes]
            assert outcomes == [int(digit) for digit in expected["success_sequence"][: len(outcomes)]]
            assert log.complete <= (len(outcomes) == 500), (file, cut)
        assert log.complete, file


def test_an_empty_log_has_no_rate(tmp_path):
    (tmp_path / "log").write_text("")
    log = parse_eval_log(tmp_path / "log")
    assert (log.complete, log.overall_success_rate, log.total_episodes) == (False, None, 0)


def test_contradicting_figures_are_an_error(tmp_path):
    text = (DATA / "eval_plain.txt").read_text().replace("Total successes: 7", "Total successes: 8")
    (tmp_path / "log").write_text(text)
    with pytest.raises(LogFormatError, match=r"log: Total successes: found 8, the episode lines give 7"):
        parse_eval_log(tmp_path / "log")


def test_episode_errors_are_counted(tmp_path):
    messages = list(plain_messages())
    messages.insert(messages.index("Success: False"), "Episode error: context lost")
    (tmp_path / "log").write_text("\n".join(messages))
    assert parse_eval_log(tmp_path / "log").num_episode_errors == 1


def test_missing_log_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.txt"):
        extract_success_rate_from_log(tmp_path / "nothing.txt")


@pytest.mark.skipif(not GOLDEN_LOGS.is_dir(), reason="real evaluation logs are not part of the repository")
def test_real_logs():
    expected = json.loads((GOLDEN_LOGS / "expected.json").read_text())
    assert expected
    for name, figures in expected.items():
        log = parse_eval_log(GOLDEN_LOGS / name)
        assert extract_success_rate_from_log(GOLDEN_LOGS / name) == figures["overall_success_rate"]
        assert [t.success_rate for t in log.tasks] == figures["task_success_rates"]
        assert [t.successes for t in log.tasks] == figures["per_task_successes"]
        assert [t.episodes for t in log.tasks] == figures["per_task_episodes"]
        assert [t.name.replace(" ", "_")[:50] for t in log.tasks] == figures["video_task_names"]
        assert log.to_dict()["success_sequence"] == figures["success_sequence"]
        assert len(log.success_sequence) == figures["num_success_lines"]
        assert (log.total_episodes, log.total_successes) == (figures["total_episodes"], figures["total_successes"])
        assert (log.num_video_lines, log.num_video_successes) == (
            figures["num_video_lines"],
            figures["success_lines_true"],
        )
        assert (log.task_suite, log.complete) == (figures["task_suite"], True)


# --- checkpoints


def test_newest_checkpoint_by_step_not_by_time(tmp_path):
    for step in (20000, 5000, 9000):  # alphabetically 9000 is last, by time too
        (tmp_path / f"run.1--{step}_chkpt").mkdir()
    (tmp_path / "run.1--99999_chkpt").write_text("a file")
    (tmp_path / "runX1--70000_chkpt").mkdir()  # a dot is not a wildcard
    (tmp_path / "run.1--note--80000_chkpt").mkdir()  # another run id
    (tmp_path / "run.1--90000_chkpt.tmp").mkdir()
    assert extract_checkpoint_path(tmp_path, "run.1") == tmp_path / "run.1--20000_chkpt"


def test_no_checkpoint_and_latest_only(tmp_path):
    (tmp_path / "run").mkdir()
    assert extract_checkpoint_path(tmp_path, "run") is None
    (tmp_path / "run" / "action_head--latest_checkpoint.pt").touch()
    assert extract_checkpoint_path(tmp_path, "run") == tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="absent"):
        extract_checkpoint_path(tmp_path / "absent", "run")


# --- result lists and tables


def test_table_is_the_published_one(tmp_path):
    results = tmp_path / "table1_results.log"
    results.write_text("libero_spatial: 0.8500\nlibero_object: 0.9000\nlibero_goal: 0.9000\nlibero_10: 0.7600\n")
    assert format_results_table(parse_all_results(results), title="T") == (
        "# T\n\n| Task Suite | Success Rate |\n|---|---|\n"
        "| libero_10 | 0.7600 (76.0%) |\n| libero_goal | 0.9000 (90.0%) |\n"
        "| libero_object | 0.9000 (90.0%) |\n| libero_spatial | 0.8500 (85.0%) |\n"
        "| **Average** | **0.8525 (85.2%)** |\n"
    )


def test_failures_are_rows_and_not_in_the_average():
    results = {"b": 0.5, "a": FailureCode.EVAL_FAILED, "c": 0.7, "d": FailureCode.NO_CHECKPOINT}
    assert average_rate(results) == pytest.approx(0.6)
    table = format_results_table(results)
    assert "| a | EVAL_FAILED |" in table and "| d | NO_CHECKPOINT |" in table
    assert "| **Average** | **0.6000 (60.0%)** |" in table
    assert "Average over 2 of 4 suites; failed: a (EVAL_FAILED), d (NO_CHECKPOINT)." in table


def test_table_without_any_number_has_no_average():
    assert "| **Average** | **n/a** |" in format_results_table({"a": FailureCode.TRAINING_FAILED})
    with pytest.raises(ValueError, match="results"):
        format_results_table({})


@pytest.mark.parametrize("code", list(FailureCode))
def test_every_failure_code_is_read_back(tmp_path, code):
    (tmp_path / "r").write_text(f"# comment\n\nlibero_goal: {code.value}\r\n")
    assert parse_all_results(tmp_path / "r") == {"libero_goal": code}


@pytest.mark.parametrize(
    "line", ["libero_goal 0.5", "libero_goal: 1.5", "libero_goal: nan", "libero_goal: LOST", "a: 0.5\na: 0.6"]
)
def test_bad_result_lines_are_errors_with_file_and_line(tmp_path, line):
    (tmp_path / "r").write_text(line + "\n")
    with pytest.raises(LogFormatError, match=r"r: line [12]: "):
        parse_all_results(tmp_path / "r")


# --- command line


def run_command(*arguments):
    return subprocess.run([sys.executable, log_parser.__file__, *map(str, arguments)], capture_output=True, text=True)


def test_command_line(tmp_path):
    rate = run_command("rate", DATA / "eval_console_80.log")
    assert (rate.returncode, rate.stdout) == (0, "0.7778\n")
    episodes = json.loads(run_command("episodes", DATA / "eval_plain.txt").stdout)
    assert episodes["success_sequence"] == "110101111" and episodes["tasks"][1]["successes"] == 2
    (tmp_path / "r--3_chkpt").mkdir()
    assert run_command("checkpoint", tmp_path, "r").stdout.strip() == str(tmp_path / "r--3_chkpt")
    (tmp_path / "results.log").write_text("libero_goal: 0.5000\n")
    assert run_command("table", tmp_path / "results.log", "--output", tmp_path / "t.md").returncode == 0
    assert "| libero_goal | 0.5000 (50.0%) |" in (tmp_path / "t.md").read_text()


def test_command_line_failures_have_exit_codes_and_no_output(tmp_path):
    (tmp_path / "cut").write_text("Task suite: libero_10\nSuccess: True\n")
    (tmp_path / "list").write_text("libero_goal: 0.5000\n")
    for arguments, code in (
        (("rate", tmp_path / "cut"), 3),
        (("rate", tmp_path / "absent"), 2),
        (("checkpoint", tmp_path, "r"), 3),
        (("table", tmp_path / "cut"), 2),
        (("table", tmp_path / "list", "--output", tmp_path), 2),
    ):
        done = run_command(*arguments)
        assert (done.returncode, done.stdout) == (code, "") and done.stderr
        assert code == 3 or done.stderr.count("\n") == 1, done.stderr


def test_comparison_averages_only_what_every_method_has(tmp_path):
    (tmp_path / "plain").write_text("libero_10: 0.5000\nlibero_goal: 0.7000\n")
    (tmp_path / "craft").write_text("libero_10: 0.6000\nlibero_goal: EVAL_FAILED\n")
    done = run_command("compare", f"plain={tmp_path / 'plain'}", f"CRaFT={tmp_path / 'craft'}", "--title", "T")
    assert done.stdout == (
        "# T\n\n| Task Suite | plain | CRaFT |\n|---|---|---|\n"
        "| libero_10 | 0.5000 (50.0%) | 0.6000 (60.0%) |\n| libero_goal | 0.7000 (70.0%) | EVAL_FAILED |\n"
        "| **Average** | **0.5000 (50.0%)** | **0.6000 (60.0%)** |\n"
        "\nAverage over the 1 of 2 suites with a number in every column: libero_10.\n"
    )
    assert run_command("compare", str(tmp_path / "plain")).returncode == 2


def test_utf16_capture_of_windows_powershell(tmp_path):
    (tmp_path / "log").write_text("\r\n".join(plain_messages()), encoding="utf-16", newline="")
    assert_is_the_synthetic_run(parse_eval_log(tmp_path / "log"))
