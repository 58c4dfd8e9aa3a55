"""Building blocks of the HTML report: an escaping element builder, inline SVG charts, style and script.

Everything is text until it is wrapped in :class:`Html`, and text is escaped: records (instructions, exceptions, paths)
cannot put markup into the page.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

CHART_WIDTH = 720
CHART_HEIGHT = 200
_MARGIN = 46


class Html(str):
    """Finished markup; every other string is text."""


def el(name: str, /, *children: object, **attributes: object) -> Html:
    """An HTML or SVG element.

    Args:
        name: tag name.
        children: `Html` as it is, None left out, anything else as escaped text.
        attributes: a trailing underscore is dropped (`class_`), other underscores become hyphens; None and False leave
            the attribute out, True gives it without a value.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{html.escape(str(value), quote=True)}"')
    if name in ("meta", "br"):
        return Html(f"<{' '.join(parts)}>")
    return Html(f"<{' '.join(parts)}>{join(children)}</{name}>")


def join(children: Sequence[object], separator: str = "") -> Html:
    """Children one after another, text escaped, None left out."""
    shown = (child if isinstance(child, Html) else html.escape(str(child)) for child in children if child is not None)
    return Html(separator.join(shown))


def table(heads: Sequence[object], rows: Sequence[Sequence[object]], **attributes: object) -> Html:
    """A table; columns of numbers (as in the first row) are aligned right.

    Args:
        heads: column titles.
        rows: cells. The first of a row is its header. A cell is a child of `td` (`th`), or `Html` that starts with it.
        attributes: of the table.
    """
    numeric = {i for row in rows[:1] for i, item in enumerate(row) if str(item).startswith('<td class="num')}
    heads = [el("th", item, scope="col", class_="num" if i in numeric else None) for i, item in enumerate(heads)]
    head, body = el("thead", el("tr", *heads)), []
    for first, *rest in rows:
        cells = [item if isinstance(item, Html) and item.startswith("<td") else el("td", item) for item in rest]
        ready = isinstance(first, Html) and first.startswith("<th")
        body.append(el("tr", first if ready else el("th", first, scope="row"), *cells))
    return el("div", el("table", head, el("tbody", *body), **attributes), class_="scroll")


def number(value: float | None, digits: int = 0) -> Html:
    """A right-aligned cell that sorts by its value; `-` for None, which sorts first."""
    text = "-" if value is None else f"{value:.{digits}f}"
    return el("td", text, class_="num", data_value=-1 if value is None else value)


@dataclass(frozen=True)
class Bar:
    """A success rate in a chart: name, rate in [0, 1] or None without trials, interval, colour number from 0."""

    name: str
    rate: float | None
    interval: tuple[float, float] | None
    colour: int


def rate_bars(bars: Sequence[Bar], title: str) -> Html:
    """Horizontal bars on a scale from 0 to 100 % with the interval as a line; the first bar is the thicker one."""
    width, y, shapes = 160.0, 1.0, []
    for position in (0, 40, 80, 120, 160):
        shapes.append(el("line", x1=position, x2=position, y1=0, y2="100%", class_="grid"))
    for index, bar in enumerate(bars):
        height = 12 if index == 0 else 7
        if bar.rate is not None and bar.interval is not None:
            low, high = (width * end for end in bar.interval)
            middle = y + height / 2
            size = {"width": f"{width * bar.rate:.1f}", "height": height}
            shapes.append(el("rect", x=0, y=f"{y:.1f}", class_=f"fill{bar.colour % 6}", **size))
            ends = {"y1": f"{middle:.1f}", "y2": f"{middle:.1f}"}
            shapes.append(el("line", x1=f"{low:.1f}", x2=f"{high:.1f}", class_="whisker", **ends))
            for end in (low, high):
                ticks = {"y1": f"{middle - 3:.1f}", "y2": f"{middle + 3:.1f}"}
                shapes.append(el("line", x1=f"{end:.1f}", x2=f"{end:.1f}", class_="whisker", **ticks))
        y += height + 2
    words = [f"{bar.name} {percent(bar.rate)} {interval_text(bar.interval)}" for bar in bars]
    label = f"{title}: {'; '.join(words)}"
    box = {"viewBox": f"-1 0 {width + 2:.0f} {y:.0f}", "width": int(width + 2), "height": int(y)}
    return el("svg", *shapes, role="img", aria_label=label, class_="bars", **box)


