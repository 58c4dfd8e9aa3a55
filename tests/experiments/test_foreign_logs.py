"""Logs of other programs and consoles: numbers with units, several runs in one file, terminals of any kind."""

import json
import subprocess
import sys

import pytest

from craft_experiments.common_utils.log_figures import read_count, read_rate
from craft_experiments.common_utils.log_parser import (
    LogFormatError,
    extract_success_rate_from_log,
    parse_all_results,
    parse_eval_log,
    parse_eval_runs,
)

TASKS = {"open the drawer": [1, 0, 1, 1], "push the plate": [0, 1, 1, 1], "close the lid": [1, 1, 0, 0]}
SEQUENCE = [outcome for outcomes in TASKS.values() for outcome in outcomes]
RATE = sum(SEQUENCE) / len(SEQUENCE)


def messages(tasks=TASKS, suite="libero_goal", final=True):
    lines, done = ([f"Task suite: {suite}"] if suite else []), []
    for task, outcomes in tasks.items():
        for number, outcome in enumerate(outcomes, start=1):
            done.append(outcome)
            lines += ["", f"Task: {task}", f"Starting episode {number}...", f"Success: {bool(outcome)}"]
            lines += [f"# episodes completed so far: {len(done)}"]
            lines += [f"# successes: {sum(done)} ({sum(done) / len(done) * 100:.1f}%)"]
        lines += [f"Current task success rate: {sum(outcomes) / len(outcomes)}"]
        lines += [f"Current total success rate: {sum(done) / len(done)}"]
    rate = sum(done) / len(done)
    end = ["Final results:", f"Total episodes: {len(done)}", f"Total successes: {sum(done)}"]
    return lines + ([*end, f"Overall success rate: {rate:.4f} ({rate * 100:.1f}%)"] if final else [])


@pytest.fixture
def log(tmp_path):
    def write(lines):
        path = tmp_path / "eval.log"
        text = lines if isinstance(lines, (str, bytes)) else "\n".join(lines) + "\n"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def rate_of(path):
    command = [sys.executable, "-m", "craft_experiments.common_utils.log_parser", "rate", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def is_the_run(run):
    return (
        run.complete and run.success_sequence == SEQUENCE and run.overall_success_rate == pytest.approx(RATE, abs=1e-4)
    )


# --- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.8333", 0.8333),
        ("0.4 %", 0.004),
        ("7%", 0.07),
        ("100%", 1.0),
        ("64.5 percent", 0.645),
        ("64,5 %", 0.645),
        ("0,645", 0.645),
        ("3/400", 0.0075),
        ("3 / 400 (0.75%)", 0.0075),
        ("3 of 400", 0.0075),
        ("9 out of 12 = 75 %", 0.75),
        ("75.0% (9/12)", 0.75),
        ("0.7500 (75.0%)", 0.75),
        ("0.7500(75.0%)", 0.75),
        ("**75.0%**", 0.75),
        ("0.75 (95% CI 0.43-0.94)", 0.75),
        ("0.75 (12 episodes)", 0.75),
        ("7.5e-3", 0.0075),
        ("0.75.", 0.75),
        ("1", 1.0),
    ],
)
def test_a_rate_is_read_with_its_unit(text, value):
    assert read_rate(text).value == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    "text",
    ["85.0", "101%", "-0.5", "nan", "N/A", "", "13/12", "0/0", "1.234,5", "1,234", "0.8.3", "0.85x", "2025/09/01"]
    + ["0.5 (0.5%)", "0.8 +- 0.1 %", "0.8 / 100", "0.5100%|####|", "75% (8/12)", "0.75 80%", "1e999", "\u0663"],
)
def test_a_number_that_is_no_rate_or_two_is_refused(text):
    with pytest.raises(ValueError, match="found "):
        read_rate(text)


@pytest.mark.parametrize(("text", "count"), [("500", 500), ("12.0", 12), ("9/12 (75%)", 9), ("12 episodes", 12)])
def test_a_count_is_a_whole_number(text, count):
    assert read_count(text) == count


@pytest.mark.parametrize("text", ["1,000", "1.000", "75%", "12.5", "", "many", "9" * 19])
def test_a_count_with_separators_or_a_unit_is_refused(text):
    with pytest.raises(ValueError, match="found "):
        read_count(text)


@pytest.mark.parametrize(
    "stated", ["66.7%", "66.67 %", "67%", "0.67", "0.667", "8/12", "8 of 12 (66.7%)", "66,7 %", "0,6667 (66,7 %)"]
)
def test_the_final_rate_has_the_decimals_it_has(log, stated):
    path = log([line if "Overall" not in line else f"Overall success rate: {stated}" for line in messages()])
    assert parse_eval_log(path).overall_success_rate == read_rate(stated).value


