"""`table1_results.log` and `table1_formatted.md`: a success rate, or the code of its failure, per suite."""

from __future__ import annotations

from collections.abc import Mapping
from math import fsum
from pathlib import Path

from craft_experiments.cells import Evaluation, Kind, Method
from craft_experiments.common_utils.log_parser import format_comparison_table, format_results_table
from craft_experiments.records import read_manifest, read_record, record_path
from craft_experiments.tables import Table
from prismatic.evidence.failure_codes import FailureCode
from prismatic.evidence.files import write_text

Rates = dict[str, float | FailureCode]


def suite_rates(records_dir: Path, table: Table, method: Method) -> Rates:
    """suite -> success rate on the standard suite, mean over the seeds; one failed seed makes it that failure.

    Suites without any finished or failed run are left out.
    """
    manifest = read_manifest(records_dir)
    found: dict[str, list[float | FailureCode]] = {}
    for request in table.requests:
        cell = request.cell
        if cell.method.key != method.key or len(cell.suites) != 1:
            continue
        path = record_path(records_dir, cell.name, Evaluation(Kind.STANDARD, cell.suites[0]).name)
        if path.exists():
            found.setdefault(cell.suites[0], []).append(read_record(path)["rate"])
        elif "code" in manifest.get(cell.name, {}):
            found.setdefault(cell.suites[0], []).append(FailureCode(manifest[cell.name]["code"]))
    return {suite: _one_value(values) for suite, values in found.items()}


def _one_value(values: list[float | FailureCode]) -> float | FailureCode:
    failed = [value for value in values if isinstance(value, FailureCode)]
    rates = [value for value in values if not isinstance(value, FailureCode)]
    return failed[0] if failed else fsum(rates) / len(rates)


def write_result_lists(records_dir: Path, results_dir: Path, table: Table) -> list[Path]:
    """Write the list and the table of every method; CRaFT's carry the plain names, the others' their own.

    With several methods also `table1_comparison.md`.
    """
    columns: dict[str, Rates] = {}
    written = []
    for method in table.methods:
        rates = suite_rates(records_dir, table, method)
        if not rates or method.control:
            continue
        columns[method.key] = rates
        suffix, label = ("", "CRaFT") if method.key == "craft" else (f"_{method.key}", method.key)
        lines = "".join(f"{suite}: {_as_line(value)}\n" for suite, value in rates.items())
        text = format_results_table(rates, f"{table.title} ({label})")
        for name, content in (
            (f"{table.name}_results{suffix}.log", lines),
            (f"{table.name}_formatted{suffix}.md", text),
        ):
            write_text(results_dir / name, content)
            written.append(results_dir / name)
    if len(columns) > 1:
        written.append(results_dir / f"{table.name}_comparison.md")
        write_text(written[-1], format_comparison_table(columns, table.title))
    return written


def _as_line(value: float | FailureCode) -> str:
    return value.value if isinstance(value, FailureCode) else f"{value:.4f}"


def failed_cells(manifest: Mapping[str, Mapping[str, str]], table: Table) -> dict[str, str]:
    """Cells of the table that failed, with their codes."""
    names = {request.cell.name for request in table.requests}
    return {name: entry["code"] for name, entry in manifest.items() if name in names and "code" in entry}