def percent(share: float | None) -> str:
    """`65.0 %`; `-` for None."""
    return "-" if share is None else f"{100 * share:.1f} %"


def interval_text(interval: Sequence[float] | None) -> str:
    """`[43.3, 81.9]` in percent; empty for None."""
    return "" if interval is None else f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _axis(top: float, bottom: str, unit: str) -> list[Html]:
    shapes = []
    for share in (0.0, 0.5, 1.0):
        y = CHART_HEIGHT - 30 - share * (CHART_HEIGHT - 45)
        shapes.append(el("line", x1=_MARGIN, x2=CHART_WIDTH - 8, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        shapes.append(el("text", f"{share * top:.3g}", x=_MARGIN - 6, y=f"{y + 4:.1f}", text_anchor="end"))
    shapes.append(el("text", bottom, x=(_MARGIN + CHART_WIDTH) / 2, y=CHART_HEIGHT - 4, text_anchor="middle"))
    return [*shapes, el("text", unit, x=_MARGIN, y=9)]


def _chart(shapes: Sequence[Html], title: str) -> Html:
    size = {"viewBox": f"0 0 {CHART_WIDTH} {CHART_HEIGHT}"}
    return el("div", el("svg", *shapes, role="img", aria_label=title, class_="chart", **size), class_="scroll")


def timeline(values: Sequence[tuple[float, float]], title: str, unit: str) -> Html:
    """A column per episode in the order of recording.

    Args:
        values: (typical, largest) per episode, >= 0; equal when there is one number only.
        title: alternative text.
        unit: what the vertical axis shows.
    """
    top = max((high for _, high in values), default=0.0) or 1.0
    shapes = _axis(top, "episodes in the order of recording", unit)
    step = (CHART_WIDTH - 8 - _MARGIN) / max(1, len(values))
    for index, (typical, largest) in enumerate(values):
        x, width = f"{_MARGIN + index * step:.2f}", f"{max(0.4, step * 0.8):.2f}"
        for value, name in ((largest, "light"), (typical, "fill0")):
            height = value / top * (CHART_HEIGHT - 45)
            y = f"{CHART_HEIGHT - 30 - height:.2f}"
            shapes.append(el("rect", x=x, y=y, width=width, height=f"{height:.2f}", class_=name))
    return _chart(shapes, title)


def histogram(values: Sequence[float], title: str, unit: str, bins: int = 24) -> Html:
    """Counts of values in equal bins from 0 to the largest.

    Args:
        values: >= 0, at least one.
        title: alternative text.
        unit: what the horizontal axis shows.
        bins: number of bins, >= 1.
    """
    top = max(values) or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int(value / top * bins))] += 1
    highest = max(counts)
    shapes = _axis(highest, f"{unit}, 0 to {top:.3g}", "count")
    step = (CHART_WIDTH - 8 - _MARGIN) / bins
    for index, count in enumerate(counts):
        height = count / highest * (CHART_HEIGHT - 45)
        place = {"x": f"{_MARGIN + index * step:.2f}", "y": f"{CHART_HEIGHT - 30 - height:.2f}"}
        shapes.append(el("rect", width=f"{step * 0.9:.2f}", height=f"{height:.2f}", class_="fill0", **place))
    return _chart(shapes, title)


