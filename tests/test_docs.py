"""The documentation names tests and files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.rglob("*/README.md")), *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if not {".venv", "golden", "runs"} & set(page.relative_to(ROOT).parts)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_tests_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"
    rooms = "prismatic|experiments|craft_experiments|vla-scripts|benchmarks|tests"
    for file in re.findall(rf"`((?:{rooms})/[\w/.-]+\.\w+)`", text):
        assert (ROOT / file).is_file(), file
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
