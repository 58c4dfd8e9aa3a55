"""Runs jobs: one command after the other, everything printed goes to a log as well, a record for what was measured.

A job that fails is noted with its code and the others go on. Killing this program loses the last minutes of the running
jobs at most: trainings and evaluations continue from what they saved, and a program left running is waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO

from craft_experiments.commands import evaluation_dir, portable
from craft_experiments.common_utils.log_parser import LogFormatError, extract_success_rate_from_log
from craft_experiments.jobs import (
    Job,
    Stage,
    cells_of,
    checkpoint_of,
    commands_of,
    is_done,
    is_trained,
    measurement_file,
    missing,
    record_of,
)
from craft_experiments.records import METRICS, RETENTION, State, locked, read_record, set_states, write_record
from craft_experiments.settings import ROOT, Settings
from experiments.robot.libero.kernels import fixed_kernels
from prismatic.evidence.failure_codes import FailureCode
from prismatic.evidence.results import ResultFormatError, read_jsonl

_CODES = {
    Stage.COLLECT: FailureCode.TRAINING_FAILED,
    Stage.TRAIN: FailureCode.TRAINING_FAILED,
    Stage.INTERPOLATE: FailureCode.NO_CHECKPOINT,
    Stage.EVALUATE: FailureCode.EVAL_FAILED,
    Stage.MEASURE: FailureCode.EVAL_FAILED,
}
_terminal = threading.Lock()


class JobFailed(RuntimeError):
    """A job ended without its result. `code` goes into the manifest."""

    def __init__(self, code: FailureCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def run_table(s: Settings, jobs: dict[str, Job]) -> dict[str, FailureCode]:
    """Run what is missing, `s.slots` jobs at a time.

    Returns:
        Failure code of every job that failed, or was left out because one before it failed.
    """
    todo = missing(s, jobs)
    say(f"{len(todo)} of {len(jobs)} jobs to run")
    unfinished = cells_of(todo.values())
    states = {name: State.PENDING if name in unfinished else State.EVALUATED for name in cells_of(jobs.values())}
    set_states(s.records_dir, states)
    failures: dict[str, FailureCode] = {}
    running: dict[Future, Job] = {}
    with ThreadPoolExecutor(s.slots) as pool:
        while todo or running:
            for job in _leave_out(todo, failures):
                _note_failure(s, job, failures[job.name], failures)
            busy = {job.name for job in running.values()}
            ready = [job for job in todo.values() if not (todo.keys() | busy) & set(job.after)]
            for job in ready[: s.slots - len(running)]:
                running[pool.submit(run_job, s, todo.pop(job.name))] = job
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                _collect(s, job, future, failures)
                if not any(other.cell == job.cell for other in (*todo.values(), *running.values())):
                    _finish_cell(s, job, failures)
    return failures


def _leave_out(todo: dict[str, Job], failures: dict[str, FailureCode]) -> list[Job]:
    """Take out of `todo` what waits for a failed job, and give it that job's code."""
    out = []
    for name, job in list(todo.items()):
        before = [failures[n] for n in job.after if n in failures]
        if before:
            failures[name] = before[0]
            out.append(todo.pop(name))
    return out


def _collect(s: Settings, job: Job, future: Future, failures: dict[str, FailureCode]) -> None:
    error = future.exception()
    if error is None:
        return
    if not isinstance(error, JobFailed):
        raise error
    say(f"{job.name}: {error.code.value}: {error}")
    _note_failure(s, job, error.code, failures)


def _note_failure(s: Settings, job: Job, code: FailureCode, failures: dict[str, FailureCode]) -> None:
    failures[job.name] = code
    if job.cell is not None:
        set_states(s.records_dir, {job.cell.name: code})


def _finish_cell(s: Settings, job: Job, failures: dict[str, FailureCode]) -> None:
    """The last job of a cell is over: it is evaluated unless one of them failed."""
    if job.cell is not None and not any(name.split("/")[1] == job.cell.name for name in failures):
        set_states(s.records_dir, {job.cell.name: State.EVALUATED})


def run_job(s: Settings, job: Job) -> None:
    """Run one job unless it is done, and write its record. Another process that runs the same job is waited for.

    Raises:
        JobFailed: a program failed, or what it left cannot be used.
    """
    lock = s.work_dir / "locks" / (job.name.replace("/", "--") + ".lock")
    with locked(lock, lambda: say(f"{job.name}: another process works on it; waiting for its end")) as descriptor:
        if is_done(s, job):
            return
        if job.stage is Stage.TRAIN:
            set_states(s.records_dir, {job.cell.name: State.TRAINING})
        if job.stage is Stage.MEASURE:
            measurement_file(s, job).unlink(missing_ok=True)  # of a run killed before its record was written
        begun = time.monotonic()
        for command in commands_of(s, job):
            _run(s, job, command, descriptor)
        try:
            _finish(s, job, command, round(time.monotonic() - begun, 1))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"what {job.name} left cannot be read: {type(error).__name__}: {error}"
            raise JobFailed(FailureCode.PARSE_FAILED, reason) from error
    say(f"{job.name}: done in {time.monotonic() - begun:.0f} s")