def page(title: str, body: Sequence[object]) -> str:
    """The whole document. Its content security policy forbids every request."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; media-src data:"
    head = [
        el("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", Html(STYLE)),
    ]
    parts = [el("head", *head), el("body", el("main", *body), el("script", Html(SCRIPT)))]
    return "<!doctype html>\n" + el("html", *parts, lang="en") + "\n"


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1d21; --soft: #5a626b; --line: #d5dae0; --panel: #f4f6f8;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b0568f; --c4: #b07a00; --c5: #2a8fc4;
  --good: #00684b; --bad: #a83a00; --light: #b9d5e8; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e6e9ec; --soft: #9aa4ae; --line: #363d44;
  --panel: #1d2226; --c0: #4aa8e0; --c1: #f0884a; --c2: #35c49a; --c3: #dd8fc0; --c4: #e6b23c; --c5: #7cc6ee;
  --good: #4fd1a8; --bad: #ff9a66; --light: #2b4a5e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 40px 0 8px; border-bottom: 1px solid var(--line); padding-bottom: 4px; }
h3 { font-size: 1rem; margin: 0; }
p { max-width: 75ch; margin: 8px 0; }
a { color: var(--c0); }
.soft { color: var(--soft); }
.headline { display: flex; flex-wrap: wrap; gap: 8px 28px; align-items: baseline; margin: 16px 0; }
.headline b { font-size: 2.4rem; line-height: 1.1; font-variant-numeric: tabular-nums; }
.banner { border-left: 4px solid var(--bad); background: var(--panel); padding: 8px 14px; }
.banner.ok { border-color: var(--good); }
.scroll { overflow-x: auto; }
.tall { max-height: 34rem; overflow-y: auto; border: 1px solid var(--line); }
.tall thead th { position: sticky; top: 0; background: var(--panel); z-index: 1; }
table { border-collapse: collapse; font-size: .9rem; }
table.wide { min-width: 100%; }
th, td { text-align: left; padding: 5px 8px; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
.words { min-width: 13rem; }
tbody th { font-weight: 400; white-space: nowrap; }
td.num, th.num { text-align: right; font-variant-numeric: tabular-nums; }
td.num { white-space: nowrap; }
th button { all: unset; cursor: pointer; }
th button:focus-visible, .tall:focus-visible, summary:focus-visible { outline: 2px solid var(--c0); }
th button::after { content: " \\2195"; opacity: .5; }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
.success { color: var(--good); } .failure, .error { color: var(--bad); } .error { font-weight: 700; }
.bars { display: block; } .chart { display: block; width: 720px; height: 200px; }
svg text { fill: var(--soft); font-size: 12px; } .grid { stroke: var(--line); stroke-width: 1; }
.whisker { stroke: var(--ink); stroke-width: 1.3; } .light { fill: var(--light); }
.fill0 { fill: var(--c0); } .fill1 { fill: var(--c1); } .fill2 { fill: var(--c2); } .fill3 { fill: var(--c3); }
.fill4 { fill: var(--c4); } .fill5 { fill: var(--c5); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 0; margin: 8px 0; list-style: none; }
.legend svg { vertical-align: -1px; margin-right: 6px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 16px; margin: 12px 0; }
.card { border: 1px solid var(--line); background: var(--panel); padding: 12px; break-inside: avoid; min-width: 0; }
.card p { margin: 4px 0; font-size: .9rem; overflow-wrap: anywhere; }
.card video { width: 100%; height: auto; aspect-ratio: 1; background: #000; margin-top: 6px; display: block; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: .85rem; }
summary { cursor: pointer; margin: 8px 0; }
@media print { :root { --paper: #fff; --ink: #000; --soft: #444; --panel: #fff; --line: #bbb; }
  main { max-width: none; padding: 0; } .tall { max-height: none; overflow: visible; border: 0; }
  body { font-size: 10pt; } table { font-size: 8pt; } th, td { padding: 3px 5px; } .words { min-width: 0; }
  .scroll { overflow: visible; } .bars { width: 110px; height: auto; } .chart { width: 100%; height: auto; }
  .cards { grid-template-columns: repeat(4, 1fr); gap: 8px; } .tall thead th { position: static; }
  th button::after { content: ""; } h2, h3 { break-after: avoid; } tr, svg { break-inside: avoid; }
  @page { margin: 12mm; } * { print-color-adjust: exact; } }
"""

SCRIPT = """
document.querySelectorAll("table.sortable").forEach(function (table) {
  var heads = Array.prototype.slice.call(table.tHead.rows[0].cells);
  function value(row, column) {
    var cell = row.cells[column], data = cell.getAttribute("data-value");
    return data === null ? cell.textContent : Number(data);
  }
  heads.forEach(function (head, column) {
    var button = document.createElement("button");
    button.type = "button";
    while (head.firstChild) button.appendChild(head.firstChild);
    head.appendChild(button);
    button.addEventListener("click", function () {
      var down = head.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
      heads.forEach(function (other) { other.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      var body = table.tBodies[0];
      Array.prototype.slice.call(body.rows).map(function (row, place) { return [value(row, column), place, row]; })
        .sort(function (a, b) {
          var order = typeof a[0] === "number" && typeof b[0] === "number"
            ? a[0] - b[0] : String(a[0]).localeCompare(String(b[0]));
          return sign * order || a[1] - b[1];
        }).forEach(function (item) { body.appendChild(item[2]); });
    });
  });
});
"""
