"""Texts of others as cells of tables: they stay one cell, and no program takes them for a command."""

from __future__ import annotations

import re
from collections.abc import Iterable

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_FORMULA = re.compile(r"\s*[=+\-@]")


def one_line(text: object) -> str:
    """The text without line ends and characters that terminals obey."""
    return _CONTROL.sub(" ", str(text))


def markdown_cell(text: object) -> str:
    """The text as a cell of a Markdown table, without markup of HTML."""
    text = one_line(text).replace("\\", "\\\\").replace("|", "\\|")
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def markdown_code(text: object) -> str:
    """The text as code in a line of Markdown: nothing in it is markup. In a table `table_row` does the rest."""
    text = one_line(text)
    fence = "`" * (longest_run(text, "`") + 1)
    space = " " if not text.strip() or text.startswith(("`", " ")) or text.endswith(("`", " ")) else ""
    return f"{fence}{space}{text}{space}{fence}"


def table_row(cells: Iterable[str]) -> str:
    """A row of a Markdown table. Cells are Markdown already; bars in them stay text."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def markdown_block(text: str, language: str = "") -> str:
    """Text of several lines as a block of code in Markdown, which nothing in it can end."""
    fence = "`" * max(3, longest_run(text, "`") + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def longest_run(text: str, character: str) -> int:
    """How often a character stands in a row at most."""
    return max((len(run) for run in re.findall(f"{re.escape(character)}+", text)), default=0)


def csv_cell(value: object) -> object:
    """The value; a text that a spreadsheet would compute gets an apostrophe in front."""
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return f"'{text}" if _FORMULA.match(text) else text
