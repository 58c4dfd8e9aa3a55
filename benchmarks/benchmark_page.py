"""Pages that several benchmarks write to: each replaces its own section and leaves the others alone."""

from __future__ import annotations

from pathlib import Path


def put_section(page: str, name: str, text: str) -> str:
    """The page with the section `name` replaced by `text`, or added at the end.

    A section stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. Raises ValueError for a page on which one
    of the two is missing or there twice.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text.strip()}\n{end}\n"
    counts = page.count(begin), page.count(end)
    if counts == (0, 0):
        return f"{page.rstrip()}\n\n{section}".lstrip()
    if counts != (1, 1) or page.index(begin) > page.index(end):
        raise ValueError(f"section {name}: found {counts} begin and end marks, expected one of each, in this order")
    before, after = page[: page.index(begin)], page[page.index(end) + len(end) :]
    return before + section.rstrip() + after


def write_section(path: Path, name: str, text: str) -> None:
    """`put_section` on a file, which is made when missing; says so."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    write(path, put_section(page, name, text))
    print(f"written: section {name} of {path}")


def write(path: Path, text: str) -> None:
    """Replace a file in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
