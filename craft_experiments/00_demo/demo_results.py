"""The demo's raw result files: what its manifest names, read and checked.

`results/demo/manifest.json` names the files; paths in it are relative to its folder::

    {"runs": [{"name": "keep", "metrics": "metrics/keep.jsonl", "checkpoint": "metrics/keep.json"}, ...],
     "evaluations": [{"row": "keep", "column": "target", "results_dir": "evaluations/keep-target"}, ...],
     "settings": {...}, "commands": {"train-plain": "python ..."}, "seconds": {"train-plain": 310.2}}

Only `runs` and `evaluations` are required; `title` replaces the demo's. A run's `checkpoint` is the description in its
last checkpoint (`craft_checkpoint.json`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismatic.evidence.checks import check_fields, read_object
from prismatic.evidence.results import Evaluation, TrainingMetrics, read_evaluation, read_metrics

ROW_LABELS = {
    "start": "start",
    "plain": "plain",
    "replay": "replay",
    "keep": "CRaFT keep, no old data",
    "keep_data": "CRaFT keep, with old observations",
    "features": "CRaFT on features",
    "playback": "control: playback of a demonstration",
    "grey": "control: plain, grey images",
}
TRAINED = ("plain", "replay", "keep", "keep_data", "features")
COLUMN_LABELS = {"target": "new task", "memory": "old task in memory", "sentence": "old task known by its sentence"}
OLD = ("memory", "sentence")


@dataclass(frozen=True)
class Training:
    """One run: its row, metrics, and the flags its checkpoint records ({} where the manifest names no checkpoint)."""

    row: str
    metrics: TrainingMetrics
    flags: dict[str, Any]

    @property
    def budget(self) -> float | None:
        """eps in the unit of the logged drift; None for a run without a constraint."""
        return self.flags.get("craft_retention_budget") if self.flags.get("use_craft") else None

    @property
    def unit(self) -> str:
        """Unit of drift and budget."""
        if self.flags.get("craft_signal") == "actions":
            return "RMS of normalised actions"
        return f"{self.flags.get('craft_retention_metric', 'mse')} of features"


@dataclass(frozen=True)
class DemoResults:
    """All inputs of the report. ``table[column][row]`` in manifest order."""

    folder: Path
    manifest: dict[str, Any]
    runs: list[Training]
    table: dict[str, dict[str, Evaluation]]

    def seconds(self, job: str) -> float | None:
        """Wall time of a job of the manifest; None when it is not recorded."""
        value = self.manifest.get("seconds", {}).get(job)
        return None if value is None else float(value)


def load_results(folder: str | os.PathLike) -> DemoResults:
    """Read the manifest and everything it names.

    Raises:
        FileNotFoundError: the manifest or a file it names does not exist.
        KeyError: a required entry of the manifest is missing; names it.
        ValueError: an unreadable result file, an entry of another type, or a (row, column) listed twice; names it.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"manifest not found: {path}")
    manifest = read_object(path)
    _check_facts(manifest, str(path))
    for entries, names in (("runs", ("name", "metrics")), ("evaluations", ("row", "column", "results_dir"))):
        if entries not in manifest:
            raise KeyError(f"{path}: {entries}: missing")
        check_fields(manifest, {entries: list}, str(path))
        for index, entry in enumerate(manifest[entries]):
            _check_entry(folder, entry, names, f"{path}: {entries}[{index}]")
    runs = [read_training(folder, entry) for entry in manifest["runs"]]
    table: dict[str, dict[str, Evaluation]] = {}
    for entry in manifest["evaluations"]:
        cells = table.setdefault(entry["column"], {})
        if entry["row"] in cells:
            raise ValueError(f"{path}: evaluations: ({entry['row']}, {entry['column']}) is listed twice")
        cells[entry["row"]] = read_evaluation(folder / entry["results_dir"])
    return DemoResults(folder, manifest, runs, table)


def _check_facts(manifest: dict[str, Any], where: str) -> None:
    check_fields(manifest, {"title": str, "settings": dict, "commands": dict, "seconds": dict}, where)
    scalar = (str, int, float, bool, type(None))
    for name, kind in (("settings", scalar), ("commands", (str,)), ("seconds", (int, float))):
        facts = manifest.get(name, {})
        check_fields(facts, dict.fromkeys(facts, kind), f"{where}: {name}")
    check_fields(manifest.get("settings", {}), {"old_init_noise_mm": (int, float)}, f"{where}: settings")


def _check_entry(folder: Path, entry: Any, names: tuple[str, ...], where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: found {entry!r:.80}, expected an object")
    missing = [name for name in names if name not in entry]
    if missing:
        raise KeyError(f"{where}: missing {missing}")
    check_fields(entry, dict.fromkeys((*names, "checkpoint"), str), where)
    for name in {"metrics", "checkpoint", "results_dir"} & entry.keys():
        if "\0" in entry[name] or not (folder / entry[name]).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{where}: {name}: found {entry[name]!r:.80}, expected a path below {folder}")


def read_training(folder: Path, entry: dict[str, Any]) -> Training:
    """The run of a manifest entry. Raises what `read_metrics` raises, and KeyError for a checkpoint without flags."""
    flags = {}
    if "checkpoint" in entry:
        where = str(folder / entry["checkpoint"])
        record = read_object(folder / entry["checkpoint"])
        if "training" not in record:
            raise KeyError(f"{where}: training: missing, expected the flags of the run")
        check_fields(record, {"training": dict}, where)
        flags = record["training"]
        check_fields(flags, {"craft_retention_budget": (int, float, type(None))}, f"{where}: training")
    return Training(entry["name"], read_metrics(row_label(entry["name"]), folder / entry["metrics"]), flags)


def row_label(row: str) -> str:
    """Reader's name of a row of the table or of its run."""
    return ROW_LABELS.get(row, row)
