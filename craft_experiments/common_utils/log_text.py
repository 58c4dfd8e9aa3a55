"""Turns a console capture or a log file into plain lines, one message a line. Standard library only.

Known decoration: UTF-8 and UTF-16 with and without a byte order mark, also appended to each other; escape sequences of
terminals; progress bars; the columns of Rich, which wraps a message at the terminal's width and breaks its words.
"""

from __future__ import annotations

import codecs
import re
from itertools import pairwise
from pathlib import Path

MAX_BYTES = 1 << 30
"""Largest log that is read. An evaluation writes a few MB."""

_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_log_bytes(path: Path, what: str) -> bytes:
    """Content of a regular file.

    Raises:
        FileNotFoundError: no such file; the message begins with `what`.
        ValueError: a folder, a device or a pipe, or more than `MAX_BYTES`.
    """
    if not path.exists():
        raise FileNotFoundError(f"{what} not found: {path}")
    if not path.is_file():
        raise ValueError(f"{path}: found {'a folder' if path.is_dir() else 'no regular file'}, expected a file: {what}")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path}: found {size >> 20} MiB, expected at most {MAX_BYTES >> 20}: {what}")
    return path.read_bytes()


def decode_text(data: bytes, errors: str = "replace") -> str:
    """Text of UTF-8 or UTF-16 bytes, without byte order marks and NUL characters.

    Of UTF-16 that was appended to UTF-8, or the other way round, only the ASCII part survives.

    Raises:
        UnicodeDecodeError: bytes that are no text, with `errors="strict"`.
    """
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), None) or _utf16_without_mark(data[:256])
    if b"\0" not in data[-64:]:
        encoding = None
    return data.decode(encoding or "utf-8", errors).replace("\ufeff", "").replace("\0", "")


def _utf16_without_mark(data: bytes) -> str | None:
    """UTF-16 when most characters have a zero for their one half and hardly any for the other."""
    pairs = len(data) // 2
    even, odd = data[0 : 2 * pairs : 2].count(0), data[1::2].count(0)
    if pairs and odd > 0.7 * pairs and even < 0.05 * pairs:
        return "utf-16-le"
    return "utf-16-be" if pairs and even > 0.7 * pairs and odd < 0.05 * pairs else None


# --- Terminals ----------------------------------------------------------------------------------------------------

_CONTROL = re.compile(
    r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"  # strings: links, window titles
    r"|(?:\x1b\[|\x9b)(?P<amount>[0-?]*)[ -/]*(?P<command>[@-~])"
    r"|\x1b(?:[#%()*+./-][0-~]|(?P<short>[6-9=<>cDEHMZ\\])|)"
    r"|\r{0,8}(?P<end>\n)|(?P<return>\r)|(?P<other>[\x00-\x08\x0b-\x1f\x7f])|[\x80-\x9f]"
)
_KEEPS_PLACE = frozenset("mKXhlnqrctp")  # commands after which text goes on where it was
_AMOUNT = r"\d+(?:\.\d+)?[kMG]?"
_BAR = re.compile(rf"(?<![\d.,])\d{{1,3}}%\|[^|\n]{{0,400}}\| *{_AMOUNT}/{_AMOUNT} \[[^\]\n]{{0,120}}\]")


def _plain(match: re.Match[str]) -> str:
    if match["end"] or match["return"]:
        return "\n"
    if match["command"] == "C":  # to the right: some recorders write blanks so
        return " " * min(int(match["amount"] or 1) if match["amount"].isdecimal() else 1, 200)
    if match["command"]:
        return "" if match["command"] in _KEEPS_PLACE else "\n"
    if match["short"]:
        return "\n" if match["short"] in "8DEM" else ""
    return " " if match["other"] else ""


def without_decoration(text: str) -> str:
    """Text without escape sequences, control characters and progress bars.

    Where the cursor went elsewhere or a progress bar stood, a line ends.
    """
    return _BAR.sub("\n", _CONTROL.sub(_plain, text))


# --- Rich ---------------------------------------------------------------------------------------------------------

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
# Time, level in eight characters, a blank: the message column begins behind it.
_HEAD = re.compile(r"[^\n]{0,80}?(?:" + "|".join(level.ljust(9) for level in _LEVELS) + ")")
_TIME = re.compile(r"[\dTZ:/\[\] .+-]*(?:[AP]M)?[\] ]*")
# The last column, in a narrow terminal cut with an ellipsis.
_SOURCE_AT_END = re.compile(r"(?:^|(?<=\s))(?:\S+\.py:\d+|\S*\u2026)$")
# In other lines it is only looked for where a word starts: from every letter of a long word it would take quadratic
# time.
_SOURCE = re.compile(r"(?<!\S)\S+\.py:\d+")


class _Block:
    """Rows of one message that Rich wrapped."""

    def __init__(self, head: re.Match[str]) -> None:
        self.column = head.end()
        body = head.string[self.column :].rstrip()
        source = _SOURCE_AT_END.search(body)
        self.width = source.start() - 1 if source else None
        self.rows = [body[: source.start()].rstrip() if source else body]

    def takes(self, line: str) -> bool:
        """Add a row that belongs to the message: left of its column there is nothing but a wrapped time."""
        left = line[: self.column]
        if line.strip() and (len(line) <= self.column or left[-9:].strip() or not _TIME.fullmatch(left[:-9])):
            return False
        self.rows.append(line[self.column :].rstrip())
        return True

    def message(self) -> str:
        """The rows as one line. A row that one word fills goes on in the next: Rich breaks words that are too long."""
        text = self.rows[0]
        for before, row in pairwise(self.rows):
            whole = len(before) == self.width and " " not in before
            text += row if whole else f" {row}"
        return text


def message_lines(text: str) -> str:
    """Undecorated text with one message a line."""
    lines: list[str] = []
    block: _Block | None = None
    for line in without_decoration(text).split("\n"):
        head = _HEAD.match(line)
        if head is None and block is not None and block.takes(line):
            continue
        if block is not None:
            lines.append(block.message())
        block = None if head is None else _Block(head)
        if head is None:
            lines.append(line)
    if block is not None:
        lines.append(block.message())
    return _SOURCE.sub(" ", "\n".join(lines))


_NEW_MESSAGE = re.compile(
    r"$|\d{4}-\d\d-\d\d|[A-Z]+:\w+:|# |Task( suite)?:|Success:|Current t|Total |Overall |Final |Starting |Saved "
)


def unwrapped(text: str) -> str | None:
    """Text with the rows joined that end at the last column of a terminal; None when no three rows end there."""
    lines = text.split("\n")
    width = max(map(len, lines))
    if width < 20 or sum(len(line) == width for line in lines) < 3:
        return None
    joined = [
        line if len(line) == width and not _NEW_MESSAGE.match(following) else line + "\n"
        for line, following in pairwise([*lines, ""])
    ]
    return "".join(joined)
