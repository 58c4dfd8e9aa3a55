"""Writes the report of the bench `keep` from its records: `keep.md`, CSV files, `keep.tex` and figures.

    keep.md              verdicts, three columns, LIBERO's measures, success matrix, recovery, cost, how it was made
    keep.csv             row, measure, seed by seed
    keep_matrix.csv      row, seed, stage, task, checkpoint: successes and episodes
    keep_tests.csv       every comparison with its tests
    keep.tex             the columns and the measures
    figures/keep_*.png   and the same as .pdf

The same records give the same bytes.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

from craft_experiments.cells import Evaluation, Kind, Method
from craft_experiments.figures.keep import write_keep_figures
from craft_experiments.keep_costs import relative_work
from craft_experiments.keep_data import KeepData, load_keep, rate
from craft_experiments.keep_metrics import steps_to_recover
from craft_experiments.keep_verdicts import Difference, Verdict, verdicts
from craft_experiments.keep_warnings import new_task_lines, start_lines
from craft_experiments.settings import Settings
from craft_experiments.table_csv import csv_text, pairs_text
from craft_experiments.table_formats import latex, markdown
from craft_experiments.table_grids import MISSING, Grid, GridRow
from craft_experiments.table_reports import FIGURES, flags_text, run_command
from craft_experiments.tables import Table
from prismatic.evidence.files import write_text
from prismatic.evidence.statistics import mean_and_half_width

RECOVERED = 0.9
"""The old tasks are back at this share of the start's success."""
COLUMNS = {
    "new": "new tasks, as trained",
    "unseen": "new tasks, look not shown",
    "old_between": "old tasks, one new task later",
    "old": "old tasks, at the end",
}
LIBERO = {
    "final": "final success (higher)",
    "forward": "forward transfer (higher)",
    "backward": "negative backward transfer (lower)",
    "area": "area under the curve (higher)",
}
NOTES = (
    "Percent, mean over the training seeds ± half width of the 95 % interval (Student t over seeds). In brackets: the "
    f"number of seeds, where some are missing or not asked for. {MISSING}: not run.",
    "New tasks: each at the end of its own stage, displaced as its demonstrations, then with objects that look "
    "different, which no demonstration shows. Old tasks: mean over the start's tasks, displaced as they were learned.",
    "Secondary rows, in italics, have fewer seeds and a quarter of the episodes: no verdict rests on them.",
)


def write_keep_reports(s: Settings, table: Table) -> list[Path]:
    """Write everything, `keep.md` last; returns the files.

    Raises:
        RecordError: see :func:`craft_experiments.keep_data.load_keep`.
    """
    data = load_keep(s, table)
    found = verdicts(data)
    figures = write_keep_figures(data, s.results_dir / FIGURES)
    texts = {
        "keep.csv": csv_text(list(_value_rows(data))),
        "keep_matrix.csv": csv_text(list(_matrix_rows(data))),
        "keep_tests.csv": csv_text([_test_row(v, d) for v in found for d in v.differences]),
        "keep.tex": "\n".join(
            latex(value_grid(data, columns), f"{table.title} ({name})", f"keep-{name}", NOTES)
            for name, columns in (("success", COLUMNS), ("transfer", LIBERO))
        ),
        "keep.md": page(s, data, found, {path.name: caption for path, caption in figures.values()}),
    }
    for name, text in texts.items():
        write_text(s.results_dir / name, text)
    pictures = [path for png, _ in figures.values() for path in (png, png.with_suffix(".pdf"))]
    return [*pictures, *(s.results_dir / name for name in texts)]


def page(s: Settings, data: KeepData, found: list[Verdict], figures: Mapping[str, str]) -> str:
    """The Markdown page. figures: name of the PNG -> caption."""
    lines = [f"# {data.table.title}", "", *_state(s, data), "## Hypotheses", ""]
    lines += ["Asked and decided before: docs/experiments.md.", "", *new_task_lines(data)]
    for verdict in found:
        lines += _verdict_lines(verdict)
    lines += ["## What is learned and what is kept", "", *markdown(value_grid(data, COLUMNS)), ""]
    lines += [*(f"* {note}" for note in NOTES), ""]
    lines += ["## Transfer, as LIBERO defines it", "", _LIBERO_TEXT, "", *markdown(value_grid(data, LIBERO)), ""]
    lines += ["## Success matrix", "", _MATRIX_TEXT, "", *markdown(matrix_grid(data)), ""]
    lines += ["## Recovery", "", *_recovery_lines(data), "## Cost", "", _COST_TEXT, "", *markdown(cost_grid(data)), ""]
    lines += ["## Controls", "", *markdown(control_grid(data)), ""]
    if figures:
        lines += ["## Figures", ""]
    for name, caption in figures.items():
        lines += [f"![{caption}]({FIGURES}/{name})", "", caption, ""]
    return "\n".join([*lines, *_provenance(s, data)]).rstrip("\n") + "\n"


