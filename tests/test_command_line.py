"""Words of a command line become the values of a config, or one line that says what is wrong with them."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from enum import Enum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.robot.libero.eval_config import EvalConfig
from experiments.robot.libero.modes import RenderMode
from experiments.robot.libero.video import SaveVideos
from prismatic.command_line import (
    LARGEST,
    ForeignFlag,
    OneLineParser,
    Range,
    UsageError,
    bad_input_in_one_line,
    check_name,
    check_switches,
    check_values,
    flag,
    flag_like,
    given_flags,
    parse,
    require_package,
)


class Mode(str, Enum):
    SOFT = "soft"
    HARD = "hard"


@dataclass
class Config:
    text: str = ""
    note: str | None = flag(None, "a note", is_name=True)
    count: int = flag(3, "how many", at_least=1)
    batch_size: int = flag(1, "at once", at_least=1)
    share: float = flag(0.5, "of all", more_than=0, less_than=1)
    budget: float | None = flag(None, "or unlimited", more_than=0, infinite=True)
    on: bool = False
    resume: bool | str = False
    mode: Mode = Mode.SOFT
    kind: str = flag("a", "which", choices=("a", "b"))
    seeds: tuple[int, ...] = flag((0, 1), "of the runs", at_least=0)
    parts: tuple[str, ...] = flag((), "empty: all", choices=("head", "body"))


FOREIGN = {"old_text": ForeignFlag("use --text"), "head": ForeignFlag("there is one head", harmless=("l1",))}


@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",))))
def test_text_arrives_as_it_was_typed(word):
    if not word.startswith("--"):
        assert parse(Config, ["--text", word]).text == word
    assert parse(Config, [f"--text={word}"]).text == word


@pytest.mark.parametrize(
    "word", ["001", "12:30:45", "null", "on", "0x10", "a #b", "[x]", "20251109_12", "-1", "", "-h"]
)
def test_text_is_no_yaml(word):
    assert parse(Config, ["--text", word]).text == word


@given(st.integers(1, LARGEST), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_numbers_in_their_range(count, share):
    cfg = parse(Config, ["--count", str(count), "--share", repr(share)])
    assert (cfg.count, cfg.share) == (count, share)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "--count is 0, expected at least 1"),
        (["--count", "1.5"], "--count is '1.5', expected a whole number, at least 1"),
        (["--count", "1e30"], "--count is '1e30', expected a whole number"),
        (["--count", str(10**30)], "--count is 1000000000000000000000000000000, expected at most 2147483647"),
        (["--count", "9" * 5000], "expected a whole number, at least 1"),
        (["--count", "None"], "--count is 'None', expected a whole number"),
        (["--share", "nan"], "--share is nan, expected a finite number, more than 0 and less than 1"),
        (["--share", "1"], "--share is 1.0, expected more than 0 and less than 1"),
        (["--share", "abc"], "--share is 'abc', expected a number"),
        (["--share", ""], "--share is '', expected a number"),
        (["--budget", "nan"], "--budget is nan, expected more than 0"),
        (["--on", "maybe"], "--on is 'maybe', expected True or False"),
        (["--mode", "sotf"], "--mode is 'sotf', expected one of soft, hard; did you mean soft?"),
        (["--kind", "c"], "--kind is 'c', expected one of a, b"),
        (["--seeds", "0,b"], "--seeds is 'b', expected a whole number, at least 0, or several with commas between"),
        (["--seeds", "0,-1"], "--seeds is -1, expected at least 0"),
        (["--seeds", ""], "--seeds is '', expected a whole number"),
        (["--parts", "head,haed"], "--parts is 'haed', expected one of head, body; did you mean head?"),
        (["--note", "a/b"], "--note is 'a/b' with '/', expected a name, not a path"),
        (["--note", "a*?"], "--note is 'a*?' with '*' '?', expected a name, not a path or pattern"),
        (["--note", ".."], "--note is '..', expected a name"),
        (["--text", "a\0b"], "--text: found a NUL character"),
        (["--cuont", "1"], "--cuont: no such flag; did you mean --count?"),
        (["--bs", "1"], "--bs: no such flag; did you mean --batch_size?"),
        (["--co", "1"], "--co: no such flag"),
        (["--count"], "--count: found no value"),
        (["--text", "--count", "2"], "--text: found no value"),
        (["data", "#2"], "found 'data', expected --FLAG VALUE"),
        (["--old_text", "x"], "--old_text x is a flag of another code base: use --text"),
        (["--head", "diffusion"], "--head diffusion is a flag of another code base: there is one head"),
    ],
)
def test_what_cannot_be_used_is_named(words, message):
    with pytest.raises(UsageError) as error:
        parse(Config, words, FOREIGN)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_values_of_each_kind():
    cfg = parse(
        Config,
        ["--budget", "inf", "--on", "true", "--resume", "auto", "--mode", "HARD", "--note", "None", "--text", "None"],
    )
    assert (cfg.budget, cfg.on, cfg.resume, cfg.mode, cfg.note, cfg.text) == (
        math.inf, True, "auto", Mode.HARD, None, "None",
    )  # fmt: skip
    assert parse(Config, ["--resume", "True"]).resume is True
    assert (
        parse(Config, ["--seeds", "3, 4", "--parts", "body"]).seeds == (3, 4)
        and parse(Config, ["--parts="]).parts == ()
    )
    assert parse(Config, ["--count=2", "--count", "5"]).count == 5  # the last one counts
    assert parse(Config, []) == Config()


def test_a_harmless_flag_of_another_code_base_is_noted(capsys):
    assert parse(Config, ["--head", "L1"], FOREIGN) == Config()
    assert capsys.readouterr().err == "note: --head L1 changes nothing here: there is one head\n"


@dataclass
class Other:
    count: int = flag_like(Config, "count", 7)


@dataclass
class Undeclared:
    size: int | None = None


def test_a_range_is_declared_once_and_for_every_number():
    assert parse(Other, []).count == 7
    with pytest.raises(UsageError, match="--count is 0, expected at least 1"):
        parse(Other, ["--count", "0"])
    with pytest.raises(TypeError, match="Undeclared.size is a number without"):  # a mistake of the program
        parse(Undeclared, ["--help"])


def test_a_flag_without_its_switch_is_named_unless_it_is_off():
    cfg, switches = Config(on=False, budget=2.0), {"bud": (False, "--x"), "count": (True, "--y"), "on": (False, "--z")}
    check_switches(cfg, ["count", "on"], switches)
    with pytest.raises(UsageError, match="--budget 2.0 has no effect: it needs --x"):
        check_switches(cfg, ["on", "budget"], switches)
    assert given_flags(["--a-b", "1", "--c=2", "d"]) == {"a_b", "c"}


def test_objects_are_checked_as_words_are():
    with pytest.raises(UsageError, match="--count is 0, expected at least 1"):
        check_values(Config(count=0))
    check_values(Config(budget=math.inf))


def test_a_text_in_place_of_a_choice_is_that_choice():
    cfg = EvalConfig(save_videos="none", render_mode="LAZY")
    check_values(cfg)
    assert cfg.save_videos is SaveVideos.NONE and cfg.render_mode is RenderMode.LAZY
    with pytest.raises(UsageError, match="--save_videos is 'nome', expected one of .*did you mean none"):
        check_values(EvalConfig(save_videos="nome"))


@pytest.mark.parametrize("word", ["001", "12:30:45", "2026-01-02T03:04:05+01:00", "null", "on", "0x10", "a #b", "[x]"])
def test_a_name_is_taken_as_it_was_typed(word):
    assert parse(Config, ["--note", word]).note == word


@given(st.text(string.printable + "äß/\\\0 ", max_size=6))
def test_a_name_stays_in_its_folder(name):
    from pathlib import Path

    try:
        check_name("--note", name)
    except UsageError:
        return
    assert (Path("/a/b") / name).parent == Path("/a/b") and Path(name).name == name


@given(st.floats(), st.floats(-5, 5), st.floats(-5, 5))
def test_a_range_says_what_it_holds(value, low, high):
    assert (value in Range(at_least=low, less_than=high)) == (low <= value < high and math.isfinite(value))
    assert (value in Range(more_than=low, at_most=high)) == (low < value <= high and math.isfinite(value))


def test_help_names_flags_ranges_and_choices(capsys):
    with pytest.raises(SystemExit) as done:
        parse(Config, ["--count", "oops", "--help"])
    with pytest.raises(SystemExit):
        parse(Config, ["--text=a", "-h"])
    text, again = capsys.readouterr().out.split("usage:")[1:]
    assert text == again
    assert done.value.code == 0 and "how many; at least 1 (default: 3)" in text and "which; a, b" in text
    assert "of the runs; at least 0 (default: 0,1)" in " ".join(text.split())


def test_a_mistake_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as done, bad_input_in_one_line("program.py"):
        raise FileNotFoundError("--x /a:\nno such\nfile")
    assert done.value.code == 2 and capsys.readouterr().err == "program.py: error: --x /a: no such file\n"
    with pytest.raises(ZeroDivisionError), bad_input_in_one_line("program.py"):
        raise ZeroDivisionError  # a fault of the program keeps its traceback


def test_argparse_programs_say_it_in_one_line_too(capsys):
    parser = OneLineParser(prog="tool")
    parser.add_argument("--backend")
    for words, message in ((["--bakend", "x"], "--bakend: no such flag; did you mean --backend?"), (["x"], "x")):
        with pytest.raises(SystemExit) as done:
            parser.parse_args(words)
        error = capsys.readouterr().err
        assert (
            done.value.code == 2 and error.startswith("tool: error: ") and message in error and error.count("\n") == 1
        )


def test_a_missing_package_is_asked_for_by_its_extra():
    require_package("--x True", "json", "x")
    with pytest.raises(UsageError, match=r"--x True needs no_such_thing.*pip install 'craft-vla\[x\]'"):
        require_package("--x True", "no_such_thing", "x")
