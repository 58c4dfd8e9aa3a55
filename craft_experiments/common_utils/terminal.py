"""What a driver says: whole lines, at once, from several threads. A closed terminal ends no run."""

from __future__ import annotations

import contextlib
import sys
import threading
import time

_terminal = threading.Lock()


def say(line: str) -> None:
    """One line with the time of day."""
    encoding = sys.stdout.encoding or "utf-8"
    echo(f"[{time.strftime('%H:%M:%S')}] {line}\n".encode(encoding, "backslashreplace"))


def echo(line: bytes) -> None:
    """Bytes as they are."""
    with _terminal, contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        if hasattr(sys.stdout, "buffer"):
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        else:  # a program that took its place
            sys.stdout.write(line.decode(errors="replace"))