_LIBERO_TEXT = (
    "In percent; the word in brackets says what is better. Forward transfer: mean success in a new task over the "
    "checkpoints of its stage. Negative backward transfer: what later stages took from a task, below 0 is gain; mean "
    "over the tasks that a stage follows. Area: mean of both kinds of success over all tasks. What differs from "
    "LIBERO: craft_experiments/keep_metrics.py."
)
_MATRIX_TEXT = "Percent, mean over seeds: after each stage (row), in each task (column). Stage 0 is the start."
_COST_TEXT = (
    "Both stages together. Work: products of an optimizer step as a multiple of plain fine-tuning's (docs/IDEA.md, "
    "section 7). Time: seconds of processor, with GPUs on the clock; also as a ratio to plain of the same seed. "
    "Memory: largest resident size. Drift: mean of the last quarter of the steps, of the worse stage. Out of reach: "
    "seeds in which the budget was so at the end of a stage. Of an interrupted program: seconds of its last start."
)


def _state(s: Settings, data: KeepData) -> list[str]:
    there = data.wanted - len(data.missing)
    head = (
        f"Preset `{s.preset.name}`, {there} of {data.wanted} records. Written by `python -m craft_experiments report "
        f"{data.table.name}` from the records alone; the numbers are in `keep.csv`, `keep_matrix.csv` and "
        "`keep_tests.csv`."
    )
    lines = [head, ""]
    if data.missing:
        cells = dict.fromkeys(name.split("/")[1] for name in data.missing)
        shown = ", ".join(f"`{name}`" for name in list(cells)[:6])
        more = f" and {len(cells) - 6} more" if len(cells) > 6 else ""
        lines += [f"**Not finished.** Records are missing of {len(cells)} cells: {shown}{more}.", ""]
    failed = [f"* Failed: `{cell}` ({code})." for cell, code in data.codes.items()]
    return [*start_lines(data), *lines, *failed, *[""] * bool(failed)]


# --- Hypotheses ---------------------------------------------------------------------------------------------------


def _verdict_lines(verdict: Verdict) -> list[str]:
    lines = [f"### {verdict.name}: {verdict.decision}", "", verdict.question, ""]
    return [*lines, *(f"- {difference_text(found)}" for found in verdict.differences), ""]


def difference_text(found: Difference) -> str:
    """`keep_none minus plain, old tasks: +40.1 ± 20.0 points (5 seeds: ...), p = 0.003 ...`."""
    what = "old tasks at the end" if found.measure == "old" else "new tasks as trained"
    head = f"`{found.first}` minus `{found.second}`, {what}: "
    if not found.by_seed:
        return head + "no seed yet"
    half = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
    seeds = ", ".join(f"{100 * value:+.0f}" for value in found.by_seed.values())
    text = f"{head}{100 * found.mean:+.1f}{half} points (seeds: {seeds}; {len(found.by_seed)} of {found.wanted})"
    if found.p is not None:
        kind = (
            "two-sided"
            if found.two_sided
            else f"against {100 * found.bound:+.0f} points"
            if found.bound
            else "one-sided"
        )
        text += f", {p_text(found.p)} {kind}"
    if found.p_holm is not None:
        text += f", {p_text(found.p_holm)} after Holm's correction"
    if found.flips is not None:
        text += f", sign flips {p_text(found.flips)}"
    return f"{text}; pairs {found.only_first} : {found.only_second}, McNemar {p_text(found.p_pairs)}"


