"""`craft-watch`: what it reads of a run that is being written, and pages that fit every terminal."""

import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import micro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismatic.models.presets import PRESETS
from prismatic.output_folder import held
from prismatic.programs import watch as program
from prismatic.training.watch_page import ASCII, BLOCKS, Screen, page
from prismatic.training.watched_run import MetricsTail, RunView, WatchedRun

ROOT = Path(__file__).parents[2]


def row(step: int, **metrics) -> dict:
    named = {name.replace("__", "/").replace("_", " "): value for name, value in metrics.items()}
    return {"step": step, "VLA Train/Loss": 1 / step, "samples_seen": 8 * step, "samples_per_second": 4.0} | named


def write(folder: Path, rows, flags=None, end: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    if flags is not None:
        (folder / "flags.json").write_text(json.dumps(flags) + "\n")
    return folder


def text(folder: Path, width: int = 80) -> str:
    return "\n".join(page(WatchedRun(folder).look(), Screen(width)))


CRAFT = {"max_steps": 40, "retention_method": "craft", "craft_retention_budget": 0.02}


def test_a_running_run_with_a_budget(tmp_path):
    rows = [row(n, CRaFT__Retention_Loss=0.001 * n, CRaFT__Share=1.5, CRaFT__Lambda=7.0, CRaFT__Out_Of_Reach=0.0)
            for n in range(1, 21)]  # fmt: skip
    folder = write(tmp_path / "run", rows, CRAFT)
    (tmp_path / "run--20_chkpt").mkdir()
    with held(folder, "--x"):
        shown = text(folder)
    assert shown.startswith("run (running)\n") and re.search(r"step +20 of 40\n +\[#+\.+\] 50%", shown)
    # 20 steps of 8 samples at 4 samples a second.
    assert re.search(r"time left +about 40 s", shown)
    # The mean of the last tenth: (0.019 + 0.020) / 2, against 0.02.
    assert re.search(r"drift +0\.0195 ", shown) and re.search(r"of budget +\[#+\.*\] 98% of 0\.02", shown)
    assert re.search(r"share +1\.5\b", shown) and "lambda" not in shown and re.search(r"out of reach +no", shown)
    assert re.search(r"checkpoint +step 20: run--20_chkpt", shown) and "last line" in shown


def test_a_plain_run_and_a_dual_without_share(tmp_path):
    assert "drift" not in text(write(tmp_path / "plain", [row(1)], {"max_steps": 4, "retention_method": "none"}))
    rows = [row(1, CRaFT__Retention_Loss=0.5, CRaFT__Lambda=3.25, CRaFT__Out_Of_Reach=1.0, VLA_Val__Loss=0.25)]
    shown = text(write(tmp_path / "run", rows, CRAFT | {"craft_retention_budget": "inf"}))
    assert re.search(r"lambda +3\.25", shown) and "of budget" not in shown and "YES" in shown
    assert re.search(r"val loss +0\.25 at step 1\n", shown)


def test_finished_stopped_and_unknown(tmp_path):
    rows = [row(n) for n in (1, 2, 3)]
    assert text(write(tmp_path / "a", rows, {"max_steps": 3})).startswith("a (finished)")
    stopped = text(write(tmp_path / "b", rows, {"max_steps": 4}))
    assert stopped.startswith("b (stopped)") and "--resume auto" in stopped and "time left" not in stopped
    assert text(write(tmp_path / "c", rows)).startswith("c (ended)")


def test_flags_of_the_newest_checkpoint_serve_where_the_run_has_none(tmp_path):
    folder = write(tmp_path / "run", [row(2)])
    for step in (2, 10):
        (tmp_path / f"run--{step}_chkpt").mkdir()
        (tmp_path / f"run--{step}_chkpt" / "craft_checkpoint.json").write_text(
            json.dumps({"training": {"max_steps": step}}) + "\n"
        )
    assert WatchedRun(folder).look().total == 10


def test_the_steps_of_a_resumed_run_count_once_and_the_later_ones(tmp_path):
    lines = [row(n, value=1.0) for n in (1, 2, 3, 4)] + [row(n, value=2.0) for n in (3, 5)]
    tail = MetricsTail(write(tmp_path, lines) / "metrics.jsonl")
    tail.read()
    assert [(row["step"], row["value"]) for row in tail.rows] == [(1, 1), (2, 1), (3, 2), (5, 2)]


def test_a_file_that_is_written_cut_and_replaced(tmp_path):
    file, tail = tmp_path / "metrics.jsonl", MetricsTail(tmp_path / "metrics.jsonl")
    steps = lambda: tail.read() or [row["step"] for row in tail.rows]  # noqa: E731
    assert steps() == [] and tail.written is None
    write(tmp_path, [row(1)], end='{"step": 2, "lo')
    assert steps() == [1] and tail.unreadable == 0
    with file.open("a") as stream:
        stream.write('ss": 0.5}\n' + json.dumps(row(3)) + "\nno row\n")
    assert steps() == [1, 2, 3] and tail.unreadable == 1 and steps() == [1, 2, 3]
    file.write_text(json.dumps(row(7)) + "\n")  # shorter
    assert steps() == [7] and tail.unreadable == 0
    (tmp_path / "new").write_text("".join(json.dumps(row(n)) + "\n" for n in range(1, 9)))
    (tmp_path / "new").replace(file)  # longer, but another file
    assert steps() == list(range(1, 9))
    file.unlink()
    assert steps() == []


@given(cuts=st.lists(st.integers(1, 400), max_size=6))
def test_wherever_a_reading_ends_the_next_one_goes_on(tmp_path_factory, cuts):
    whole = "".join(json.dumps(row(n)) + "\n" for n in range(1, 6)).encode()
    tail = MetricsTail(tmp_path_factory.mktemp("run") / "metrics.jsonl")
    for cut in sorted({*cuts, len(whole)}):
        tail.path.write_bytes(whole[:cut]) if cut < 2 else tail.path.open("ab").write(
            whole[tail.path.stat().st_size if tail.path.exists() else 0 : cut]
        )
        tail.read()
    assert [row["step"] for row in tail.rows] == [1, 2, 3, 4, 5] and tail.unreadable == 0


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path):
    rows = [row(n, VLA_Train__Loss=math.nan if n == 4 else math.inf if n == 5 else 0.5) for n in range(1, 21)]
    shown = text(write(tmp_path / "run", rows, {"max_steps": 40}))
    assert re.search(r"loss +0\.5 \(2 of 20 not finite\)", shown)
    rows = [row(1, VLA_Train__Loss=math.nan)]
    assert re.search(r"loss +nan \(1 of 1 not finite\)", text(write(tmp_path / "other", rows, {"max_steps": 4})))


