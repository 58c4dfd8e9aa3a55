"""How far a program is: a bar with the time left on a terminal, a whole line now and then elsewhere. Both on stderr.

    for batch in over(batches, "measuring", "batches"):
        ...

In a program of several processes the first one speaks for all. A console that is gone ends nothing.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

FIRST_S = 10.0
"""Seconds without a terminal before the first line, and at least between two."""
SHARE = 0.05
"""Of the time that has passed, between two lines: a run of days has some hundred."""
_BAR = "{desc}: {percentage:3.0f}% {remaining} left, {n_fmt}/{total_fmt}{unit}{postfix} |{bar}|"

Item = TypeVar("Item")


class Progress:
    """A count on its way to a total. A context: at its end the last state is said.

    Args:
        total: of the count, at least 0. With 0 nothing is shown.
        what: what is done, "fine-tuning".
        unit: of the count, "steps". "B" are bytes, shown as kB, MB and so on.
        done: the count at the start: an earlier run's, which took no time of this one.
        leave: whether the finished bar stays on the terminal.
        note: what is done first, "reads the base model".

    Attributes:
        done: the count now.
    """

    def __init__(self, total: int, what: str, unit: str, *, done: int = 0, leave: bool = True, note: str = "") -> None:
        self._total, self._what, self._unit, self._note = total, what, unit, note
        self._first = self.done = min(done, total)
        self._began = time.monotonic()
        self._next = self._began + FIRST_S
        self._said: int | None = None  # the count of the last line
        self._is_shown = total > 0 and os.environ.get("RANK", "0") == "0" and sys.stderr is not None
        self._bar: Any = None
        with suppress(OSError, ValueError):
            if self._is_shown and sys.stderr.isatty():
                from tqdm import tqdm  # the drivers of the tables run where it is not installed

                size = shutil.get_terminal_size()
                self._bar = tqdm(
                    total=total,
                    initial=self.done,
                    desc=what,
                    unit=unit if unit == "B" else f" {unit}",
                    unit_scale=unit == "B",
                    bar_format=_BAR,
                    ncols=max(1, size.columns - 1),
                    nrows=size.lines,
                    leave=leave,
                    postfix=note,
                )

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """So much more is done. note: what is done next."""
        count = max(0, min(count, self._total - self.done))
        self.done += count
        if note is not None:
            self._note = note
        with suppress(OSError, ValueError):
            if self._bar is not None:
                if note is not None:
                    self._bar.set_postfix_str(note, refresh=False)
                self._bar.update(count)
                if note is not None:
                    self._bar.refresh()
            elif self._is_shown and time.monotonic() >= self._next:
                self._say()

    def close(self) -> None:
        """Say the last state; without a terminal only when something was said before."""
        with suppress(OSError, ValueError):
            if self._bar is not None:
                self._bar.set_postfix_str("", refresh=False)
                self._bar.refresh()
                self._bar.close()
            elif self._said not in (None, self.done):
                self._note = ""
                self._say()
        self._is_shown, self._bar = False, None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _say(self) -> None:
        now = time.monotonic()
        passed = now - self._began
        self._next, self._said = now + max(FIRST_S, SHARE * passed), self.done
        count = f"{self.done:,} of {self._total:,} {self._unit}"
        if self._unit == "B":
            count = f"{_size(self.done)} of {_size(self._total)}"
        line = f"{self._what}: {count} ({100 * self.done // self._total} %)"
        if self.done == self._total:
            line += f" in {duration(passed)}"
        elif self.done > self._first:
            left = passed / (self.done - self._first) * (self._total - self.done)
            line += f", about {duration(left)} left"
        print(_sayable(line + (f"; {self._note}" if self._note else ""), sys.stderr), file=sys.stderr, flush=True)


def over(
    items: Iterable[Item], what: str, unit: str, total: int | None = None, *, leave: bool = True
) -> Iterator[Item]:
    """The items, and on the way how many have been worked on. total: their number, when they do not know it."""
    if total is None:
        assert isinstance(items, Collection)
        total = len(items)
    with Progress(total, what, unit, leave=leave) as progress:
        for item in items:
            yield item
            progress.advance()


def say(line: str) -> None:
    """A line on stdout, at once, which does not disturb a bar. Nothing when the console is gone."""
    if sys.stdout is None:
        return
    from tqdm import tqdm

    with suppress(OSError, ValueError):
        tqdm.write(_sayable(line, sys.stdout))
        sys.stdout.flush()


def _sayable(text: str, stream: object) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _size(count: int) -> str:
    thousands = min(4, (len(str(count)) - 1) // 3)
    return f"{count / 1000**thousands:.3g} {('', 'k', 'M', 'G', 'T')[thousands]}B"


def duration(seconds: float) -> str:
    """`42 s`, `5 min 07 s`, `2 h 05 min`, `3 d 4 h`."""
    if not math.isfinite(seconds) or seconds >= 1000 * 86400:
        return "more than 1000 days"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
