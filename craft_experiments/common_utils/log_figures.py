"""Reads a number of a log together with its unit. Standard library only.

A rate is a number in [0, 1], a percentage or a fraction, and may be stated twice: `0.8500 (85.0%)`, `17/20 = 85 %`,
`85,0 % (17 of 20)`. What can be read in two ways is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

EXACT = 5.1e-5
"""Four decimals are written; a number with fewer is known to half a unit of its last digit."""
_MAX_DIGITS = 18  # of a count: no evaluation has more episodes, and int() refuses thousands of digits

_LEAD = re.compile(r"[\s*_`\"'(\[~]*")
# A comma can only be a decimal comma: no rate reaches a thousand.
_NUMBER = r"[0-9]{1,40}(?:[.,][0-9]{1,40})?(?:[eE][-+]?[0-9]{1,3})?"
_FIGURE = re.compile(
    r"(?P<part>[0-9]{1,18})\s*(?:/|out\s+of\b|of\b)\s*(?P<whole>[0-9]{1,18})(?![0-9]|[.,][0-9])"
    rf"|(?P<number>{_NUMBER})(?:\s*(?P<unit>%|percent\b|per\s+cent\b|pct\b))?"
)
_AGAIN = re.compile(r"[\s*_`]*(?:[(\[=:\u2248~]|->|==)\s*(?=[0-9])")
_BEHIND = r"(?:[\s()\[\]*_`\"';]|[.,:](?:\s|$)|$)"
_END = re.compile(_BEHIND)
# What follows may change the number: 0.8 +- 0.1 %, 85.0 / 100.
_UNCLEAR = re.compile(r"[\s0-9.,\u00b1+/~-]*[0-9]\s*%(?!\|)|\s*(?:/|of\b|out\s+of\b)")
_COUNT = re.compile(r"([0-9]+)(?:\.0)?(?:\s*/\s*[0-9]{1,18})?(?=" + _BEHIND + ")")
_EXPECTED = "expected a rate in [0, 1], a percentage (85.0%) or a fraction (17/20)"


@dataclass(frozen=True)
class Rate:
    """A rate in [0, 1]. tolerance: how far the true one may be, as decimals are missing."""

    value: float
    tolerance: float = 0.0

    def agrees(self, other: Rate) -> bool:
        """Whether both can be one rate."""
        return abs(self.value - other.value) <= max(self.tolerance + other.tolerance, EXACT)


def _figure_start(text: str) -> int:
    lead = _LEAD.match(text)
    assert lead is not None  # it matches the empty text, too
    return lead.end()


def read_rate(text: str, percent: bool = False) -> Rate:
    """The rate that `text` begins with.

    Args:
        text: what follows the name of the rate, up to the end of its line.
        percent: a number without a unit is a percentage, since the name says so.

    Raises:
        ValueError: no number, a number outside [0, 1], two statements that contradict each other, or something behind
            the number that may be its unit. The message begins with what was found.
    """
    shown = f"found {text.strip()[:60]!r}"
    match = _FIGURE.match(text, _figure_start(text))
    if match is None:
        raise ValueError(f"{shown}, {_EXPECTED}")
    rate = _rate(match, percent, shown)
    unclear = match["number"] and not (match["unit"] or percent)
    while (again := _statement_behind(text, match.end())) is not None:
        match = again
        if not rate.agrees(_rate(match, False, shown)):
            raise ValueError(f"{shown}, which states two different rates")
        unclear = False
    if not _END.match(text, match.end()) or (unclear and _UNCLEAR.match(text, match.end())):
        raise ValueError(f"{shown}, {_EXPECTED} and nothing behind it that may change it")
    return rate


def _statement_behind(text: str, place: int) -> re.Match[str] | None:
    """The same rate in another form: a fraction, or a percentage or number with decimals that stands alone."""
    connector = _AGAIN.match(text, place)
    match = connector and _FIGURE.match(text, connector.end())
    if not match or match["part"]:
        return match or None
    alone = re.match(r"[\s*_`]*(?:[)\](=]|$)", text[match.end() :])
    return match if alone and (match["unit"] or re.search("[.,]", match["number"])) else None


def _rate(match: re.Match[str], percent: bool, shown: str) -> Rate:
    if match["part"]:
        part, whole = int(match["part"]), int(match["whole"])
        rate = Rate(part / whole if whole else -1.0)
    else:
        digits = match["number"].replace(",", ".")
        whole = 100 if percent or match["unit"] else 1
        decimals = len(digits.partition(".")[2])
        # 1.0 and 0.5 are what Python prints of exact numbers.
        rough = "e" not in digits.lower() and (decimals > 1 or whole == 100)
        rate = Rate(float(digits) / whole, 0.5 * 10.0**-decimals / whole + 1e-9 if rough else 0.0)
    if not 0.0 <= rate.value <= 1.0:
        raise ValueError(f"{shown}, {_EXPECTED}")
    return rate


def read_count(text: str) -> int:
    """The whole number that `text` begins with; of `17/20` the first.

    Raises:
        ValueError: none, one with separators (1,000 and 1.000 are read in two ways), or more than 18 digits. The
            message begins with what was found.
    """
    match = _COUNT.match(text, _figure_start(text))
    if match is None:
        raise ValueError(f"found {text.strip()[:60]!r}, expected a whole number without separators")
    if len(match[1]) > _MAX_DIGITS:
        raise ValueError(f"found a number of {len(match[1])} digits, expected a count")
    return int(match[1])
