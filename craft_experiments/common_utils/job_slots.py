"""Runs command lines on a few cores: order, resumption, progress with the time left, one log per job.

A job whose result exists is skipped, so an interrupted run continues. When this program ends, by Ctrl-C or a signal,
the commands it started are asked to end first: trainings save and go on from there the next time.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from craft_experiments.common_utils.terminal import say
from prismatic.command_line import UsageError
from prismatic.evidence.checks import parse_object
from prismatic.evidence.files import remove_leftovers, write_text
from prismatic.progress import duration

POLL_S = 0.1
GRACE_S = 30.0
"""Seconds a command may take to save and end before it is killed."""


@dataclass(frozen=True)
class Job:
    """A command, the file that shows it is done, and the jobs it waits for.

    Attributes:
        name: `{kind}-{rest}`; jobs of one kind share their measured speed.
        result: exists when the job is done; an evaluation's `results.json` must also be complete and without errors.
        after: names of the jobs whose results the command reads.
        progress: JSON lines that the command appends: an optimizer step (`step`, from 1) or an episode a line.
        units: steps or episodes of the whole job, at least 1.
        unit: their name.
        start_up_s, unit_s: rough seconds before the first unit and per unit, for the first estimates.
        resume: flags that make the command go on where `progress` ends.
    """

    name: str
    command: list[str]
    result: Path
    after: list[str] = field(default_factory=list)
    progress: Path | None = None
    units: int = 1
    unit: str = "parts"
    start_up_s: float = 0.0
    unit_s: float = 1.0
    resume: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """First part of the name."""
        return self.name.partition("-")[0]

    @property
    def portable_command(self) -> str:
        """The command line for people, without the path of this interpreter."""
        return shlex.join(["python" if self.command[0] == sys.executable else self.command[0], *self.command[1:]])

    def is_done(self) -> bool:
        """Whether the result is there and sound."""
        if not self.result.exists():
            return False
        if self.result.name != "results.json":
            return True
        outcome = _object(self.result.read_text(encoding="utf-8", errors="replace")) or {}
        return outcome.get("complete") is True and outcome.get("valid") is True

    def units_done(self) -> int:
        """Steps or episodes that `progress` holds, at most `units`."""
        if self.progress is None or not self.progress.exists():
            return 0
        lines = self.progress.read_text(encoding="utf-8", errors="replace").split("\n")
        rows = [line for line in lines if line.strip()]
        if rows and _object(rows[-1]) is None:  # the command was killed while it wrote
            rows.pop()
        done = (_object(rows[-1]) or {}).get("step") if rows else None
        return min(self.units, done if isinstance(done, int) else len(rows))


def _object(text: str) -> dict | None:
    """The JSON object; None for anything else."""
    try:
        return parse_object(text, "a result", finite=False)
    except ValueError:
        return None


@dataclass
class Running:
    """A started command.

    Attributes:
        units_before: what an earlier run of the command had done.
        units_done: the last reading.
        first: (seconds since the start, units) of the first reading with progress: before it the command starts up.
    """

    job: Job
    process: subprocess.Popen
    log: Path
    units_before: int = 0
    started: float = field(default_factory=time.monotonic)
    first: tuple[float, int] | None = None
    units_done: int = field(init=False)

    def __post_init__(self) -> None:
        self.units_done = self.units_before

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def look(self) -> None:
        """Read how far the command is."""
        self.units_done = self.job.units_done()
        if self.first is None and self.units_done > self.units_before:
            self.first = (self.elapsed, self.units_done)

    def measured(self) -> tuple[float, int]:
        """(seconds, units) of the time since the first progress; (0, 0) before."""
        return (0.0, 0) if self.first is None else (self.elapsed - self.first[0], self.units_done - self.first[1])


class Outlook:
    """How much time is left, from the expected seconds and the measured rates.

    A job under way is taken to go on at its own rate, a waiting one at the speed of its kind: measured over expected
    seconds of the finished and running jobs of that kind.
    """

    def __init__(self) -> None:
        self._finished: dict[str, list[tuple[float, float]]] = {}

    def note(self, run: Running) -> None:
        """A job ended; what it measured counts from now on."""
        expected = run.job.start_up_s + (run.job.units - run.units_before) * run.job.unit_s
        self._finished.setdefault(run.job.kind, []).append((run.elapsed, expected))

    def seconds_left(self, waiting: Sequence[Job], running: Sequence[Running], slots: int) -> float:
        """Seconds until all is done: the work spread over the slots, but no less than the longest chain of jobs."""
        speeds = {kind: self._speed(kind, running) for kind in {j.kind for j in [*waiting, *(r.job for r in running)]}}
        left = {run.job.name: self._remaining(run, speeds[run.job.kind]) for run in running}
        for job in waiting:
            left[job.name] = speeds[job.kind] * (job.start_up_s + (job.units - job.units_done()) * job.unit_s)
        return max(sum(left.values()) / slots, _longest_chain(waiting, left))

    def _speed(self, kind: str, running: Sequence[Running]) -> float:
        pairs = list(self._finished.get(kind, []))
        for run in [run for run in running if run.job.kind == kind]:
            seconds, units = run.measured()
            pairs.append((seconds if units else 0.0, units * run.job.unit_s))
        expected = sum(pair[1] for pair in pairs)
        return sum(pair[0] for pair in pairs) / expected if expected > 0 else 1.0

    def _remaining(self, run: Running, speed: float) -> float:
        seconds, units = run.measured()
        rate = seconds / units if units else speed * run.job.unit_s
        start_up = 0.0 if run.first else max(0.0, speed * run.job.start_up_s - run.elapsed)
        return start_up + rate * (run.job.units - run.units_done)


def _longest_chain(waiting: Sequence[Job], left: dict[str, float]) -> float:
    ends = dict(left)
    for _ in waiting:  # jobs may be listed in any order: as many rounds as a chain can be long
        for job in waiting:
            ends[job.name] = left[job.name] + max((ends.get(name, 0.0) for name in job.after), default=0.0)
    return max(ends.values(), default=0.0)


def run_jobs(jobs: Sequence[Job], log_dir: Path, slots: int, report_s: float = 20.0) -> None:
    """Run every job once its predecessors are done, `slots` at a time, each with one thread, from this folder.

    `log_dir` keeps per job `{job}.log`, `{job}.command` and, when it is done without a break, `{job}.seconds`, and
    `all.seconds` when this call did everything. A line says when a job starts and ends, and every `report_s` seconds
    what is running and how much time is left. A failed job ends the program with code 1 after the running ones ended,
    with the end of its log.

    Raises UsageError, before anything is written, when a result in place was made by another command than the job's.
    """
    check_commands(jobs, log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(log_dir)
    queue = _Queue(list(jobs), log_dir, slots)
    started = spoken = time.monotonic()
    with _ended_by_signals():
        try:
            while queue.advance():
                if time.monotonic() - spoken >= report_s:
                    spoken = time.monotonic()
                    say(queue.progress_line())
                time.sleep(POLL_S)
        finally:
            _end([run.process for run in queue.running])
    if queue.has_failed:
        sys.exit(1)
    if not queue.is_continued:
        write_text(log_dir / "all.seconds", f"{time.monotonic() - started:.1f}\n")


class _Queue:
    """What waits, runs and is done."""

    def __init__(self, jobs: list[Job], log_dir: Path, slots: int) -> None:
        self.count, self.log_dir, self.slots = len(jobs), log_dir, slots
        self.done = {job.name for job in jobs if job.is_done()}
        self.waiting = [job for job in jobs if job.name not in self.done]
        self.is_continued = bool(self.done) or any(job.units_done() for job in jobs)
        self.running: list[Running] = []
        self.has_failed = False
        self._held: set[str] = set()  # jobs that a program of a killed driver still works on
        self._outlook = Outlook()
        if self.done:
            say(f"{len(self.done)} of {self.count} jobs are already done")

    def advance(self) -> bool:
        """Collect what ended and start what may; False when nothing runs and nothing can start."""
        for run in [run for run in self.running if run.process.poll() is not None]:
            self.running.remove(run)
            self._collect(run)
        ready = [] if self.has_failed else [job for job in self.waiting if set(job.after) <= self.done]
        for job in ready:
            if len(self.running) < self.slots:
                self._try(job)
        return bool(self.running) or (bool(self._held) and not self.has_failed)

    def _try(self, job: Job) -> None:
        lock = _lock(self.log_dir / f"{job.name}.lock")
        if lock is None:
            if job.name not in self._held:
                say(f"{job.name}: an earlier run of this program still works on it; waiting for it")
            self._held.add(job.name)
            return
        try:
            self.waiting.remove(job)
            if job.name in self._held and job.is_done():
                self.done.add(job.name)
                say(f"{job.name}: done by the earlier run")
            else:
                self.running.append(_start(job, self.log_dir, lock))
            self._held.discard(job.name)
        finally:
            os.close(lock)  # the command has it now

    def progress_line(self) -> str:
        """What is done and running, and the time left."""
        so_far = self._so_far()
        parts = [f"{r.job.name} {r.units_done}/{r.job.units} {r.job.unit}" for r in self.running]
        return f"{so_far}; running: {', '.join(parts)}"

    def _so_far(self) -> str:
        for run in self.running:
            run.look()
        left = self._outlook.seconds_left(self.waiting, self.running, self.slots)
        return f"{len(self.done)} of {self.count} jobs done, about {duration(left)} left"

    def _collect(self, run: Running) -> None:
        if run.process.returncode != 0 or not run.job.is_done():
            lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            head = f"FAILED {run.job.name}: exit code {run.process.returncode}, see {run.log}:"
            print("\n    ".join([head, *lines]), file=sys.stderr, flush=True)
            self.has_failed = True
            return
        self._outlook.note(run)
        self.done.add(run.job.name)
        if not run.units_before:  # the last part of a job is not its duration
            write_text(self.log_dir / f"{run.job.name}.seconds", f"{run.elapsed:.1f}\n")
        say(f"{run.job.name}: done in {duration(run.elapsed)}{_outcome(run.job)}; {self._so_far()}")


def _lock(path: Path) -> int | None:
    """Descriptor of the locked file; None when another process holds the lock. On Windows nothing is locked."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ModuleNotFoundError:
        pass
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _start(job: Job, log_dir: Path, lock: int) -> Running:
    before = job.units_done()
    command = [*job.command, *(job.resume if before else [])]
    log = log_dir / f"{job.name}.log"
    write_text(log_dir / f"{job.name}.command", job.portable_command + "\n")
    say(f"{job.name}: {'goes on' if before else 'starts'}, log {log}")
    with log.open("a" if before else "w", encoding="utf-8") as stream:
        # A session of its own: Ctrl-C reaches this program alone, which then asks the command to save and end.
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
            start_new_session=True,
            # A program outlives a driver that is killed. It keeps the lock, so that no second one is started beside it.
            pass_fds=(lock,) if os.name == "posix" else (),
        )
    return Running(job, process, log, units_before=before)


