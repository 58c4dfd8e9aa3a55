"""Texts of others as cells of tables: they stay one cell, and no program takes them for a command."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_FORMULA = re.compile(r"\s*[=+\-@]")


def one_line(text: object) -> str:
    """The text without line ends and characters that terminals obey."""
    return _CONTROL.sub(" ", str(text))


def markdown_cell(text: object) -> str:
    """The text as a cell of a Markdown table, without markup of HTML."""
    text = one_line(text).replace("\\", "\\\\").replace("|", "\\|")
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def csv_cell(value: object) -> object:
    """The value; a text that a spreadsheet would compute gets an apostrophe in front."""
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return f"'{text}" if _FORMULA.match(text) else text
