"""The flags of the tables, written into the shell script, the PowerShell script and the README from one list.

    python -m craft_experiments.table_flags

The list is `RunConfig` (settings.py). A flag is an environment variable of the scripts: its name in capitals.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from craft_experiments.preset import Preset
from craft_experiments.presets import QWEN, SUITES, TINY
from craft_experiments.settings import RunConfig
from prismatic.command_line import OneLineParser, bad_input_in_one_line
from prismatic.evidence.files import write_text

_HERE = Path(__file__).parent
_RENAMED = {"work_dir": "RUN_ROOT_DIR"}
VARIABLES = {_RENAMED.get(entry.name, entry.name.upper()): entry.name for entry in fields(RunConfig)}
"""Environment variable -> flag."""
_ROW = re.compile(r"(\| `[A-Z_]+` \|[^|\n]*\|[^|\n]*\|[^|\n]*\|\n)+")


def pages() -> dict[Path, str]:
    """The three files as they should be."""
    pairs = "\n".join(f"{variable} {flag}" for variable, flag in VARIABLES.items())
    shell, power = (_HERE / "common_utils" / f"run_table.{ending}" for ending in ("sh", "ps1"))
    readme = _HERE / "01_main_results" / "README.md"
    return {
        shell: _replaced(shell, r'(?<=TABLE_FLAGS="\n)[^"]*(?=\n")', pairs),
        power: _replaced(power, r'(?<=TableFlags = @"\n)[^"]*(?=\n"@)', pairs),
        readme: _replaced(readme, _ROW.pattern, "".join(f"{row}\n" for row in rows())),
    }


def _replaced(file: Path, pattern: str, text: str) -> str:
    before = file.read_text(encoding="utf-8")
    found = re.findall(pattern, before)
    if len(found) != 1:
        raise ValueError(f"{file}: found {len(found)} lists of flags, expected one")
    return re.sub(pattern, lambda _: text, before)


def rows() -> list[str]:
    """Rows of the README: variable, what each preset says, meaning."""
    meanings = {entry.name: entry.metadata["help"] for entry in fields(RunConfig)}
    return [
        f"| `{variable}` | {_shown(_value(QWEN, flag))} | {_shown(_value(TINY, flag))} | {meanings[flag]} |"
        for variable, flag in VARIABLES.items()
    ]


def _value(preset: Preset, flag: str) -> object:
    """What holds when the variable is not set."""
    special = {
        "preset": preset.name,
        "suites": "the four suites" if preset.suites == SUITES else " ".join(preset.suites),
        "task_ids": "; ".join(preset.task_ids.values()).strip("; ") or "all",
        "config_file_path": preset.start,
        "collect_demos": preset.collect is not None,
        "num_demos": preset.demos_per_task,
    }
    if flag in special:
        return special[flag]
    for found in (preset.train, preset.evaluate):
        if flag in found:
            return found[flag]
    if f"craft_{flag}" in preset.craft:
        return preset.craft[f"craft_{flag}"]
    return getattr(preset, flag, getattr(RunConfig(), flag))


def _shown(found: object) -> str:
    if found is None or found == "":
        return "-"
    if isinstance(found, tuple):
        return " ".join(map(str, found))
    return f"{found:g}" if isinstance(found, float) else str(found)


def main() -> None:
    """Write the three files."""
    program = "python -m craft_experiments.table_flags"
    OneLineParser(prog=program, description="Write the flags of the tables into scripts and README.").parse_args()
    with bad_input_in_one_line(program):
        for file, text in pages().items():
            write_text(file, text)


if __name__ == "__main__":
    main()
