"""Writes the report of a table from its records: `{table}.md`, CSV files, `{table}.tex` and the figures.

    {table}.md              success rates, differences, measures, figures, and how it was made
    {table}.csv             success rates: seeds, episodes, intervals
    {table}_pairs.csv       paired comparisons with plain fine-tuning and with the start checkpoint
    {table}_measures.csv    drift, multiplier, loss, time, and what retention was measured
    {table}.tex             success rates and measures
    figures/{table}_*.png   and the same as .pdf

The same records give the same bytes.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from statistics import fmean

from craft_experiments.cells import Method, Role
from craft_experiments.figures.write import write_figures
from craft_experiments.hypotheses import page as hypotheses_page
from craft_experiments.hypotheses import verdicts
from craft_experiments.jobs.base import as_words
from craft_experiments.preset import Preset
from craft_experiments.settings import RunConfig, Settings, preset_of
from craft_experiments.table_csv import measures_csv, pairs_csv, success_csv
from craft_experiments.table_data import TableData, load, training_of
from craft_experiments.table_formats import latex, markdown
from craft_experiments.table_grids import (
    NOTES,
    budget_grid,
    comparison_grid,
    has_start_kinds,
    measure_grid,
    ordered,
    success_grid,
    trade_off_grid,
)
from craft_experiments.table_measures import RETENTION_MEASURES, START_MEASURES, TRAINING_MEASURES
from craft_experiments.tables import Table
from prismatic.evidence.files import write_text

FIGURES = "figures"
_MEASURED = (
    "Drift, CKA, probes and L1: on held-out demonstrations of the start's tasks. Mean ± half width of the 95 % "
    "interval over the seeds (Student t); (1): one seed."
)
_TRAINED = (
    "Drift and losses: means over the last quarter of the logged steps. Drift is in the unit of the method's own "
    "metric and features; rows with other metrics or features cannot be compared by it. Seconds are those of the "
    "program's last start when it was interrupted. Mean ± half width of the 95 % interval over the seeds (Student t); "
    "(1): one seed."
)
# Where things are, and how they are launched, changes no number.
_NO_SETTINGS = {"data_root_dir", "num_gpus", "save_videos", "num_workers"}


def write_table_reports(s: Settings, table: Table) -> list[Path]:
    """Write everything, `{table}.md` last; returns the files.

    Raises:
        RecordError: see :func:`craft_experiments.table_data.load`.
    """
    data = load(s, table)
    figures = write_figures(data, s.results_dir / FIGURES)
    texts = {
        f"{table.name}.csv": success_csv(data),
        f"{table.name}_pairs.csv": pairs_csv(data),
        f"{table.name}_measures.csv": measures_csv(data),
        f"{table.name}.tex": _latex(data),
        f"{table.name}.md": page(s, data, {path.name: caption for path, caption in figures.values()}),
    }
    if table.name == "retention" and not s.preset.keep:  # H1 to H3 were asked of the archived start
        found = verdicts(data, training_of(table.requests[0].cell))
        texts["hypotheses.md"] = hypotheses_page(found)
    written = [path for png, _ in figures.values() for path in (png, png.with_suffix(".pdf"))]
    for name, text in texts.items():
        if text:
            write_text(s.results_dir / name, text)
            written.append(s.results_dir / name)
        else:
            (s.results_dir / name).unlink(missing_ok=True)
    return written


def _latex(data: TableData) -> str:
    """One float for the success rates, one for each kind of measures."""
    name, title = data.table.name, data.table.title
    parts = [latex(success_grid(data), title, name, NOTES)]
    for measures, key, note in ((RETENTION_MEASURES, "kept", _MEASURED), (TRAINING_MEASURES, "training", _TRAINED)):
        grid = measure_grid(data, measures)
        if grid is not None:
            parts.append(latex(grid, f"{title} ({key})", f"{name}-{key}", [note]))
    return "\n".join(parts)


def page(s: Settings, data: TableData, figures: Mapping[str, str]) -> str:
    """The Markdown page. figures: name of the PNG -> caption."""
    name = data.table.name
    lines = [
        f"# {data.table.title}",
        "",
        f"Preset `{s.preset.name}`, {data.complete} of {data.wanted} cells complete. Written by "
        f"`python -m craft_experiments report {name}` from the records alone; the numbers are in `{name}.csv`, "
        f"`{name}_pairs.csv` and `{name}_measures.csv`.",
        "",
        "## Success",
        "",
        *markdown(success_grid(data)),
        "",
        *(f"* {note}" for note in NOTES),
        "",
        *_comparisons(data),
        *_measures(data),
        *_figures(figures),
        *_provenance(s, data),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _comparisons(data: TableData) -> list[str]:
    lines: list[str] = []
    for title, before, found in (
        ("Compared with plain fine-tuning", "plain fine-tuning", data.against_plain),
        ("Compared with the start checkpoint on its tasks", "the start checkpoint", data.against_start),
    ):
        grid = comparison_grid(data, found)
        if grid is None:
            continue
        lines += [f"## {title}", ""]
        lines += [
            f"Success minus that of {before} in percentage points, on the episodes (seed, task, initial state) that "
            "both have. Brackets: 95 % bootstrap interval, pairs drawn again within each seed and task; it says "
            "nothing about other seeds or tasks. p: exact McNemar test, Holm's correction within the column.",
            "",
            *markdown(grid),
            "",
        ]
    return lines


def _measures(data: TableData) -> list[str]:
    lines: list[str] = []
    grid = measure_grid(data, RETENTION_MEASURES)
    if grid is not None:
        lines += ["## What is kept of the start model", ""]
        if has_start_kinds(data):
            lines += [_forgetting_note(data), ""]
        lines += [
            _MEASURED + " " + _before(data),
            "",
            *markdown(grid),
            "",
        ]
    grid = trade_off_grid(data)
    if grid is not None:
        lines += [
            "What is learned against what is lost, lowest action error first; held-out demonstrations of both.",
            "",
        ]
        lines += [*markdown(grid), ""]
    grid = measure_grid(data, TRAINING_MEASURES)
    if grid is not None:
        lines += ["## Training", ""]
        lines += [
            _TRAINED,
            "",
            *markdown(grid),
            "",
        ]
    grid = budget_grid(data)
    if grid is not None:
        lines += ["Drift against its budget, over all trainings; deviation: |drift - budget| / budget.", ""]
        lines += [*markdown(grid), ""]
    return lines


def _before(data: TableData) -> str:
    """The start checkpoint's own numbers, which are the same in all measurements."""
    parts = []
    for measure in START_MEASURES:
        found = [v for values in data.values.values() for v in values.get(measure.key, {}).values()]
        if found:
            parts.append(f"{measure.label} {fmean(found):.3g}")
    return f"The start checkpoint itself: {', '.join(parts)}." if parts else ""


