"""What a client may ask of a server. Each limit is a flag of `craft-serve`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from prismatic.command_line import flag

MEBIBYTE = 1 << 20


@dataclass
class Limits:
    """Bounds of one server. Its memory for clients is a few times the size of a message for each connection."""

    max_connections: int = flag(32, "clients at a time; one more is answered with status 503", at_least=1, at_most=1024)
    max_message_mb: int = flag(16, "MiB of a message: all its images, not compressed", at_least=1, at_most=1024)
    requests_per_second: float = flag(
        100.0, "of one connection; a faster client waits, its next message is read later", more_than=0, at_most=1e6
    )
    seconds_to_send: float = flag(
        10.0,
        "that a client may take for a header, a body or a message, and for an answer",
        more_than=0,
        at_most=3600,
    )
    seconds_idle: float = flag(3600.0, "after which a connection that asks nothing is closed", more_than=0, at_most=1e6)
    seconds_to_answer: float = flag(
        30.0, "after which a request that still waits is given up", more_than=0, at_most=3600
    )
    max_batch: int = flag(8, "requests that wait together are answered by one forward pass", at_least=1, at_most=1024)

    @property
    def message_bytes(self) -> int:
        """Largest message in bytes."""
        return self.max_message_mb * MEBIBYTE

    @property
    def waiting(self) -> int:
        """Requests that may wait: with one connection each, one per client, and room for a few that were given up."""
        return 2 * self.max_connections


class Pace:
    """At most `per_second` requests in any second of one connection, the first ones at once."""

    def __init__(self, per_second: float) -> None:
        self._gap = 1.0 / per_second
        self._burst = max(1.0, per_second) * self._gap
        self._next = -math.inf

    def seconds_to_wait(self, now: float | None = None) -> float:
        """Seconds until the request that has just come may be read; 0 at a pace within the limit."""
        now = time.monotonic() if now is None else now
        self._next = max(self._next, now - self._burst) + self._gap
        return max(0.0, self._next - now)