@pytest.mark.parametrize("stated", ["66.6%", "0.66", "0.6", "7/12", "68%", "0.6667%", "1"])
def test_a_final_rate_beyond_its_decimals_contradicts_the_episodes(log, stated):
    path = log([line if "Overall" not in line else f"Overall success rate: {stated}" for line in messages()])
    with pytest.raises(LogFormatError, match=r"eval.log: Overall success rate: found .* lines give 0\.6666"):
        parse_eval_log(path)


@pytest.mark.parametrize("name", ["Overall success rate (%)", "Overall Success Rate [in %]", "Total success rate (%)"])
def test_the_unit_may_stand_in_the_name(log, name):
    assert parse_eval_log(log([f"{name}: 0.8"])).overall_success_rate == pytest.approx(0.008)


@pytest.mark.parametrize("name", ["Current task", "Current total", "Overall"])
@pytest.mark.parametrize("value", ["lost", "75", "0.75 %%", "0.1%"])
def test_every_rate_is_read_or_refused(log, name, value):
    lines = ["Success: True", f"{name} success rate: {value}"]
    with pytest.raises(LogFormatError, match=f"{name} success rate"):
        parse_eval_log(log(lines))


def test_task_rates_may_be_percentages_or_fractions(log):
    text = "\n".join(messages()).replace("rate: 0.75", "rate: 75.0%").replace("rate: 0.5\n", "rate: 2 of 4\n")
    assert [task.success_rate for task in parse_eval_log(log(text)).tasks] == [0.75, 0.75, 0.5]


def test_result_lists_have_units_too(tmp_path):
    path = tmp_path / "list"
    path.write_text("libero_goal: 0.8%\nlibero_10: 17/20 (85.0%)\nlibero_object: 0.9\n", encoding="utf-16")
    assert parse_all_results(path) == {"libero_goal": 0.008, "libero_10": 0.85, "libero_object": 0.9}
    path.write_text("libero_goal: 85.0\n")
    with pytest.raises(LogFormatError, match="line 1: found '85.0'"):
        parse_all_results(path)


# --- runs


OTHER = {"open the drawer": [0, 0, 0, 1], "push the plate": [0, 1, 1, 1], "close the lid": [1, 1, 0, 0]}
CUT = messages(OTHER)[:20]


@pytest.mark.parametrize("suite", ["libero_goal", None], ids=["with suite line", "counter alone"])
@pytest.mark.parametrize(
    ("parts", "taken"),
    [("other this", 2), ("cut this", 2), ("this cut", 1), ("cut this cut", 2), ("cut cut this", 3)],
)
def test_of_several_runs_the_last_complete_one_counts(log, parts, taken, suite):
    runs = {"this": messages(suite=suite), "other": messages(OTHER, suite), "cut": messages(OTHER, suite)[:20]}
    path = log([line for part in parts.split() for line in runs[part]])
    run = parse_eval_log(path)
    assert is_the_run(run)
    assert f"{len(parts.split())} runs in the file; the last complete one: run {taken}," in " ".join(run.notes)
    code, out, err = rate_of(path)
    assert (code, out) == (0, "0.6667\n") and "last complete" in err


def test_runs_that_were_all_cut_have_no_rate(log):
    code, out, err = rate_of(log(CUT + CUT))
    assert (code, out) == (3, "") and "2 runs in the file" in err and "incomplete" in err


def test_runs_of_two_suites_are_both_listed(log):
    path = log(messages() + messages(OTHER, "libero_10") + messages(OTHER))
    assert rate_of(path)[:2] == (0, "libero_goal: 0.5000\nlibero_10: 0.5000\n")
    with pytest.raises(LogFormatError, match="2 suites"):
        extract_success_rate_from_log(path)
    path = log(messages() + messages(OTHER, "libero_10")[:20])
    code, out, err = rate_of(path)
    assert (code, out) == (3, "libero_goal: 0.6667\n") and "libero_10: incomplete" in err


def test_a_run_that_goes_on_counting_is_one_run(log):
    whole = messages()
    at = whole.index("# episodes completed so far: 5")
    cut = at + 2  # behind "# successes"
    run = parse_eval_log(log(whole[:cut] + ["Task suite: libero_goal"] + whole[cut:]))
    assert is_the_run(run) and run.notes == []


@pytest.mark.parametrize("prefix", ["", "2025-01-01 10:00:00 [INFO] "])
def test_lines_that_two_handlers_wrote_count_once(log, prefix):
    run = parse_eval_log(log([text for line in messages() for text in (prefix + line, line)]))
    assert is_the_run(run) and run.notes == ["every line stands twice; one of each was read"]


