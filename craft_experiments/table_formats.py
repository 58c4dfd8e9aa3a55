"""A grid of texts as Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

from craft_experiments.table_grids import Grid
from prismatic.evidence.cells import markdown_cell, one_line

# --- Markdown -----------------------------------------------------------------------------------------------------


def markdown(grid: Grid) -> list[str]:
    """Lines of a Markdown table."""
    names = [_heading(group, name) for group, name in zip(grid.groups, grid.header, strict=True)]
    lines = [f"| {' | '.join([grid.corner, *map(markdown_cell, names)])} |", "|---" * (len(names) + 1) + "|"]
    for row in grid.rows:
        label = f"*{markdown_cell(row.label)}*" if row.control else markdown_cell(row.label)
        cells = [f"**{markdown_cell(c)}**" if i in row.bold else markdown_cell(c) for i, c in enumerate(row.cells)]
        lines.append(f"| {' | '.join([label, *cells])} |")
    return lines


def _heading(group: str, name: str) -> str:
    """`standard: spatial`, `training (s)`."""
    if not (group and name):
        return group or name
    return f"{group} {name}" if name.startswith("(") else f"{group}: {name}"


# --- LaTeX --------------------------------------------------------------------------------------------------------

_LATEX = {
    "\\": r"\textbackslash{}",
    "_": r"\_",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "±": r"$\pm$",
    "†": r"$^{\dagger}$",
    "²": r"$^{2}$",
    "α": r"$\alpha$",
    "λ": r"$\lambda$",
    "ε": r"$\varepsilon$",
}
_WIDE = 6  # columns that fit a page without scaling


def latex_text(text: str) -> str:
    """Escaped for LaTeX; letters outside ASCII that have no entry stay as they are (UTF-8 input)."""
    return "".join(_LATEX.get(letter, letter) for letter in one_line(text))


def latex(grid: Grid, caption: str, label: str, notes: Sequence[str]) -> str:
    """A `table` float; needs the packages booktabs and, for more than six columns, graphicx."""
    wide = len(grid.header) > _WIDE
    begin, end = (r"\resizebox{\textwidth}{!}{%", "}") if wide else ("", "")
    lines = [
        f"% \\usepackage{{booktabs{',graphicx' if wide else ''}}}",
        r"\begin{table}[tb]",
        r"\centering\small",
        f"\\caption{{{latex_text(caption)}}}",
        f"\\label{{tab:{label}}}",
        begin,
        f"\\begin{{tabular}}{{l{'r' * len(grid.header)}}}",
        r"\toprule",
        *_latex_header(grid),
        r"\midrule",
        *_latex_rows(grid),
        r"\bottomrule",
        r"\end{tabular}" + end,
        *(f"\\par\\footnotesize {latex_text(note)}" for note in notes),
        r"\end{table}",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def _latex_header(grid: Grid) -> list[str]:
    spans: list[tuple[str, int, int]] = []  # heading, first and last column, counted from 2 behind the labels
    for position, group in enumerate(grid.groups, start=2):
        if spans and spans[-1][0] == group:
            spans[-1] = (group, spans[-1][1], position)
        else:
            spans.append((group, position, position))
    titles = [f"\\multicolumn{{{last - first + 1}}}{{c}}{{{latex_text(g)}}}" for g, first, last in spans]
    rules = "".join(f"\\cmidrule(lr){{{first}-{last}}}" for _, first, last in spans)
    names = [latex_text(name) for name in (grid.corner, *grid.header)]
    return [f" & {' & '.join(titles)} \\\\", rules, f"{' & '.join(names)} \\\\"]


def _latex_rows(grid: Grid) -> list[str]:
    lines: list[str] = []
    ruled = False
    for row in grid.rows:
        if row.control and not ruled and lines:
            lines.append(r"\midrule")
        ruled = ruled or row.control
        label = f"\\textit{{{latex_text(row.label)}}}" if row.control else latex_text(row.label)
        cells = [f"\\textbf{{{latex_text(c)}}}" if i in row.bold else latex_text(c) for i, c in enumerate(row.cells)]
        lines.append(f"{' & '.join([label, *cells])} \\\\")
    return lines