def p_text(value: float) -> str:
    """`p = 0.012`, `p < 0.001`."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


# --- Grids --------------------------------------------------------------------------------------------------------


def value_grid(data: KeepData, columns: Mapping[str, str]) -> Grid:
    """A row per method, a column per measure, in percent."""
    rows = []
    for method in data.rows():
        values = data.values.get(method.key, {})
        cells = tuple(percent_text(values.get(measure, {}), len(data.preset.seeds)) for measure in columns)
        rows.append(GridRow(method.label, cells, control=not data.is_primary(method)))
    return Grid("row", ("",) * len(columns), tuple(columns.values()), tuple(rows))


def percent_text(values: Mapping[int, float], usual: int) -> str:
    """`41.2 ± 10.3`, `41.2 ± 10.3 (2)`, `41.2 (1)`: the number of seeds where it is not the usual one."""
    if not values:
        return MISSING
    mean, half = mean_and_half_width(list(values.values()))
    width = "" if half is None else f" ± {100 * half:.1f}"
    return f"{100 * mean:.1f}{width}" + ("" if len(values) == usual else f" ({len(values)})")


def matrix_grid(data: KeepData) -> Grid:
    """A row per method and stage, a column per task."""
    tasks = [*data.old_tasks, *(task.name for task in data.bench.new_tasks)]
    rows = []
    for method in data.rows():
        courses = [data.course(method, seed) for seed in data.seeds(method)]
        for stage in range(len(data.bench.new_tasks) + 1):
            found = [[c.success[stage][task] for c in courses if task in c.success[stage]] for task in tasks]
            cells = tuple(f"{100 * fmean(values):.0f}" if values else MISSING for values in found)
            if stage and any(cell != MISSING for cell in cells):
                rows.append(GridRow(f"{method.label}: stage {stage}", cells, control=not data.is_primary(method)))
    start = data.method("start")
    found = [
        [c.success[0][task] for s in data.seeds(start) if task in (c := data.course(start, s)).success[0]]
        for task in tasks
    ]
    cells = tuple(f"{100 * fmean(values):.0f}" if values else MISSING for values in found)
    return Grid("row", ("",) * len(tasks), tuple(tasks), (GridRow("start: stage 0", cells), *rows))


def cost_grid(data: KeepData) -> Grid:
    """Work, time and memory of a row."""
    plain = data.values.get("plain", {}).get("time", {})
    rows = []
    for method in data.rows():
        values = data.values.get(method.key, {})
        seconds, memory = values.get("time", {}), values.get("memory", {})
        ratios = [seconds[seed] / plain[seed] for seed in sorted(seconds) if plain.get(seed)]
        work = relative_work(method)
        cells = (
            MISSING if work is None else f"{work:.2f}",
            f"{fmean(seconds.values()):.0f}" if seconds else MISSING,
            f"{fmean(ratios):.2f}" if ratios else MISSING,
            f"{max(memory.values()):.2f}" if memory else MISSING,
            f"{fmean(values['drift'].values()):.3g}" if values.get("drift") else MISSING,
            f"{sum(flags.values()):.0f} of {len(flags)}" if (flags := values.get("out_of_reach")) else MISSING,
        )
        rows.append(GridRow(method.label, cells, control=not data.is_primary(method)))
    header = ("work per step, x plain", "training, s", "x plain", "memory, GiB", "drift", "out of reach")
    return Grid("row", ("",) * len(header), header, tuple(rows))


def control_grid(data: KeepData) -> Grid:
    """Rows that do not see, or do not learn: successes of episodes."""
    asked = [("new", task.name) for task in data.bench.new_tasks] + [("start_tasks", data.preset.start_suite)]
    rows = []
    for method in data.table.methods:
        if not method.control:
            continue
        cells = []
        for kind, name in asked:
            # A policy that learned something is asked right after it had learned that task.
            cells_of = [r.cell for r in data.table.requests if r.cell.method.key == method.key]
            of_task = [cell for cell in cells_of if kind != "new" or (cell.tasks or (name,))[-1] == name]
            found = [outcomes for cell in of_task if (outcomes := data.found(cell, Kind(kind), name))]
            won = sum(sum(outcomes.values()) for outcomes in found)
            cells.append(f"{won} of {sum(map(len, found))}" if found else MISSING)
        rows.append(GridRow(method.label, tuple(cells), control=True))
    header = tuple(f"new task {name}" if kind == "new" else "old tasks" for kind, name in asked)
    return Grid("control", ("",) * len(header), header, tuple(rows))


def _recovery_lines(data: KeepData) -> list[str]:
    """Success in the old tasks while they are learned again."""
    steps = (0, *data.bench.recovery_steps)
    header = (*(f"{step} steps" for step in steps), f"steps to {100 * RECOVERED:.0f} % of the start")
    start = data.values.get("plain", {}).get("start", {}).get(data.preset.seeds[0])
    rows = []
    for key in data.bench.recovered:
        rates = data.recovery(key)
        back = None if start is None else steps_to_recover(rates, RECOVERED * start)
        asked = set(steps) <= rates.keys()
        last = str(back) if back is not None else f"more than {steps[-1]}" if asked and start is not None else MISSING
        cells = (*(f"{100 * rates[step]:.0f}" if step in rates else MISSING for step in steps), last)
        rows.append(GridRow(data.method(key).label, cells))
    text = (
        "The policies at the end of the sequence, fine-tuned plainly on other demonstrations of the old tasks at a "
        "constant rate; success in the old tasks in percent, one seed."
    )
    return [text, "", *markdown(Grid("row", ("",) * len(header), header, tuple(rows))), ""]


# --- CSV ----------------------------------------------------------------------------------------------------------


def _value_rows(data: KeepData) -> Iterator[dict[str, object]]:
    for method in data.rows():
        for measure, values in data.values.get(method.key, {}).items():
            mean, half = mean_and_half_width(list(values.values()))
            yield {
                "row": method.key,
                "label": method.label,
                "primary": int(data.is_primary(method)),
                "measure": measure,
                "seeds": len(values),
                "mean": mean,
                "half_width": half,
                "values": pairs_text(values),
            }


def _matrix_rows(data: KeepData) -> Iterator[dict[str, object]]:
    """Every evaluation of every cell, the old tasks one by one."""
    for request in data.table.requests:
        for evaluation in request.evaluations:
            found = data.outcomes.get((request.cell.name, evaluation.name), {})
            for task in sorted({task for task, _ in found}):
                outcomes = {place: won for place, won in found.items() if place[0] == task}
                yield _matrix_row(request.cell.method, request.cell.name, evaluation, task) | {
                    "seed": request.cell.seed,
                    "stage": len(request.cell.tasks or ()),
                    "successes": sum(outcomes.values()),
                    "episodes": len(outcomes),
                    "rate": rate(outcomes),
                }


def _matrix_row(method: Method, cell: str, evaluation: Evaluation, task: int) -> dict[str, object]:
    return {
        "row": method.key,
        "cell": cell,
        "kind": evaluation.kind.value,
        "asked": evaluation.suite,
        "task": task,
        "step": evaluation.step,
    }


def _test_row(verdict: Verdict, found: Difference) -> dict[str, object]:
    return {
        "hypothesis": verdict.name.split(",")[0],
        "first": found.first,
        "second": found.second,
        "measure": found.measure,
        "seeds": len(found.by_seed),
        "wanted": found.wanted,
        "difference": found.mean,
        "half_width": found.half_width,
        "by_seed": pairs_text(found.by_seed),
        "bound": found.bound,
        "two_sided": int(found.two_sided),
        "p": found.p,
        "p_holm": found.p_holm,
        "p_flips": found.flips,
        "only_first": found.only_first,
        "only_second": found.only_second,
        "p_pairs": found.p_pairs,
    }


def _compute(data: KeepData) -> list[str]:
    if data.seconds is None:
        return []
    kind = "on the clock" if data.preset.num_gpus else "of one core"
    return [f"* {data.seconds / 3600:.1f} hours {kind}: all recorded trainings and evaluations together."]


def _provenance(s: Settings, data: KeepData) -> list[str]:
    return [
        "## How it was made",
        "",
        "```bash",
        shlex.join(run_command(s, data.table)),
        "```",
        "",
        *_compute(data),
        *data.origins,
        f"* Start `{s.preset.start}`, tasks {s.preset.start_task_ids.replace(',', ', ')} of {s.preset.start_suite}. "
        "New tasks: "
        + "; ".join(f"{task.name}: {task.suite} task {task.task_id}" for task in data.bench.new_tasks)
        + ".",
        "",
        "What a row adds to the flags of the preset:",
        "",
        "| row | flags |",
        "|---|---|",
        *(f"| {method.label} | {_row_flags(method)} |" for method in data.table.methods),
    ]


def _row_flags(method: Method) -> str:
    memory = f"`--{method.memory_flag}` of {method.memory} per task" if method.memory else ""
    flags = flags_text(method)
    return "; ".join(part for part in (flags if flags != "none" else "", memory) if part) or "none"
