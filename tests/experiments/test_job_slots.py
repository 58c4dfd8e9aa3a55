"""The runner of the demo's jobs: order, skipping, failure, resumption, the end of its commands, the time left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from craft_experiments.common_utils import job_slots
from craft_experiments.common_utils.job_slots import Job, Outlook, Running, run_jobs
from prismatic.command_line import UsageError

ROOT = Path(__file__).resolve().parents[2]


def touch_job(folder: Path, name: str, after=(), code: str = "") -> Job:
    result = folder / f"{name}.done"
    program = f"{code}; open({str(result)!r}, 'w').close(); open({str(folder / 'order')!r}, 'a').write({name!r} + ' ')"
    return Job(name, [sys.executable, "-c", program.lstrip("; ")], result, list(after))


def order(folder: Path) -> list[str]:
    return (folder / "order").read_text().split()


def test_jobs_wait_for_their_predecessors_and_finished_ones_are_skipped(tmp_path):
    jobs = [touch_job(tmp_path, "c", ["b"]), touch_job(tmp_path, "b", ["a"]), touch_job(tmp_path, "a")]
    run_jobs(jobs, tmp_path / "logs", slots=2)
    assert order(tmp_path) == ["a", "b", "c"]
    assert {path.stem for path in (tmp_path / "logs").glob("*.seconds")} == {"a", "b", "c", "all"}
    (tmp_path / "b.done").unlink()
    run_jobs(jobs, tmp_path / "logs", slots=2)
    assert order(tmp_path) == ["a", "b", "c", "b"]


def test_no_more_jobs_than_slots_run_at_a_time(tmp_path, monkeypatch):
    """Every job waits until it is told to end, which happens once as many run as may."""
    started, most, start = [], [], subprocess.Popen

    def start_and_count(*words, **options):
        started.append(start(*words, stdin=subprocess.PIPE, **options))
        most.append(sum(process.poll() is None for process in started))
        return started[-1]

    def end_one(_seconds):
        alive = [process for process in started if process.poll() is None]
        if len(alive) == 2 or len(started) == 4:
            for process in alive[:1]:
                process.communicate()

    monkeypatch.setattr(job_slots.subprocess, "Popen", start_and_count)
    monkeypatch.setattr(job_slots.time, "sleep", end_one)
    run_jobs([touch_job(tmp_path, f"j{i}", code="input_ = open(0).read()") for i in range(4)], tmp_path / "logs", 2)
    assert sorted(order(tmp_path)) == ["j0", "j1", "j2", "j3"] and most == [1, 2, 2, 2]


def test_a_failed_job_stops_the_run_and_shows_the_end_of_its_log(tmp_path, capsys):
    bad = touch_job(tmp_path, "bad", code="raise SystemExit('no such data set')")
    with pytest.raises(SystemExit, match="1"):
        run_jobs([bad, touch_job(tmp_path, "next", ["bad"])], tmp_path / "logs", slots=1)
    assert "no such data set" in capsys.readouterr().err
    assert not (tmp_path / "order").exists()


def test_a_job_without_its_result_has_failed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_jobs([Job("quiet", [sys.executable, "-c", "pass"], tmp_path / "never")], tmp_path / "logs", slots=1)
    assert "quiet" in capsys.readouterr().err


def test_a_result_of_another_command_is_refused(tmp_path):
    program, done = [sys.executable, "-c", f"open({str(tmp_path / 'done')!r}, 'w')"], tmp_path / "done"
    run_jobs([Job("a", [*program, "--seed", "7", "--steps", "3"], done)], tmp_path / "logs", slots=1)
    expected = r"a.command: a was begun with other settings: found --seed 7, expected --seed 8 --new 1; name another"
    with pytest.raises(UsageError, match=expected) as refused:
        run_jobs([Job("a", [*program, "--seed", "8", "--steps", "3", "--new", "1"], done)], tmp_path / "logs", slots=1)
    assert "\n" not in str(refused.value)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "b.command").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="b.command"):
        run_jobs([touch_job(tmp_path, "x"), touch_job(tmp_path, "b")], tmp_path / "new", slots=1)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b.command"]  # nothing was written


@pytest.mark.parametrize("begun", [False, True])
def test_a_begun_job_goes_on(tmp_path, begun):
    progress, seen = tmp_path / "episodes.jsonl", tmp_path / "seen"
    if begun:
        progress.write_text('{"init_idx": 0}\n')
    program = f"import sys; open({str(seen)!r}, 'w').write(' '.join(sys.argv[1:]))"
    job = Job("e", [sys.executable, "-c", program], seen, progress=progress, units=2, resume=["--resume", "True"])
    run_jobs([job], tmp_path / "logs", slots=1)
    assert seen.read_text() == ("--resume True" if begun else "")
    durations = {path.stem for path in (tmp_path / "logs").glob("*.seconds")}
    assert durations == (set() if begun else {"e", "all"})  # a part of a job does not pass for the whole


@pytest.mark.parametrize(("complete", "valid"), [(False, True), (True, False), (True, True)])
def test_an_unfinished_or_invalid_evaluation_is_not_done(tmp_path, complete, valid):
    job = Job("eval", [], tmp_path / "results.json")
    assert not job.is_done()
    job.result.write_text(json.dumps({"complete": complete, "valid": valid}))
    assert job.is_done() == (complete and valid)


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("", 0),
        ('{"step": 1}\n{"step": 10}\n', 10),
        ('{"step": 10}\n{"st', 10),
        ('{"init_idx": 4}\n' * 3, 3),
        ("{}\n" * 99, 40),
    ],
)
def test_progress_counts_steps_or_episodes(tmp_path, text, done):
    (tmp_path / "p.jsonl").write_text(text)
    assert Job("x", [], tmp_path / "r", progress=tmp_path / "p.jsonl", units=40).units_done() == done


def running(job: Job, started: float, first: tuple[float, int], done: int) -> Running:
    run = Running(job, process=None, log=None, started=started, first=first)
    run.units_done = done
    return run


def test_the_time_left_follows_the_measured_rates(tmp_path, monkeypatch):
    monkeypatch.setattr(job_slots.time, "monotonic", lambda: 100.0)
    train = Job("train-a", [], tmp_path / "a", units=100, unit_s=1.0)
    later = [Job(f"train-{name}", [], tmp_path / name, units=100, unit_s=1.0) for name in "bc"]
    # 20 units in 40 s after 10 s of start-up: 2 s a unit, so 60 units take 120 s, and a whole job 200 s.
    run = running(train, started=50.0, first=(10.0, 20), done=40)
    assert Outlook().seconds_left([], [run], slots=2) == pytest.approx(120)
    assert Outlook().seconds_left(later, [run], slots=2) == pytest.approx((120 + 200 + 200) / 2)
    assert Outlook().seconds_left(later, [], slots=1) == pytest.approx(200)  # nothing measured: as expected


def test_the_time_left_is_no_shorter_than_the_longest_chain(tmp_path):
    chain = [Job("z", [], tmp_path / "z", ["y"], units=5), Job("y", [], tmp_path / "y", ["x"], units=4)]
    chain.append(Job("x", [], tmp_path / "x", units=3))
    assert Outlook().seconds_left(chain, [], slots=2) == pytest.approx(12)


def test_progress_is_told_while_a_job_runs(tmp_path, capsys, monkeypatch):
    progress, result, told = tmp_path / "metrics.jsonl", tmp_path / "done", tmp_path / "told"
    program = (
        f"import os, time; open({str(progress)!r}, 'w').write('{{\"step\": 7}}\\n')\n"
        f"while not os.path.exists({str(told)!r}): time.sleep(0.01)\n"
        f"open({str(result)!r}, 'w')"
    )
    say = job_slots.say

    def say_and_let_go_on(text: str) -> None:
        say(text)
        if "7/20" in text:
            told.touch()

    monkeypatch.setattr(job_slots, "say", say_and_let_go_on)
    job = Job("train-a", [sys.executable, "-c", program], result, progress=progress, units=20, unit="steps")
    run_jobs([job], tmp_path / "logs", slots=1, report_s=0.2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "train-a 7/20 steps" in line]
    assert lines and all("0 of 1 jobs done, about" in line for line in lines)


KILLED = """
import os, sys
from pathlib import Path
from kill_points import kills
from craft_experiments.common_utils.job_slots import Job, run_jobs

root = Path(sys.argv[1])

def run(kill):
    folder = root / str(kill)
    def job(name, after):
        code = f"open({str(folder / 'order')!r}, 'a').write({name!r}); open({str(folder / name)!r}, 'w')"
        return Job(name, [sys.executable, "-S", "-c", code], folder / name, after)
    run_jobs([job("a", []), job("b", ["a"]), job("c", ["b"])], folder / "logs", slots=1)

def check(kill):
    assert (root / str(kill) / "order").read_text() == "abc"
    assert not list((root / str(kill)).rglob("*.tmp"))

print(kills(run, check))
"""


def test_a_driver_that_was_killed_anywhere_goes_on_and_repeats_nothing(tmp_path):
    """Before every call that changes the file system, so between jobs as well as while one of them runs."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    words = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending_the_run_ends_its_commands(tmp_path, number):
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(3600)"
    program = (
        "import sys; from pathlib import Path\n"
        "from craft_experiments.common_utils.job_slots import Job, run_jobs\n"
        f"run_jobs([Job('a', [sys.executable, '-c', {child!r}], Path('never'))], Path({str(tmp_path)!r}), slots=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (pid_file.exists() and pid_file.read_text()):
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(600) == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