def _forgetting_note(data: TableData) -> str:
    text = (
        "Success lost: the start checkpoint's success on its tasks minus the success after training. Forgetting: L1 of "
        "the start's head on the trained features minus its L1 on its own, on held-out demonstrations."
    )
    entries = [e for (key, _), e in data.entries.items() if key == "start"]
    seeds = sorted({seed for entry in entries for seed in entry.rates})
    asked = {seed for (key, _), entry in data.entries.items() if key == "plain" for seed in entry.wanted}
    if seeds and asked - set(seeds):
        known = ", ".join(map(str, seeds))
        text += f" The start checkpoint was evaluated with seed {known}; the other seeds are compared with its mean."
    return text


def _figures(figures: Mapping[str, str]) -> list[str]:
    lines = ["## Figures", ""] if figures else []
    for name, caption in figures.items():
        lines += [f"![{caption}]({FIGURES}/{name})", "", caption, ""]
    return lines


# --- How it was made ----------------------------------------------------------------------------------------------


def _provenance(s: Settings, data: TableData) -> list[str]:
    hours = sum(data.seconds.values()) / 3600
    lines = ["## How it was made", "", "```bash", shlex.join(run_command(s, data.table)), "```", ""]
    lines += [
        f"* {data.complete} of {data.wanted} cells complete.",
        f"* {hours:.1f} hours of programs: the recorded seconds of {len(data.seconds)} trainings, evaluations and "
        "measurements, each with the cores of one slot. Tables share cells, and count them again.",
        *data.origins,
        *_coverage(s.preset, data),
        *(f"* Failed: `{cell}` ({code})." for cell, code in data.codes.items()),
        "",
        "Folders are left out of the command: they change no number. What a method adds to the training and "
        "evaluation flags of the preset:",
        "",
        "| method | flags |",
        "|---|---|",
        *(f"| {method.label} | {flags_text(method)} |" for method in ordered(data.table.methods)),
        "",
    ]
    return lines


