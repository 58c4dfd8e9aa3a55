"""The page of `craft-watch`: a run's numbers as lines of text that fit the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prismatic.evidence.cells import one_line
from prismatic.progress import duration
from prismatic.training.watched_run import RunView

_LABEL = 13
_SMOOTHED = 0.1
"""Share of the logged lines that a smoothed value is the mean of."""
_WIDEST = 100
_NARROWEST = 20


@dataclass(frozen=True)
class Marks:
    """What a page is drawn with. levels: of a sparkline, rising; gap: where no value is finite."""

    levels: str
    gap: str
    full: str
    empty: str


BLOCKS = Marks("▁▂▃▄▅▆▇█", " ", "█", "░")
ASCII = Marks("_.-=+*#", " ", "#", ".")


@dataclass(frozen=True)
class Screen:
    """width: columns of a line at most. marks: what curves and bars are drawn with."""

    width: int = 80
    marks: Marks = ASCII

    @property
    def room(self) -> int:
        """Columns behind a label."""
        return max(1, self.columns - _LABEL)

    @property
    def columns(self) -> int:
        """Columns that are used."""
        return max(_NARROWEST, min(self.width, _WIDEST))


def page(run: RunView, screen: Screen) -> list[str]:
    """The lines of the page, none wider than the screen."""
    parts: list[Callable[[RunView, Screen], list[str]]] = [_progress, _losses, _constraint, _speed, _files]
    lines = [_title(run, screen), *(line for part in parts for line in part(run, screen))]
    return [_cut(line, max(screen.width, 1), screen.marks) for line in lines]


def _cut(line: str, width: int, marks: Marks) -> str:
    """One line of printable characters, with two dots where it was too long; ASCII marks go with ASCII text."""
    line = one_line(line).rstrip()
    if marks is ASCII:
        line = line.encode("ascii", "replace").decode()
    return line if len(line) <= width else line[: max(0, width - 2)] + ".."[:width]


def _title(run: RunView, screen: Screen) -> str:
    room = screen.columns - len(run.state) - 3
    name = one_line(run.name)
    return f"{name if len(name) <= room else name[: max(1, room - 2)] + '..'} ({run.state})"


def _progress(run: RunView, screen: Screen) -> list[str]:
    if not run.rows:
        return [_line("step", "none is logged yet")]
    if run.total is None:
        return [_line("step", f"{run.step:,} (how many there will be is not recorded)")]
    share = run.step / run.total
    lines = [_line("step", f"{run.step:,} of {run.total:,}"), _line("", _bar(share, screen) + f" {share:.0%}")]
    left = run.seconds_left
    if run.state == "running" and left is not None:
        lines.append(_line("time left", f"about {duration(left)}"))
    if run.state == "stopped":
        lines.append(_line("", "stopped: --resume auto continues it"))
    return lines


def _losses(run: RunView, screen: Screen) -> list[str]:
    lines = _curve(run, screen, "loss", "VLA Train/Loss")
    steps, values = run.series("VLA Val/Loss")
    if values:
        lines += _curve(run, screen, "val loss", "VLA Val/Loss", f" at step {steps[-1]:,}", smoothed=False)
    return lines


def _constraint(run: RunView, screen: Screen) -> list[str]:
    lines = _curve(run, screen, "drift", "CRaFT/Retention Loss")
    drift = _smoothed(run.series("CRaFT/Retention Loss")[1])
    if lines and run.budget is not None and drift is not None:
        share = drift / run.budget
        lines.append(_line("of budget", f"{_bar(share, screen)} {share:.0%} of {run.budget:g}"))
    probes = sorted({name for row in run.rows[-1:] for name in row if name.startswith("CRaFT/Probe/")})
    for name in probes[:2]:
        lines += _curve(run, screen, "probe", name, f" {name.rpartition('/')[2]}")
    for label, name in (("share", "CRaFT/Share"), ("lambda", "CRaFT/Lambda")):
        if found := _curve(run, screen, label, name, smoothed=False):
            lines += found
            break
    _, reached = run.series("CRaFT/Out Of Reach")
    if reached:
        lines.append(_line("out of reach", "YES: see docs/keep.md" if reached[-1] else "no"))
    return lines


def _speed(run: RunView, screen: Screen) -> list[str]:
    _, rates = run.series("samples_per_second")
    if not rates:
        return []
    texts = [f"{_text(rates[-1])} samples/s"]
    _, waits = run.series("Time/Data Wait Share")
    texts += [f"data wait {waits[-1]:.0%}"] if waits and math.isfinite(waits[-1]) else []
    _, memory = run.series("Memory/Peak GiB")
    texts += [f"peak {_text(memory[-1])} GiB"] if memory else []
    return _wrapped("speed", texts, screen)


def _files(run: RunView, screen: Screen) -> list[str]:
    lines = []
    if run.checkpoint is None:
        lines.append(_line("checkpoint", "none yet"))
    else:
        step, folder = run.checkpoint
        at = "" if step is None else f"step {step:,}: "
        lines.append(_line("checkpoint", f"{at}{folder.name}"))
    if run.age is not None and run.state == "running":
        lines.append(_line("last line", f"{duration(run.age)} ago"))
    if run.unreadable:
        lines.append(_line("metrics", f"{run.unreadable:,} lines could not be read"))
    return lines


# ------------------------------------------------------------------------------------------------------------- drawing


def _line(label: str, text: str) -> str:
    return f"{label:<{_LABEL}}{text}"


def _wrapped(label: str, texts: Sequence[str], screen: Screen) -> list[str]:
    """Texts with two blanks between, on as many lines as they need."""
    lines = [""]
    for text in texts:
        if lines[-1] and len(lines[-1]) + 2 + len(text) > screen.room:
            lines.append("")
        lines[-1] += ("  " if lines[-1] else "") + text
    return [_line(label if number == 0 else "", line) for number, line in enumerate(lines)]


def _curve(run: RunView, screen: Screen, label: str, name: str, note: str = "", smoothed: bool = True) -> list[str]:
    """A metric's value, smoothed or the last one, and its curve; no line for one that was never logged."""
    _, values = run.series(name)
    if not values:
        return []
    value = _smoothed(values) if smoothed else values[-1]
    text = _text(math.nan if value is None else value)
    odd = sum(not math.isfinite(value) for value in values)
    note += f" ({odd} of {len(values)} not finite)" if odd else ""
    lines = [_line(label, f"{text}{note}")]
    drawn = _sparkline(values, screen.room - (_VALUE if not note else 0), screen.marks)
    if not drawn.strip():
        return lines
    return [_line(label, f"{text:<{_VALUE}}{drawn}")] if not note else [*lines, _line("", drawn)]