@pytest.mark.parametrize("lost", ["Success: True", "Success: False", "# episodes completed so far: 1"])
def test_lost_and_repeated_lines_are_noticed(log, lost):
    lines = messages()
    place = lines.index(lost)
    if lost.startswith("Success"):
        with pytest.raises(LogFormatError, match="the episode lines give"):
            parse_eval_log(log(lines[:place] + lines[place + 1 :]))
    with pytest.raises(LogFormatError, match="the episode lines give"):
        parse_eval_log(log(lines[: place + 1] + lines[place:]))


def test_two_runs_mixed_line_by_line_are_refused(log):
    mixed = [line for pair in zip(messages(), messages(OTHER), strict=True) for line in pair]
    with pytest.raises(LogFormatError):
        parse_eval_log(log(mixed))


def test_a_lost_beginning_is_said(log):
    lines = messages()
    run = parse_eval_log(log(lines[lines.index("# successes: 1 (50.0%)") + 1 :]))
    assert (run.complete, run.total_episodes, run.overall_success_rate) == (True, 12, 0.6667)
    assert run.success_sequence == SEQUENCE[2:] and run.notes == ["the first 2 episodes are not in the file"]


# --- completeness


def test_without_a_final_line_the_ended_tasks_count(log):
    path = log(messages(final=False))
    code, out, err = rate_of(path)
    assert (code, out) == (0, "0.6667\n")
    assert "no final line; counted 12 episodes of 3 tasks, all ended (libero_goal has 10)" in err
    assert extract_success_rate_from_log(path) is None  # what a program of ours did not finish has no rate
    ten = {f"task {i}": [1, 0] for i in range(10)}
    assert parse_eval_log(log(messages(ten, final=False))).complete


@pytest.mark.parametrize(
    "end", ["Traceback (most recent call last):", "slurmstepd: error: *** CANCELLED ***", "Killed", "Success: True"]
)
def test_without_a_final_line_a_crash_or_an_open_task_is_incomplete(log, end):
    code, out, err = rate_of(log([*messages(final=False), "x", end]))
    assert (code, out) == (3, "") and "incomplete" in err


def test_exceptions_that_python_ignores_are_no_crash(log):
    end = ["Exception ignored in: <function __del__>", "Traceback (most recent call last):", "  x"]
    assert parse_eval_log(log([*messages(final=False), *end])).ended_evenly


def test_tasks_of_unequal_length_did_not_all_end(log):
    tasks = TASKS | {"close the lid": [1]}
    assert not parse_eval_log(log(messages(tasks, final=False))).ended_evenly


def test_a_final_line_does_not_complete_a_task_that_did_not_end(log):
    lines = messages()
    lines = lines[: lines.index("# episodes completed so far: 10")]
    path = log([*lines, f"Overall success rate: {sum(SEQUENCE[:10])}/10"])
    assert not parse_eval_log(path).complete and extract_success_rate_from_log(path) is None
    assert rate_of(path)[:2] == (3, "")


def test_an_overall_rate_after_every_task_is_no_final_line(log):
    lines, done = [], []
    for line in messages(final=False):
        done += [line == "Success: True"] if line.startswith("Success") else []
        lines.append(line)
        if line.startswith("Current total"):
            lines.append(f"Overall success rate: {sum(done) / len(done):.2f}")
    whole, cut = parse_eval_log(log(lines)), parse_eval_log(log(lines[: lines.index("# episodes completed so far: 6")]))
    assert (whole.has_final_line, whole.ended_evenly, whole.overall_success_rate) == (False, True, RATE)
    assert (cut.complete, cut.ended_evenly) == (False, False)


@pytest.mark.parametrize("content", [b"", b"some text\n", b"Task: buy milk\n", bytes(range(256)) * 9, b'{"rate": 0.5}'])
def test_a_file_that_is_no_evaluation_log_is_said_to_be_none(log, content):
    path = log(content)
    with pytest.raises(LogFormatError, match="found no line of an evaluation log"):
        parse_eval_runs(path)
    assert rate_of(path)[:2] == (2, "")


def test_a_folder_is_said_to_be_one(tmp_path):
    with pytest.raises(LogFormatError, match="found a folder"):
        parse_eval_log(tmp_path)


# --- consoles


TEXT = "\n".join(messages()) + "\n"
MIDDLE = TEXT.index("Task: push")
BAR = "\r 50%|#####     | 6/12 [00:10<00:10,  1.00it/s]"