def test_an_empty_file_and_one_that_is_not_there_yet(tmp_path):
    assert "none is logged yet" in text(write(tmp_path / "run", []))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "flags.json").write_text('{"max_steps": 4}\n')
    assert "none is logged yet" in text(tmp_path / "run")


number = st.floats() | st.sampled_from([0.0, 1e308, -1e308, 5e-324])
views = st.builds(
    lambda name, rows, flags, width: (
        RunView(name, [{"step": float(n), **row} for n, row in enumerate(rows, 1)], flags, (3, Path(name)), True, 1e9),
        width,
    ),
    name=st.text(min_size=1),
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(
                ["VLA Train/Loss", "VLA Val/Loss", "CRaFT/Retention Loss", "CRaFT/Share", "CRaFT/Probe/\x1b[2J"]
                + [
                    "CRaFT/Out Of Reach",
                    "samples_seen",
                    "samples_per_second",
                    "Memory/Peak GiB",
                    "Time/Data Wait Share",
                ]
            ),
            number,
        ),
        max_size=8,
    ),
    flags=st.fixed_dictionaries(
        {"max_steps": st.integers(-1, 9) | st.none() | st.text(), "craft_retention_budget": number | st.text()}
        | {"retention_method": st.just("craft")}
    ),
    width=st.integers(0, 300),
)


@given(views)
def test_no_page_is_wider_than_its_screen_or_holds_what_a_terminal_obeys(drawn):
    run, width = drawn
    for marks in (ASCII, BLOCKS):
        lines = page(run, Screen(width, marks))
        assert max(map(len, lines)) <= max(width, 1) and not any(
            ord(letter) < 32 or ord(letter) == 127 for line in lines for letter in line
        )
        assert marks is BLOCKS or "".join(lines).isascii()


