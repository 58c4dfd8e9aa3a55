"""Texts that programs obey, odd paths and terminals, killed drivers, clocks that are set back."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stub_programs

from craft_experiments.common_utils import job_slots
from craft_experiments.common_utils.job_slots import Job, run_jobs
from craft_experiments.common_utils.log_parser import format_comparison_table
from craft_experiments.common_utils.terminal import say
from craft_experiments.jobs.base import JobFailed
from craft_experiments.jobs.evaluate import _outcome
from craft_experiments.settings import RunConfig, resolve
from craft_experiments.table_csv import csv_text
from craft_experiments.table_formats import latex, latex_text, markdown
from craft_experiments.table_grids import Grid, GridRow
from prismatic.evidence.cells import csv_cell, markdown_cell, one_line

ROOT = Path(__file__).parents[2]
ODD = "it's \"odd\" 'n' $HOME `id` \U0001f916 \u0645 #1; x"
NASTY = ["a | b", "a \\| b", "line\nbreak", "\x1b]8;;http://x\x1b\\link", "<img src=x onerror=y>", "\u2028", "=1+1"]


@pytest.mark.parametrize("text", NASTY)
def test_a_text_stays_one_cell_of_a_markdown_table(text):
    grid = Grid("method", ("", ""), (text, "b"), (GridRow(text, (text, "1"), frozenset({0}), True),))
    for line in markdown(grid):
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 4, line
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028]|<[a-z]", line)
    table = format_comparison_table({text: {"libero_10": 0.5}, "b": {"libero_10": 0.5}}, f"title {text}")
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table.splitlines() if line.startswith("|")} == {4}
    assert "\n" not in markdown_cell(text) and "\x1b" not in one_line(text)


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "\r=1"])
def test_no_text_of_a_csv_file_is_a_formula(text):
    (row,) = csv.DictReader(io.StringIO(csv_text([{"label": text, "mean": -0.5, "n": 3}])))
    assert row == {"label": f"'{one_line(text)}", "mean": "-0.5", "n": "3"}
    assert csv_cell("plain = text") == "plain = text"


@pytest.mark.parametrize(
    "text", ["\\input{/etc/passwd}", "\\write18{id}", "a\n\nb", "}{\\catcode", "^^5cinput", "%x", "$"]
)
def test_no_text_is_a_command_of_latex(text):
    for place in (latex_text(text), latex(Grid(text, ("",), (text,), (GridRow(text, (text,)),)), text, "l", [text])):
        commands = set(re.findall(r"\\([A-Za-z]+)", place))
        assert not commands & {"input", "write", "catcode", "def"} and "^^" not in place and "\n\n" not in place


def test_the_scripts_find_the_repository_whatever_cd_prints(tmp_path):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    script = "craft_experiments/01_main_results/run_table1_experiments.sh"
    (tmp_path / "link.sh").symlink_to(ROOT / script)
    variables = {"CDPATH": ".:..:/", "PYTHON": str(tmp_path / "python"), "RUN_ROOT_DIR": ODD, "EXTRA_EVAL_ARGS": "-x y"}
    environment = stub_programs.clean_environment() | variables
    for path in (script, str(tmp_path / "link.sh")):
        done = subprocess.run(["bash", path], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        lines = done.stdout.splitlines()
        assert lines[0] == str(ROOT) and f"--work_dir={ODD}" in lines and "--extra_eval_args=-x y" in lines


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_scripts_say_which_interpreter_is_missing_and_run_in_another_shell(tmp_path):
    script = ROOT / "craft_experiments/01_main_results/run_table1_experiments.sh"
    for shell in ("bash", "sh"):
        environment = stub_programs.clean_environment() | {"PYTHON": "no such python"}
        done = subprocess.run([shell, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr == "PYTHON: found 'no such python', expected a Python interpreter\n"


def test_no_program_needs_the_texts_of_its_modules():
    """`PYTHONOPTIMIZE=2` leaves them out."""
    files = [path for room in ("prismatic", "experiments", "craft_experiments") for path in (ROOT / room).rglob("*.py")]
    texts = {path.name: path.read_text(encoding="utf-8") for path in files}
    assert len(files) > 200 and not [name for name, text in texts.items() if re.search(r"__doc__[.\[]", text)]


@pytest.mark.parametrize("name", ["extra_train_args", "extra_eval_args"])
def test_an_open_quote_in_a_variable_names_it(name):
    with pytest.raises(ValueError, match=f"--{name}: found"):
        resolve(RunConfig(**{name: "--note 'open"}), "table1")


# --- jobs


def writes(path: Path, text: str = "") -> list[str]:
    return [sys.executable, "-c", f"open({str(path)!r}, 'a').write({text!r})"]


@pytest.fixture
def odd(tmp_path):
    folder = tmp_path / ODD
    folder.mkdir()
    return folder


def test_jobs_run_in_folders_with_any_name(odd):
    jobs = [Job("a", writes(odd / "a"), odd / "a"), Job("b", writes(odd / "b"), odd / "b", ["a"])]
    run_jobs(jobs, odd / "logs", slots=2)
    run_jobs(jobs, odd / "logs", slots=2)  # the recorded commands are found again
    assert (odd / "a").exists() and (odd / "b").exists()


def test_a_terminal_without_the_letters_or_closed_ends_nothing(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say(ODD)
    assert b"\\U0001f916" in raw.getvalue()

    class Closed(io.BytesIO):
        def write(self, data):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Closed()))
    say("anything")


fcntl = pytest.importorskip("fcntl") if os.name == "posix" else None
posix = pytest.mark.skipif(fcntl is None, reason="locks that programs inherit exist on POSIX alone")


@posix
def test_a_program_keeps_the_lock_of_its_job(tmp_path):
    """So that it is known to run after its driver was killed."""
    code = f"""
