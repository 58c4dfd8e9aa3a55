"""Runs jobs: one command after the other, everything printed goes to a log as well, a record for what was measured.

A job that fails is noted with its code and the others go on. Killing this program loses the last minutes of the running
jobs at most: trainings and evaluations continue from what they saved, and a program left running is waited for.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import BinaryIO

from craft_experiments.common_utils.terminal import echo, say
from craft_experiments.jobs.base import Job, JobFailed, portable
from craft_experiments.jobs.plan import cells_of, missing
from craft_experiments.records import State, locked, set_states
from craft_experiments.settings import ROOT, Settings
from experiments.robot.libero.kernels import fixed_kernels
from prismatic.evidence.failure_codes import FailureCode
from prismatic.progress import duration


def run_table(s: Settings, jobs: dict[str, Job]) -> dict[str, FailureCode]:
    """Run what is missing, `s.slots` jobs at a time.

    Returns:
        Failure code of every job that failed, or was left out because one before it failed.
    """
    todo = missing(s, jobs)
    say(f"{len(todo)} of {len(jobs)} jobs to run")
    unfinished = cells_of(todo.values())
    states = {name: State.PENDING if name in unfinished else State.EVALUATED for name in cells_of(jobs.values())}
    if states:
        set_states(s.records_dir, states)
    failures: dict[str, FailureCode] = {}
    running: dict[Future, Job] = {}
    started, count = time.monotonic(), len(todo)
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
            if left := len(todo) + len(running):
                seconds = (time.monotonic() - started) * left / (count - left)
                say(f"{count - left} of {count} jobs done, about {duration(seconds)} left")
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
        if job.is_done(s):
            return
        job.begin(s)
        begun, content = time.monotonic(), job.content(s)
        used = [_run(s, job, command, descriptor) for command in job.commands(s)]
        spent = {"seconds": round(time.monotonic() - begun, 1)}
        if all(seconds is not None for seconds in used):
            spent["processor_seconds"] = round(sum(filter(None, used)), 1)
        try:
            job.finish(s, spent, content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"what {job.name} left cannot be read: {type(error).__name__}: {error}"
            raise JobFailed(FailureCode.PARSE_FAILED, reason) from error
    say(f"{job.name}: done in {time.monotonic() - begun:.0f} s")


# --- Programs -----------------------------------------------------------------------------------------------------


def _run(s: Settings, job: Job, command: list[str], lock: int) -> float | None:
    """Run one program with its output in the log and on the terminal.

    Returns:
        Seconds of processor that it and its own programs used, which do not depend on what else runs; None where the
        system does not say (Windows).

    Raises:
        JobFailed: it does not end with 0.
    """
    log = job.log(s)
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"{job.name}: {shlex.join(portable(command))}")
    environment = fixed_kernels() | os.environ  # what the user set wins
    environment |= {"PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    if s.slots > 1:
        for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS"):  # numerical libraries, software renderer
            environment.setdefault(name, str(max(1, (os.cpu_count() or 1) // s.slots)))
    environment |= job.environment
    # The program inherits the lock of its job: if this one is killed, the next driver waits until the program is over.
    inherited = (lock,) if os.name == "posix" else ()  # Windows knows no such thing
    prefix = f"{job.name}: ".encode() if s.slots > 1 else b""
    with log.open("ab") as stream:
        stream.write(f"+ {shlex.join(command)}\n".encode())
        stream.flush()
        try:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, pass_fds=inherited
            )
        except OSError as error:  # no such program
            stream.write(f"{error}\n".encode())
            raise JobFailed(job.failure, f"{command[0]}: {error.strerror}") from error
        used = _copy(process, stream, prefix)
    if process.returncode != 0:
        raise JobFailed(job.failure, f"exit code {process.returncode}, see {log}")
    return used


def _copy(process: subprocess.Popen[bytes], stream: BinaryIO, prefix: bytes) -> float | None:
    """Everything a program prints, to the log and to the terminal, until it ends. Returns its seconds of processor."""
    assert process.stdout is not None  # it was started with a pipe
    with process:
        for line in process.stdout:
            stream.write(line)
            stream.flush()
            echo(prefix + line)
        if os.name != "posix":
            return None
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return usage.ru_utime + usage.ru_stime


def _python_path() -> str:
    """The programs run from the repository whether or not the package is installed."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