def test_the_curve_rises_and_falls_as_the_values():
    run = RunView("run", [row(n, CRaFT__Share=float(n)) for n in range(1, 9)], {}, None, False, None)
    lines = dict(line.split(maxsplit=1) for line in page(run, Screen(80, BLOCKS)) if line.startswith(("loss", "share")))
    assert lines["share"].split()[1] == "▁▂▃▄▅▆▇█" and lines["loss"].split()[1][0] == "█"
    assert lines["loss"].split()[1][-1] == "▁"


@pytest.mark.parametrize("width", [40, 80])
def test_every_number_of_a_real_run_is_readable_in_40_columns(make_trainer, monkeypatch, width):
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)
    trainer = make_trainer(
        "run", use_craft=True, craft_preset="budget", max_steps=4, use_val_set=True, val_fraction=0.4
    )
    trainer.fit()
    shown = text(trainer.setup.run_dir, width)
    assert ".." not in shown and shown.startswith("run (finished)")
    for label in ("step", "loss", "val loss", "drift", "of budget", "lambda", "speed", "checkpoint"):
        assert re.search(rf"^{label} +\S", shown, re.MULTILINE), (label, shown)
    assert f"of {trainer.cfg.craft_retention_budget:g}" in shown and "peak" in shown and "run--4_chkpt" in shown


# ------------------------------------------------------------------------------------------------------- the program


def run(*words, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "prismatic.programs.watch", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_a_pipe_gets_one_page_of_ascii(tmp_path):
    folder = write(tmp_path / "b\u00f6wl", [row(1), row(2)], {"max_steps": 4})
    done = run(folder)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.isascii() and "\x1b" not in done.stdout
    assert done.stdout.count("step ") == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: root / "no" / "such", "does not exist"),
        (lambda root: root / "run--3_chkpt", "name .*/run"),
        (lambda root: root, "it holds runs, such as .*/run"),
        (lambda root: root / "run" / "metrics.jsonl", "is a file, .*name .*/run"),
        (lambda root: root / ("x" * 400), "name too long"),
    ],
)
def test_another_folder_is_one_line_and_code_2(tmp_path, capsys, make, words):
    write(tmp_path / "run", [row(1)])
    (tmp_path / "run--3_chkpt").mkdir()
    with pytest.raises(SystemExit) as end:
        program.main([str(make(tmp_path))])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1 and re.search(words, err)


class Terminal:
    """Of 40 columns and 12 lines, in place of a stream."""

    encoding = "utf-8"

    def __init__(self):
        self.written = []

    def isatty(self):
        return True

    def write(self, text):
        self.written.append(text)

    def flush(self):
        pass


def test_a_terminal_is_drawn_over_until_the_run_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(program.shutil, "get_terminal_size", lambda default: os.terminal_size((40, 12)))
    folder, terminal = write(tmp_path / "run", [row(1)], {"max_steps": 3}), Terminal()
    waits = []

    def next_step(seconds):
        waits.append(seconds)
        write(folder, [row(n) for n in range(1, 2 + len(waits))])

    with held(folder, "--x"):
        program.watch(WatchedRun(folder), terminal, next_step)
    first, second, third = terminal.written
    assert waits == [2.0, 2.0] and "step         3 of 3" in third and "(finished)" in third
    assert second.startswith(f"\x1b[{first.count(chr(10))}F\x1b[J")
    assert all(page.count("\n") < 12 and max(map(len, page[8:].splitlines())) <= 40 for page in terminal.written)


def test_control_c_on_a_terminal_of_no_known_size_ends_with_0(tmp_path):
    folder = write(tmp_path / "run", [row(1)], {"max_steps": 3})
    screen, stream = pty.openpty()  # says 0 columns
    command = [sys.executable, "-m", "prismatic.programs.watch", str(folder)]
    with held(folder, "--x"):
        other = subprocess.Popen(
            command, cwd=ROOT, stdout=stream, stderr=subprocess.PIPE, env=os.environ | {"TERM": "xterm"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a script's background
        )  # fmt: skip
        shown = b""
        while b"checkpoint" not in shown:
            shown += os.read(screen, 4096)
        time.sleep(0.1)
        other.send_signal(signal.SIGINT)
        assert other.wait(60) == 0 and other.stderr.read() == b""
    assert b"(running)" in shown
    os.close(screen), os.close(stream)


def test_no_torch_is_loaded(tmp_path):
    folder = write(tmp_path / "run", [row(1)], CRAFT)
    code = (
        f"import sys; from prismatic.programs.watch import main; main([{str(folder)!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
