"""Writes one page on several records of the demo, seeds of one setting together, and a picture of the first setting.

    python craft_experiments/00_demo/compare_records.py results/keep

Reads every `manifest.json` below the folder, and what it names; writes `report.md` and `picture_*.svg` there. Records
that differ in nothing but `OWN` (seed, folders, what was evaluated) are one setting. Every number is computed here from
the raw files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo_results import COLUMN_LABELS, ROW_LABELS, TRAINED, DemoResults, load_results, row_label
from make_report import OUT_OF_REACH, number
from picture import draw_picture
from run_demo import DemoConfig

from craft_experiments.common_utils.plots import DRIFT
from craft_experiments.common_utils.report_folder import read_folder
from prismatic.command_line import bad_input_in_one_line
from prismatic.evidence.checks import check_fields
from prismatic.evidence.files import write_text
from prismatic.evidence.results import Evaluation
from prismatic.evidence.statistics import mean_and_half_width

OWN = ("seed", "work_dir", "record_dir", "rows", "trials", "sentence_trials")
"""Settings in which records of one group may differ."""
DEFAULTS = asdict(DemoConfig())
Settings = tuple[tuple[str, Any], ...]


def main() -> None:
    """Write the page of the folder that the command line names."""
    print(f"report: {write_page(read_folder(__doc__))}")


def write_page(folder: Path) -> Path:
    """Write the page of a folder of records. Raises what `load_results` and `check_settings` raise."""
    records = [load_results(path.parent) for path in sorted(folder.rglob("manifest.json"))]
    if not records:
        raise FileNotFoundError(f"{folder}: found no manifest.json below it; run_demo.py --record_dir makes one")
    for record in records:
        check_settings(record)
    page = folder / "report.md"
    write_text(page, compose(records, folder))
    draw_picture(next(iter(groups(records).values())), folder)
    return page


def check_settings(record: DemoResults) -> None:
    """Raise ValueError, which names the manifest, for settings that are not those of a demo."""
    settings, where = record.manifest.get("settings", {}), str(record.folder / "manifest.json")
    if "seed" not in settings:
        raise ValueError(f"{where}: settings.seed: found none, expected a whole number")
    kinds: dict[str, type | tuple[type, ...]] = {
        name: (int, float) if isinstance(value, float) else type(value) for name, value in DEFAULTS.items()
    }
    check_fields(settings, kinds, f"{where}: settings")


def compose(records: Sequence[DemoResults], folder: Path) -> str:
    """The page's Markdown."""
    sections = [
        "# Records of the demo, seed by seed",
        "Successes of each training seed, in the order of the seeds; with several also the mean rate and half of its "
        "95 % interval (Student t). One seed is an anecdote. Drift: mean over the last tenth of the logged steps, in "
        "the unit of the budget. `x plain`: wall time of the training against plain in the same record, on a machine "
        "that did other things besides.",
    ]
    for settings, group in groups(records).items():
        names = ", ".join(f"[{r.folder.relative_to(folder)}]({r.folder.relative_to(folder)}/report.md)" for r in group)
        seeds = ", ".join(str(r.manifest["settings"]["seed"]) for r in group)
        sections += [f"## {title(settings)}", f"Seeds {seeds}: {names}.", table(group), *against_plain(group)]
    return "\n\n".join(sections) + "\n"


def groups(records: Sequence[DemoResults]) -> dict[Settings, list[DemoResults]]:
    """Records by setting, larger groups first, seeds ascending."""
    found: dict[Settings, list[DemoResults]] = {}
    for record in sorted(records, key=lambda r: r.manifest["settings"]["seed"]):
        settings = DEFAULTS | record.manifest["settings"]
        found.setdefault(tuple((k, v) for k, v in settings.items() if k not in OWN), []).append(record)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def title(settings: Settings) -> str:
    """What the setting is: its start, steps, and what differs from the demo's defaults."""
    values = dict(settings)
    named = [Path(values.pop("start")).name, f"{values.pop('max_steps')} steps"]
    other = [f"{k} `{v}`" for k, v in values.items() if v != DEFAULTS.get(k) and k != "start_statistics"]
    return ", ".join([*named, *other])


def table(group: Sequence[DemoResults]) -> str:
    """A line per row of the demo."""
    columns = list(dict.fromkeys(column for record in group for column in record.table))
    rows = [row for row in ROW_LABELS if any(row in cells for r in group for cells in r.table.values())]
    heads = ["policy", *(COLUMN_LABELS.get(column, column) for column in columns)]
    heads += ["drift", "budget", "out of reach at the end", "x plain"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [rates([r.table[c][row] for r in group if row in r.table.get(c, {})]) for c in columns]
        lines.append("| " + " | ".join([row_label(row), *cells, *training_cells(group, row)]) + " |")
    return "\n".join(lines)


def rates(found: Sequence[Evaluation]) -> str:
    """``19, 18, 20 of 20 (0.95 ± 0.12)``."""
    if not found:
        return "-"
    if any(e.errors for e in found):
        return "**errors: not valid**"
    counts = ", ".join(f"{e.successes}/{e.trials}" for e in found)
    if len({e.trials for e in found}) == 1:
        counts = ", ".join(str(e.successes) for e in found) + f" of {found[0].trials}"
    mean, half = mean_and_half_width([e.rate for e in found])
    return counts if half is None else f"{counts} ({mean:.2f} ± {half:.2f})"


def training_cells(group: Sequence[DemoResults], row: str) -> list[str]:
    """Drift, budget, verdict and relative time of a row's trainings."""
    runs = [(record, run) for record in group for run in record.runs if run.row == row]
    drifts = [d for _, run in runs if run.budget and (d := run.metrics.tail_mean(DRIFT)) is not None]
    words = [values[-1] > 0 for _, run in runs if (values := run.metrics.series(OUT_OF_REACH)[1])]
    times = [(record.seconds(f"train-{row}"), record.seconds("train-plain")) for record, _ in runs]
    return [
        ", ".join(number(d) for d in drifts) or "-",
        number(next((run.budget for _, run in runs if run.budget), None)),
        f"{sum(words)} of {len(words)}" if words else "-",  # the controller's last word
        ", ".join(f"{own / plain:.2f}" for own, plain in times if own and plain) or "-",
    ]


def against_plain(group: Sequence[DemoResults]) -> list[str]:
    """Per trained row, its difference from plain of the same seed on the new task."""
    lines = []
    for row in TRAINED[1:]:
        pairs = [
            (cells[row].rate, cells["plain"].rate)
            for r in group
            if row in (cells := r.table.get("target", {})) and "plain" in cells
        ]
        if len(pairs) > 1:
            mean, half = mean_and_half_width([a - b for a, b in pairs])
            lines.append(f"- {row_label(row)}: new task {mean:+.2f} ± {half:.2f} against plain of the same seed.")
    return ["\n".join(lines)] if lines else []


if __name__ == "__main__":
    with bad_input_in_one_line("compare_records.py"):
        main()
