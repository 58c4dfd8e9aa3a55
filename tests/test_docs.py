"""The pages are true as far as a machine can tell: names, links, code, commands, navigation."""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from experiments.robot.libero import eval_config
from prismatic import command_line
from prismatic.training import command_line as finetune_command_line

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LEFT_OUT = {"golden", "runs", "build"}
PAGES = [*ROOT.glob("*.md"), *ROOT.rglob("*/README.md"), *DOCS.rglob("*.md")]
PAGES = sorted(
    {p for p in PAGES if not any(part in LEFT_OUT or part.startswith(".") for part in p.relative_to(ROOT).parts)}
)
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
ELSEWHERE = {"openpi_client", "requests"}
"""Packages of clients, which have an environment of their own."""
OWN_PARSER = {"experiments.robot.serve_vla_eval"}
"""Its flags are read by a package that is not installed here."""
MARKDOWN = MarkdownIt("commonmark").enable("table")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [token.content for token in MARKDOWN.parse(text) if token.type == "fence" and token.info == language]


# ---------------------------------------------------------------------------------------------------- names and links


@pytest.mark.parametrize("name", NAMES)
def test_named_tests_and_files_exist(name):
    text = text_of(name)
    for file, function in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {function}(" in text_of(file), f"{file}::{function}"
    rooms = "prismatic|experiments|craft_experiments|vla-scripts|benchmarks|tests"
    for file in re.findall(rf"`((?:{rooms})/[\w/.-]+\.\w+)`", text):
        assert (ROOT / file).is_file(), file


def anchors(text: str) -> set[str]:
    """What GitHub and the site call the headings of a page."""
    tokens = MARKDOWN.parse(text)
    found: set[str] = set()
    for heading, inline in zip(tokens, tokens[1:], strict=False):
        if heading.type == "heading_open":
            words = "".join(part.content for part in inline.children if part.type in ("text", "code_inline"))
            slug, count = re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", words.lower()).strip()), 0
            while slug in found:
                count += 1
                slug = re.sub(r"_\d+$", "", slug) + f"_{count}"
            found.add(slug)
    return found


def links(text: str) -> list[str]:
    """The targets of links and pictures that lead to no other host."""
    tokens = [child for token in MARKDOWN.parse(text) for child in token.children or []]
    targets = [str(token.attrs.get("href") or token.attrs.get("src", "")) for token in tokens if token.attrs]
    targets += re.findall(r'<(?:img|source)[^>]* src(?:set)?="([^"]+)"', text)
    return [target for target in targets if target and not re.match(r"\w+:", target)]


@pytest.mark.parametrize("name", NAMES)
def test_every_link_and_anchor_leads_somewhere(name):
    for target in links(text_of(name)):
        path, _, anchor = target.partition("#")
        place = (ROOT / name).parent / path if path else ROOT / name
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place.read_text(encoding="utf-8")), target


def test_links_and_anchors_are_seen():
    text = "# A `b`, c\n\n[x](y.md#z) ![p](q.png) [h](https://h) <img alt='' src=\"i.svg\">\n\n## A b c\n"
    assert links(text) == ["y.md#z", "q.png", "i.svg"]
    assert anchors(text) == {"a-b-c", "a-b-c_1"}