def check_commands(jobs: Sequence[Job], log_dir: Path) -> None:
    """UsageError for the first job that was begun with other flags, which are named."""
    for job in jobs:
        file = log_dir / f"{job.name}.command"
        begun = file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else job.portable_command
        if begun != job.portable_command:
            raise UsageError(
                f"{file}: {job.name} was begun with other settings: found {_difference(begun, job.portable_command)}, "
                f"expected {_difference(job.portable_command, begun)}; name another --work_dir, or delete this one"
            )


def _difference(command: str, other: str) -> str:
    """The words of a command line that another one has not, each with the flag before it."""
    words, others = command.split(), set(other.split())
    new = [i for i, word in enumerate(words) if word not in others]
    kept = sorted({i - 1 for i in new if i and words[i - 1].startswith("--")} | set(new))
    return " ".join(words[i] for i in kept) or "nothing else"


def _outcome(job: Job) -> str:
    if job.result.name != "results.json":
        return ""
    overall = (_object(job.result.read_text(encoding="utf-8")) or {}).get("overall")
    return f", {overall['successes']} of {overall['trials']} episodes succeed" if overall else ""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end the program in one line, after its commands."""

    def interrupt(number: int, _frame: object) -> None:
        say("asked to stop: the running jobs save and end; the same command continues")
        raise SystemExit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