def _coverage(preset: Preset, data: TableData) -> list[str]:
    """A line per suite with its task numbers."""
    trained = dict.fromkeys(suite for request in data.table.requests for suite in request.cell.suites)
    lines = [f"* {suite}: {_tasks(preset.task_ids[suite])}." for suite in trained]
    if has_start_kinds(data):
        lines.append(f"* Start's tasks, {preset.start_suite}: {_tasks(preset.start_task_ids)}.")
    return lines


def _tasks(numbers: str) -> str:
    return f"tasks {', '.join(numbers.split(','))}" if numbers else "all tasks"


def flags_text(method: Method) -> str:
    """What a row adds to the flags of the preset, `none` for nothing."""
    trained = shlex.join(as_words(method.train))
    evaluated = shlex.join(as_words(method.evaluate))
    parts = [f"`{trained}`"] if trained else []
    if evaluated:
        parts.append(f"evaluation: `{evaluated}`")
    if method.role is Role.INTERPOLATED:
        chosen = f" --parts {method.parts}" * (method.parts != "all")
        parts.append(f"`--adapter_scale {method.scale:g}{chosen}` on {method.parent}, no training")
    return "; ".join(parts) or ("none" if method.role is Role.TRAINED else "no training")


def run_command(s: Settings, table: Table) -> list[str]:
    """The command that makes the records: the preset, and what differs from it.

    Folders, launchers, video and process flags are left out.
    """
    usual, now = preset_of(s.preset.name, table.name), s.preset
    flags: dict[str, object] = {"preset": now.name}
    names = {field.name for field in fields(Preset)} & {field.name for field in fields(RunConfig)} - _NO_SETTINGS
    for name in sorted(names - {"task_ids"}):
        if getattr(now, name) != getattr(usual, name):
            value = getattr(now, name)
            flags[name] = ",".join(map(str, value)) if isinstance(value, tuple) else value
    if now.task_ids != usual.task_ids:
        flags["task_ids"] = next(iter(now.task_ids.values()))
    if now.start != usual.start:
        flags["config_file_path"] = now.start
    if now.demos_per_task != usual.demos_per_task:
        flags["num_demos"] = now.demos_per_task
    if (now.collect is None) != (usual.collect is None):
        flags["collect_demos"] = now.collect is not None
    for mine, theirs in ((now.craft, usual.craft), (now.train, usual.train), (now.evaluate, usual.evaluate)):
        flags |= _changed(mine, theirs)
    flags |= _settings_flags(s)
    return ["python", "-m", "craft_experiments", "run", table.name, *as_words(flags)]


def _changed(now: Mapping[str, object], usual: Mapping[str, object]) -> dict[str, object]:
    """Flags of the table driver for changed flags of the programs."""
    known = {field.name for field in fields(RunConfig)} - _NO_SETTINGS
    found = {}
    for flag, value in now.items():
        name = flag if flag in known else flag.removeprefix("craft_")
        if name in known and usual.get(flag) != value:
            found[name] = value
    return found


def _settings_flags(s: Settings) -> dict[str, object]:
    usual = RunConfig()
    flags = {
        "methods": ",".join(s.methods),
        "controls": s.controls,
        "num_images": s.num_images,
        "vlm_path": s.vlm_path,
        "extra_train_args": shlex.join(s.extra_train),
        "extra_eval_args": shlex.join(s.extra_eval),
    }
    return {name: value for name, value in flags.items() if value != getattr(usual, name)}