FLAGS_OF_OTHERS = {"local-dir", "repo-type", "exclude", "cores", "resources", "retries", "unlock", "depth", "no-deps"}
"""Of `hf download`, Snakemake, git and pip."""
ROOMS = ("prismatic", "experiments", "craft_experiments", "craft_vla", "benchmarks", "docs")
SOURCES = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
FLAGS = {
    flag
    for path in SOURCES
    for found in re.findall(r'^    (\w+): .* = |"--([\w-]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
    for flag in found
}


@pytest.mark.parametrize("name", NAMES)
def test_flags_in_the_text_exist(name):
    text = re.sub(r"^```.*?^```", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    named = {flag for code in re.findall(r"`([^`]+)`", text) for flag in re.findall(r"(?:^| )--(\w[\w-]*)", code)}
    assert {flag for flag in named if flag.islower() and not flag.endswith("_")} - FLAGS - FLAGS_OF_OTHERS == set()


# --------------------------------------------------------------------------------------------------------- navigation


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page():
    def entries(part) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [name for inner in (part.values() if isinstance(part, dict) else part) for name in entries(inner)]

    found = entries(yaml.safe_load(text_of("mkdocs.yml"))["nav"])
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    others = set(found) - pages
    assert len(found) == len(set(found)) and pages <= set(found)
    notebooks = {name for name in others if name.startswith("notebooks/")}
    assert notebooks == {"notebooks/keep_a_skill.md", "notebooks/use_a_policy.md"}  # written by examples/notebooks.py
    assert all(name.startswith("files/") and (ROOT / name[6:]).is_file() for name in others - notebooks)


# --------------------------------------------------------------------------------------------------------------- code


def missing_imports(code: str) -> list[str]:
    """The names that a block of Python imports and that are nowhere."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if not _is_there(alias.name, None)]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{a.name}" for a in node.names if not _is_there(str(node.module), a.name)]
    return found


def _is_there(module: str, name: str | None) -> bool:
    if module.partition(".")[0] in ELSEWHERE:
        return True
    try:
        found = importlib.import_module(module)
    except ImportError:
        return False
    return name is None or hasattr(found, name)


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(text_of(name), "python")])
def test_python_compiles_and_imports_what_exists(name):
    for code in blocks(text_of(name), "python"):
        compile(code, name, "exec")
        assert missing_imports(code) == []


def test_a_missing_import_is_seen():
    assert missing_imports("import json, no_such\nfrom json import loads, no\n") == ["no_such", "json.no"]


def test_the_lines_of_the_start_page_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = blocks(text_of("docs/index.md"), "python")
    names: dict = {}
    exec(code, names)
    assert names["actions"].shape == (8, 7)


# ----------------------------------------------------------------------------------------------------------- commands


def commands(text: str) -> list[list[str]]:
    """The commands of the bash blocks that start a program of this project: the program, then its words."""
    found = []
    for block in blocks(text, "bash"):
        variables: dict[str, str] = {}
        for line in re.sub(r"\\\n", " ", block).splitlines():
            if assigned := re.fullmatch(r'(\w+)="([^"$]*)"', re.sub(r"\s+", " ", line).strip()):
                variables[assigned[1]] = assigned[2]
                continue
            for name, value in variables.items():
                line = re.sub(rf"\${name}\b", value, line)
            found += filter(None, map(program_of, parts_of(line)))
    return found


def parts_of(line: str) -> list[list[str]]:
    """The words of each command of a line; brackets say what may be left out."""
    reader = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    reader.whitespace_split, reader.commenters = True, "#"
    parts: list[list[str]] = [[]]
    for word in reader:
        if set(word) <= set("&|;<>"):
            parts.append([])
        else:
            parts[-1].append(word.strip("[]") if word not in ("[", "]") else word)
    return parts


def program_of(words: list[str]) -> list[str] | None:
    """The command from its program on: a module, an entry point or a file; None for other programs."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    for number, word in enumerate(words):
        if word == "-m" and words[number - 1].startswith("python"):
            own = words[number + 1].partition(".")[0] in ("prismatic", "experiments", "craft_experiments")
            return words[number + 1 :] if own else None
        if word.endswith(".py") and (words[0] in ("python", "torchrun", "accelerate", "srun")):
            return words[number:]
        if number == 0 and word.startswith("craft-"):
            return words
    return None


class Parsed(BaseException):
    """The program has read its words and found nothing wrong."""


def entry_points() -> dict[str, str]:
    return tomllib.loads(text_of("pyproject.toml"))["project"]["scripts"]


def parse(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program read its words, and no more; SystemExit or UsageError for words that it refuses."""
    program, *words = command
    module = entry_points()[program].partition(":")[0] if program.startswith("craft-") else program
    if "finetune" in module:
        finetune_command_line.parse_flags(words)
        raise Parsed
    if "run_libero_eval" in module:
        eval_config.parse_flags(words)
        raise Parsed
    read = argparse.ArgumentParser.parse_args

    def read_and_stop(*args, **kwargs):
        read(*args, **kwargs)
        raise Parsed

    def stop(config):
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read_and_stop)
    monkeypatch.setattr(command_line, "check_values", stop)  # the last call of `parse`
    monkeypatch.setattr(sys, "argv", [program, *words])
    if module.endswith(".py"):
        monkeypatch.syspath_prepend(ROOT / Path(module).parent)
        runpy.run_path(str(ROOT / module), run_name="__main__")
    elif program.startswith("craft-"):
        importlib.import_module(module).main()
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=False)


COMMANDS = {f"{name}: {shlex.join(command)}": command for name in NAMES for command in commands(text_of(name))}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads pyproject.toml")
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))
def test_a_command_goes_through_the_parser_of_its_program(command, monkeypatch):
    if command[0] in OWN_PARSER:
        pytest.skip("its parser is that of vla-eval")
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        parse(command, monkeypatch)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads pyproject.toml")
def test_commands_and_their_mistakes_are_seen(monkeypatch):
    lines = ['P="--batch_size 8"', "A=1 torchrun --standalone vla-scripts/finetune.py --max_steps \\", "  2 $P  # note"]
    found = commands("\n".join(["```bash", *lines, "ls && craft-watch x --ones", "```"]))
    assert found == [
        ["vla-scripts/finetune.py", "--max_steps", "2", "--batch_size", "8"],
        ["craft-watch", "x", "--ones"],
    ]
    for command in (found[1], ["prismatic.training.memory", "--no_such", "1"], ["craft-finetune", "--max_step", "2"]):
        with monkeypatch.context() as patch, pytest.raises((SystemExit, command_line.UsageError)):
            parse(command, patch)


def test_the_start_page_names_every_command():
    scripts = re.search(
        r"\[project.scripts\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.DOTALL
    )
    section = text_of("docs/index.md").split("## All commands")[1].split("\n## ")[0]
    named = re.findall(r"`(craft-[\w-]+)`", section)
    assert sorted(named) == sorted(line.split(" = ")[0] for line in scripts[1].splitlines())
