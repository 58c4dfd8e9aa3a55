"""Who may import whom: the rooms in their order, no circle, no import that runs back up."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("prismatic", "experiments", "craft_experiments", "craft_vla")

ROOMS = (
    "prismatic.craft",
    "prismatic.command_line",
    "prismatic.progress",
    "prismatic.evidence",
    "prismatic.output_folder",
    "prismatic.model_files",
    "prismatic.vla",
    "prismatic.models",
    "prismatic.training",
    "prismatic.programs",
    "craft_vla",
    "experiments.robot",
    "craft_experiments",
)
"""A module imports from its own room and from those above it in this list."""
JOINED = {"prismatic.extern": "prismatic.models"}
"""The published module names are a front of the models' room."""


def modules() -> dict[str, Path]:
    """All modules of the product by name."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    named = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in named.items()}


def imports(name: str, file: Path, known: set[str]) -> set[str]:
    """Modules of the product that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return (found & known) - {name}


MODULES = modules()
GRAPH = {name: imports(name, file, set(MODULES)) for name, file in MODULES.items()}


def room(name: str) -> int:
    for front, home in JOINED.items():
        if name.startswith(f"{front}."):
            return ROOMS.index(home)
    inside = [i for i, found in enumerate(ROOMS) if f"{name}.".startswith(f"{found}.")]
    assert inside, f"{name} is in no room of ROOMS"
    return inside[0]


def is_empty(name: str) -> bool:
    """A package's `__init__` that says what is in it."""
    return MODULES[name].name == "__init__.py" and not GRAPH[name]


@pytest.mark.parametrize("name", [name for name in MODULES if not is_empty(name)])
def test_no_import_runs_back_up(name):
    assert [other for other in GRAPH[name] if not is_empty(other) and room(other) > room(name)] == []


def test_there_is_no_circle():
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def too_long(text: str, lines: int) -> list[str]:
    """Names of the functions with more lines, decorators left out."""
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [node.name for node in functions if node.end_lineno - node.lineno >= lines]


def test_files_have_at_most_450_lines_and_functions_60():
    files = [f for place in (*PACKAGES, "benchmarks", "examples", "vla-scripts") for f in (ROOT / place).rglob("*.py")]
    assert len(files) > 250
    assert [str(file) for file in files if file.read_text().count("\n") > 450] == []
    assert {str(file): names for file in files if (names := too_long(file.read_text(), 60))} == {}
    assert too_long("def long():\n" + "    x = 1\n" * 60 + "def short():\n" + "    x = 1\n" * 59, 60) == ["long"]
