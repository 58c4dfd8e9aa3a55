"""Recipes, reading list and metadata name what is there: CONTRIBUTING.md, docs/architecture.md, CITATION.cff, hooks."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
RECIPES = {
    "A projection rule": "prismatic/craft/rules.py",
    "A dual": "prismatic/craft/duals/pi.py",
    "A signal or a memory": "prismatic/training/retention/signals.py",
    "A data format": "prismatic/vla/datasets/format_table.py",
    "A service for the metrics": "prismatic/training/writers.py",
    "A table row": "craft_experiments/tables.py",
}
"""Each recipe, and the file without which it would be none."""


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    level = heading.split(" ")[0]
    below = text.split(f"\n{heading}\n")[1]
    return re.split(rf"\n#{{2,{len(level)}}} ", below)[0]


def items(text: str) -> list[list[str]]:
    """The words in backticks of every numbered item, the item's file first."""
    found = re.findall(r"^\d+\. ((?:.|\n(?! *\d+\. |\n))*)", text, re.MULTILINE)
    return [re.findall(r"`([^`\n]+)`", item) for item in found]


def missing(item: list[str]) -> list[str]:
    """Names of an item that its file does not hold; `Class.method` is looked up part by part."""
    file, *names = item
    text = (ROOT / file).read_text(encoding="utf-8")
    parts = [part for name in names for part in name.split(".")]
    return [part for part in parts if not re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text)]


STEPS = [(title, item) for title in RECIPES for item in items(section(CONTRIBUTING, f"### {title}"))]
SIX = items(section(ARCHITECTURE, "## Read these six files in this order"))


def test_the_recipes_are_these_six():
    recipes = CONTRIBUTING.split("\n## Recipes\n")[1]
    assert re.findall(r"^### (.*)$", recipes, re.MULTILINE) == list(RECIPES)
    for title, file in RECIPES.items():
        assert file in [item[0] for name, item in STEPS if name == title], title


@pytest.mark.parametrize(("title", "item"), STEPS, ids=[f"{title}: {item[0]}" for title, item in STEPS])
def test_a_recipe_names_files_and_what_is_in_them(title, item):
    assert (ROOT / item[0]).is_file(), item[0]
    assert missing(item) == []


def test_six_files_are_to_be_read_and_hold_what_is_said_of_them():
    assert len(SIX) == 6
    for item in SIX:
        assert (ROOT / item[0]).is_file(), item[0]
        assert len(item) > 1 and missing(item) == [], item


def test_a_wrong_file_or_name_is_seen():
    text = "\n1. `prismatic/craft/rules.py`: `RULES`,\n   and `NO_SUCH_RULES`.\n2. `no/such.py`: x.\n\nTry it: `no`.\n"
    assert items(text) == [["prismatic/craft/rules.py", "RULES", "NO_SUCH_RULES"], ["no/such.py"]]
    assert missing(items(text)[0]) == ["NO_SUCH_RULES"]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation["version"] == version
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["message"] and citation["title"]


def test_hooks_run_the_programs_of_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    entries = {hook["id"]: hook["entry"] for hook in hooks}
    assert set(entries) == {"ruff", "ruff-format", "shellcheck", "mypy"}
    for line in re.findall(r"\$\(BIN\)/(ruff .*) \.$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE):
        assert any(entry.startswith(line) for entry in entries.values()), line