def _finish(s: Settings, job: Job, command: Sequence[str], seconds: float) -> None:
    """Check what a job left and write its record."""
    facts = {"cell": job.cell.name if job.cell else job.data.name, "command": portable(command), "seconds": seconds}
    if job.stage is Stage.TRAIN:
        if checkpoint_of(s, job.cell) is None:
            raise JobFailed(FailureCode.NO_CHECKPOINT, f"no {job.cell.name}--<step>_chkpt in {s.runs_dir}")
        if not is_trained(s, job.cell):
            reason = f"stopped before its last step, at {checkpoint_of(s, job.cell)}; the same command continues it"
            raise JobFailed(FailureCode.TRAINING_FAILED, reason)
        _keep_training(s, job, facts | {"metrics": _metrics(s.runs_dir / job.cell.name / "metrics.jsonl")})
        set_states(s.records_dir, {job.cell.name: State.TRAINED})
    elif job.stage is Stage.EVALUATE:
        write_record(record_of(s, job), facts | _outcome(evaluation_dir(s, job.cell, job.evaluation)))
    elif job.stage is Stage.MEASURE:
        measured = json.loads(measurement_file(s, job).read_text(encoding="utf-8"))
        write_record(record_of(s, job), facts | {RETENTION: measured})


def _keep_training(s: Settings, job: Job, record: dict[str, Any]) -> None:
    """Write the record of a training. One that is there stays, for evaluations of its policy are there as well.

    The same command gives another policy from other demonstrations, or on another kind of processor.
    """
    path = record_of(s, job)
    if not path.exists():
        write_record(path, record)
    elif read_record(path)["metrics"] != record["metrics"]:
        say(
            f"{job.name}: trained again, and not as in {path}, which stays (demonstrations or processor are not the "
            f"same). To measure everything on the new policy delete {path.parent}"
        )


def _metrics(path: Path) -> dict[str, list]:
    """{"step": [...], metric: [...]}; None where a step has no value. Empty when the run kept no metrics."""
    rows = read_jsonl(path, finite=False) if path.is_file() else []
    found = {"step": [row["step"] for row in rows]}
    for name in METRICS:
        values = [row.get(name) for row in rows]
        if any(value is not None for value in values):
            found[name] = [None if value is None else float(f"{value:.6g}") for value in values]
    return found


def _outcome(folder: Path) -> dict[str, Any]:
    """Success rate as the newest text log states it, and every episode. PARSE_FAILED when they disagree."""
    log = _text_log(folder)
    try:
        rate = extract_success_rate_from_log(log)
        rows = read_jsonl(folder / "episodes.jsonl") if (folder / "episodes.jsonl").is_file() else []
    except (FileNotFoundError, LogFormatError, ResultFormatError) as error:
        raise JobFailed(FailureCode.PARSE_FAILED, str(error)) from None
    if rate is None:
        raise JobFailed(FailureCode.PARSE_FAILED, f"{log}: no line 'Overall success rate: ...'")
    last = {(row["task_id"], row["init_idx"]): row for row in rows}  # a repeated episode supersedes its error
    episodes = [[*key, int(row["status"] == "success"), row["steps"]] for key, row in sorted(last.items())]
    counted = sum(episode[2] for episode in episodes)
    if episodes and abs(counted / len(episodes) - rate) > 5e-5 + 1e-9:  # four decimals are written
        reason = f"{log}: success rate {rate}, episodes.jsonl has {counted} of {len(episodes)}"
        raise JobFailed(FailureCode.PARSE_FAILED, reason)
    return {"rate": rate, "episodes": episodes}


def _text_log(folder: Path) -> Path:
    """That of the run which wrote the results. Names of logs hold a time, and clocks are set back."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        log = folder / f"{json.loads((folder / 'results.json').read_text(encoding='utf-8'))['run_id']}.txt"
        if log.is_file() and log.parent == folder:
            return log
    logs = sorted(folder.glob("EVAL-*.txt"))
    return logs[-1] if logs else folder / "console.log"


# --- Programs -----------------------------------------------------------------------------------------------------


def log_file(s: Settings, job: Job) -> Path:
    """Where everything a job prints goes."""
    if job.stage is Stage.EVALUATE:
        return evaluation_dir(s, job.cell, job.evaluation) / "console.log"
    return s.logs_dir / (job.name.replace("/", "--") + ".log")


def _run(s: Settings, job: Job, command: list[str], lock: int) -> None:
    """Run one program with its output in the log and on the terminal. JobFailed when it does not end with 0."""
    log = log_file(s, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"{job.name}: {shlex.join(portable(command))}")
    environment = fixed_kernels() | os.environ  # what the user set wins
    environment |= {"PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    if s.slots > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // s.slots)))
    # The program inherits the lock of its job: if this one is killed, the next driver waits until the program is over.
    inherited = {"pass_fds": (lock,)} if os.name == "posix" else {}  # Windows knows no such thing
    prefix = f"{job.name}: ".encode() if s.slots > 1 else b""
    with log.open("ab") as stream:
        stream.write(f"+ {shlex.join(command)}\n".encode())
        stream.flush()
        try:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, **inherited
            )
        except OSError as error:  # no such program
            stream.write(f"{error}\n".encode())
            raise JobFailed(_CODES[job.stage], f"{command[0]}: {error.strerror}") from error
        _copy(process, stream, prefix)
    if process.returncode != 0:
        raise JobFailed(_CODES[job.stage], f"exit code {process.returncode}, see {log}")


def _copy(process: subprocess.Popen, stream: BinaryIO, prefix: bytes) -> None:
    """Everything a program prints, to the log and to the terminal, until it ends."""
    with process:
        for line in process.stdout:
            stream.write(line)
            stream.flush()
            _echo(prefix + line)


def _python_path() -> str:
    """The programs run from the repository whether or not the package is installed."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def _echo(line: bytes) -> None:
    # A closed terminal must not end the run.
    with _terminal, contextlib.suppress(OSError, ValueError):
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def say(line: str) -> None:
    """One line with the time of day."""
    _echo(f"[{time.strftime('%H:%M:%S')}] {line}\n".encode())