import fcntl, os
file = os.open({str(tmp_path / "logs" / "a.lock")!r}, os.O_RDWR)
try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    open({str(tmp_path / "held")!r}, "w").close()
"""
    run_jobs([Job("a", [sys.executable, "-c", code], tmp_path / "held")], tmp_path / "logs", slots=1)
    with (tmp_path / "logs" / "a.lock").open() as file:  # and lets it go
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@posix
@pytest.mark.parametrize("finished", [True, False])
def test_a_job_that_a_killed_driver_left_running_is_waited_for(tmp_path, monkeypatch, capsys, finished):
    (tmp_path / "logs").mkdir()
    left = (tmp_path / "logs" / "a.lock").open("w")  # noqa: SIM115 (closed by `look`)
    fcntl.flock(left, fcntl.LOCK_EX)
    jobs = [Job("a", writes(tmp_path / "a", "again"), tmp_path / "a"), Job("b", writes(tmp_path / "b"), tmp_path / "b")]
    looks = []

    def look(_seconds):
        looks.append((tmp_path / "b").exists())
        if looks[-1]:  # the other job was not held up
            with contextlib.suppress(ValueError):
                if finished and not left.closed:
                    (tmp_path / "a").write_text("once")
                left.close()

    monkeypatch.setattr(job_slots.time, "sleep", look)
    run_jobs(jobs, tmp_path / "logs", slots=2)
    assert (tmp_path / "a").read_text() == ("once" if finished else "again")
    assert capsys.readouterr().out.count("waiting for it") == 1


@pytest.mark.parametrize(
    ("text", "done"),
    [('{"step": 4}\n{"step": 5, "a": {"b": 1}', 4), ('{"step": 4}\n[1]', 4), ('{"a": 1}\n\x00\x00', 1), ("\x00", 0)],
)
def test_a_line_cut_by_a_kill_does_not_count(tmp_path, text, done):
    (tmp_path / "p").write_text(text)
    assert Job("x", [], tmp_path / "r", progress=tmp_path / "p", units=40).units_done() == done


@pytest.mark.parametrize("content", ["", "{", "[]", '{"complete": true}', '{"complete": 1, "valid": 1}', "\x00" * 9])
def test_a_damaged_result_is_not_done(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    assert not Job("eval-a", [], tmp_path / "results.json").is_done()


# --- clocks


def test_the_rate_is_that_of_the_results_whatever_logs_lie_beside_them(tmp_path):
    row = {"suite": "s", "task_id": 0, "init_idx": 0, "seed": 7, "status": "success", "steps": 3}
    (tmp_path / "episodes.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "EVAL-2031_01_01-00_00_00.txt").write_text("Task suite: s\nOverall success rate: 0.0\n")
    with pytest.raises(JobFailed, match="no overall success_rate"):
        _outcome(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"overall": {"success_rate": 1.0}}))
    assert _outcome(tmp_path) == {"rate": 1.0, "episodes": [[0, 0, 1, 3]]}
    (tmp_path / "results.json").write_text(json.dumps({"overall": {"success_rate": 0.0}}))
    with pytest.raises(JobFailed, match="results.json has rate 0.0, episodes.jsonl 1 of 1"):
        _outcome(tmp_path)


def test_durations_come_from_the_clock_that_is_never_set_back():
    files = [*(ROOT / "craft_experiments").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    assert len(files) > 50 and not [path.name for path in files if "time.time()" in path.read_text(encoding="utf-8")]