_VALUE = 12


def _smoothed(values: Sequence[float]) -> float | None:
    """Mean of the finite ones among the last values; None without any."""
    last = values[-max(1, round(_SMOOTHED * len(values))) :]
    finite = [value for value in last if math.isfinite(value)]
    return sum(value / len(finite) for value in finite) if finite else None


def _sparkline(values: Sequence[float], width: int, marks: Marks) -> str:
    """The curve of the values over their steps, a mark per bin; empty for one or two values or no room."""
    if width < 3 or len(values) < 3:
        return ""
    width = min(width, len(values))
    bins = [values[n * len(values) // width : (n + 1) * len(values) // width] for n in range(width)]
    finite = [[value for value in values_of if math.isfinite(value)] for values_of in bins]
    means = [sum(value / len(found) for value in found) if found else None for found in finite]
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, high, top = min(known), max(known), len(marks.levels) - 1
    span = high / 2 - low / 2  # halves: their difference is always finite
    place = lambda mean: round(top * ((mean / 2 - low / 2) / span)) if span > 0 else 0  # noqa: E731
    return "".join(marks.gap if mean is None else marks.levels[place(mean)] for mean in means)


def _bar(share: float, screen: Screen) -> str:
    """A bar that is full at 1, and stays so above."""
    width = max(4, min(30, screen.room - 16))
    full = min(width, max(0, int(share * width))) if math.isfinite(share) else width
    return f"[{screen.marks.full * full}{screen.marks.empty * (width - full)}]"


def _text(value: float) -> str:
    return f"{value:.4g}"
