"""What a check reports, and how it is printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class Status(str, Enum):
    """OK; WARN: may explain a difference, not wrong by itself; FAIL: results are not comparable; SKIP: not checked."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True)
class Finding:
    """Result of one check: its name, what was found, what was expected and what it costs when wrong."""

    name: str
    status: Status
    found: str
    expected: str
    cost: str

    def line(self) -> str:
        """One line of text."""
        words = " ".join(f"{self.found}; expected: {self.expected}; when wrong: {self.cost}".split())
        return f"{self.status.value.upper():4}  {self.name}: {words}"

    def to_dict(self) -> dict[str, str]:
        """JSON-ready fields."""
        return asdict(self) | {"status": self.status.value}


@dataclass(frozen=True)
class Check:
    """A check before it runs. function returns (status, found); expected and cost are the same whatever is found."""

    name: str
    expected: str
    cost: str
    function: Callable[[], tuple[Status, str]]

    def run(self) -> Finding:
        """Run it; an exception is a failure of the check, with its text as what was found."""
        try:
            status, found = self.function()
        except Exception as error:  # noqa: BLE001 - one broken check must not hide the others
            status, found = Status.FAIL, f"the check could not run: {type(error).__name__}: {error}"
        return Finding(self.name, status, found, self.expected, self.cost)


def judge(good: bool, found: Any) -> tuple[Status, str]:
    """(OK or FAIL, text)."""
    return (Status.OK if good else Status.FAIL), str(found)


def exit_code(findings: Iterable[Finding]) -> int:
    """1 when a check failed, else 0."""
    return int(any(finding.status is Status.FAIL for finding in findings))