@pytest.mark.parametrize(
    "content",
    {
        "utf-16-le": TEXT.encode("utf-16-le"),
        "utf-16-be": TEXT.encode("utf-16-be"),
        "utf-16": TEXT.encode("utf-16"),
        "utf-16 cut in a character": TEXT.encode("utf-16-le") + b"1",
        "utf-16 behind utf-8": TEXT[:MIDDLE].encode() + TEXT[MIDDLE:].encode("utf-16-le"),
        "utf-8 behind utf-16": TEXT[:MIDDLE].encode("utf-16") + TEXT[MIDDLE:].encode(),
        "utf-8 with mark": TEXT.encode("utf-8-sig"),
        "utf-8 cut in a character": (TEXT + "\u2588").encode()[:-1],
        "NUL characters": b"\0" * 512 + TEXT.replace("Final", "\0Final").encode(),
        "carriage returns": TEXT.replace("\n", "\r\r\n").encode(),
        "progress bars": TEXT.replace("Success: ", f"{BAR}Success: {BAR}\n").encode(),
        "bar behind the name": TEXT.replace("rate: ", f"rate: {BAR} ").encode(),
        "hyperlinks": TEXT.replace("Success", "\x1b]8;id=1;file:///a.py#7\x1b\\Success\x1b]8;;\x1b\\").encode(),
        "links ended by a bell": TEXT.replace("rate", "\x1b]8;;http://a\x07rate\x1b]8;;\x07").encode(),
        "title and cut link": ("\x1b]0;title 0.5%\x07" + TEXT + "\x1b]8;;http").encode(),
        "colours in words": TEXT.replace("rate: 0", "ra\x1b[1;36mte: \x1b[0m0").replace("0%", "0\x1b[1m%").encode(),
        "two-character escapes": TEXT.replace("Success", "\x1b7\x1b(B\x1b=Success\x1b>").encode(),
        "a lone escape": TEXT.replace("Overall", "\x1bOverall").encode(),
        "erased ends": TEXT.replace("rate:", "rate:\x1b[K").replace("\n", "\x1b[0K\n").encode(),
        "blanks as movements": TEXT.replace(" ", "\x1b[1C").encode(),
    }.items(),
    ids=lambda item: item[0],
)
def test_encodings_and_escapes_change_nothing(log, content):
    assert is_the_run(parse_eval_log(log(content[1])))


@pytest.mark.parametrize("width", [40, 61, 80])
@pytest.mark.parametrize("prefix", ["", "2025-09-01 18:26:41,123 [INFO] "])
def test_lines_that_a_terminal_broke_at_its_last_column(log, width, prefix):
    lines = [prefix + line for line in messages()]
    rows = [line[at : at + width] for line in lines for at in range(0, max(1, len(line)), width)]
    assert is_the_run(parse_eval_log(log(rows)))


def rich_rows(message, width, time_rows, source):
    """As Rich prints it: words are wrapped, longer ones broken; a time too long for its column goes on below."""
    rows = [""]
    for word in f"| >> {message}".split(" "):
        if len(rows[-1]) + len(word) <= width:
            rows[-1] += word + " "
        else:
            rows += [word[at : at + width] for at in range(0, len(word), width)] or [""]
            rows[-1] += " "
    rows = [row.rstrip()[:width] for row in rows]
    rows += [""] * (len(time_rows) - len(rows))
    left = [f"{time:<16} " for time in time_rows] + [" " * 17] * len(rows)
    heads = ["INFO     "] + [" " * 9] * len(rows)
    ends = [source] + [" " * len(source)] * len(rows)
    return [f"{a}{b}{row:<{width}} {end}" for a, b, row, end in zip(left, heads, rows, ends, strict=False)]


@pytest.mark.parametrize("stripped", [False, True])
@pytest.mark.parametrize(
    "source", ["run_libero_eval.py:226", "run_libero_ev\u2026", "\x1b]8;;f\x1b\\a.py\x1b]8;;\x1b\\:7"]
)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 12, 14, 34])
def test_rich_columns_of_any_width(log, width, source, stripped):
    rows = []
    for number, line in enumerate(messages()):
        rows += rich_rows(line, width, ["11/29", "[02:59:36]"] if number % 5 == 0 else [], source)
    assert is_the_run(parse_eval_log(log([row.rstrip() if stripped else row for row in rows])))


def test_episodes_prints_every_suite(log):
    path = log(messages() + messages(OTHER, "libero_10"))
    command = [sys.executable, "-m", "craft_experiments.common_utils.log_parser", "episodes", str(path)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [run["task_suite"] for run in found] == ["libero_goal", "libero_10"]
