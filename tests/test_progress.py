"""Progress: whole lines in a pipe, a bar that fits and ends at its total on a terminal; times left are no nonsense."""

import math
import os
import pty
import re
import select
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismatic import progress as module
from prismatic.progress import Progress, duration, over

ROOT = Path(__file__).parents[1]
PROGRAM = """
from prismatic import progress
progress.FIRST_S = progress.SHARE = 0.0
for step in progress.over(range(30), "fine-tuning", "steps"):
    if step % 10 == 0:
        progress.say(f"step {step}")
with progress.Progress(3, "merging", "steps", note="reads the base") as merging:
    for note in ("writes the merged model and compares it with the adapted one", "hashes", ""):
        merging.advance(note=note)
with progress.Progress(5_000_000_000, "hashing", "B", leave=False) as hashing:
    hashing.advance(1_234_567_890)
"""
CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def command() -> list[str]:
    return [sys.executable, "-c", PROGRAM]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "COLUMNS")}
    return kept | {"PYTHONPATH": str(ROOT)} | more


def on_a_terminal(**more: str) -> str:
    """All that the program writes when both its streams are a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command(), stdout=theirs, stderr=theirs, stdin=theirs, env=environment(**more))
    os.close(theirs)
    written = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait(60) == 0
    return written.decode()


@pytest.mark.parametrize("columns", ["", "40", "200"])
def test_on_a_terminal_a_bar_fits_and_ends_at_its_total(columns):
    written = on_a_terminal(**({"COLUMNS": columns} if columns else {}))
    states = [CONTROL.sub("", part).strip() for part in re.split(r"[\r\n]", written)]
    assert max(map(len, states)) <= int(columns or 80)
    bars = [state for state in states if state.startswith("fine-tuning")]
    assert bars[-1].startswith("fine-tuning: 100% 00:00 left, 30/30 st") and " left, 0/30" in bars[0]
    assert [state for state in states if state.startswith("merging")][-1].startswith(
        "merging: 100% 00:00 left, 3/3 steps"
    )
    # Lines between the states of a bar are whole, and a bar that does not stay is wiped out.
    assert [state for state in states if re.match(r"step \d", state)] == ["step 0", "step 10", "step 20"]
    assert any(state.startswith("hashing:  25%") for state in states) and states[-2].strip() == ""


def test_in_a_pipe_every_line_is_whole():
    done = subprocess.run(command(), capture_output=True, env=environment(), check=True)
    for stream in (done.stdout, done.stderr):
        assert b"\r" not in stream and b"\x1b" not in stream and stream.endswith(b"\n")
    assert done.stdout.decode().splitlines() == ["step 0", "step 10", "step 20"]
    lines = done.stderr.decode().splitlines()
    assert lines[0].startswith("fine-tuning: 1 of 30 steps (3 %), about ") and lines[0].endswith(" left")
    assert lines.count("fine-tuning: 30 of 30 steps (100 %) in 0 s") == 1
    assert lines[-1].startswith("hashing: 1.23 GB of 5 GB (24 %), about ")
    assert any(line.endswith("; hashes") for line in lines)


def test_other_processes_of_a_run_and_a_closed_console_say_nothing():
    run = subprocess.run
    assert run(command(), capture_output=True, env=environment(RANK="1"), check=True).stderr == b""
    shell = ["bash", "-c", '"$@" >&- 2>&-', "bash", *command()]
    assert run(shell, env=environment(), check=False).returncode == 0


@given(
    total=st.integers(0, 10**12),
    done=st.integers(0, 10**12),
    counts=st.lists(st.integers(-5, 10**12), max_size=5),
    seconds=st.floats(0, 1e9),
)
def test_what_is_said_is_possible_whatever_is_counted(total, done, counts, seconds):
    lines: list[str] = []
    clock = (n * seconds for n in count())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.time, "monotonic", lambda: next(clock))
        patch.setattr(
            module.sys,
            "stderr",
            type(
                "Pipe",
                (),
                {"write": lambda _, text: lines.append(text), "flush": lambda _: None, "isatty": lambda _: False},
            )(),
        )
        with Progress(total, "counting", "things", done=done) as progress:
            for more in counts:
                before = progress.done
                progress.advance(more)
                assert before <= progress.done <= max(total, before)
    text = "".join(lines)
    assert "-" not in text and "nan" not in text and "inf" not in text
    assert ("(100 %)" in text) <= (progress.done == total > 0)


@given(st.floats(0, 1e12) | st.just(math.inf))
def test_durations_keep_their_size(seconds):
    sizes = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    said = duration(seconds)
    if said != "more than 1000 days":
        parts = re.findall(r"(\d+) (\w+)", said)
        smallest = sizes[parts[-1][1]]
        assert abs(sum(int(number) * sizes[unit] for number, unit in parts) - seconds) <= smallest
        assert all(int(number) < 60 for number, unit in parts if unit in ("s", "min"))
    else:
        assert seconds > 999 * 86400


def test_lines_become_rare(monkeypatch, capsys):
    """A run of a day says no more than a hundred and fifty lines."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    for _ in over(range(86400), "training", "steps"):
        now[0] += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert 20 < len(lines) < 150
    assert lines[0] == "training: 10 of 86,400 steps (0 %), about 23 h 59 min left"
    assert lines[-1] == "training: 86,400 of 86,400 steps (100 %) in 1 d 0 h"


def test_what_the_console_cannot_show_is_said_in_other_signs():
    program = "from prismatic.progress import over, say; say('r\u00f6t'); [*over([1], 'gr\u00fcn', 'x')]"
    program = program.replace("; [", "; import prismatic.progress as p; p.FIRST_S = 0; [")
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, env=environment(PYTHONIOENCODING="ascii"), check=True)
    assert done.stdout == rb"r\xf6t" + b"\n" and done.stderr.startswith(rb"gr\xfcn: 1 of 1 x (100 %)")


def test_nothing_else_draws_bars():
    rooms = ("prismatic", "experiments", "craft_experiments", "craft_vla", "benchmarks")
    files = [file for room in rooms for file in (ROOT / room).rglob("*.py")]
    draws = re.compile(r"^\s*(import|from) tqdm", re.M)
    drawing = [str(file.relative_to(ROOT)) for file in files if draws.search(file.read_text())]
    assert drawing == ["prismatic/progress.py"]
