"""Names of files that nobody else has taken."""

from __future__ import annotations

import itertools
import os
from typing import TextIO


def create_free(path: str | os.PathLike[str]) -> TextIO:
    """Create and open the first file that does not exist of `a.txt`, `a-2.txt`, `a-3.txt`, ... for writing text.

    A time of day in a name does not make it unique: runs that start in the same second have the same. Only one process
    can create a file.
    """
    stem, ending = os.path.splitext(path)
    for number in itertools.count(1):
        try:
            return open(path if number == 1 else f"{stem}-{number}{ending}", "x", encoding="utf-8")
        except FileExistsError:
            continue
    raise AssertionError("unreachable")
