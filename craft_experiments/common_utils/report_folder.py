"""The command line of the programs that write a report beside the records it is made of: the name of a folder."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from prismatic.command_line import OneLineParser


def read_folder(description: str | None, default: str | None = None) -> Path:
    """The folder that the command line names, or `default`. A mistake ends the program with one line and code 2."""
    parser = OneLineParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    said = "" if default is None else f" (default: {default})"
    parser.add_argument("folder", type=Path, nargs=None if default is None else "?", help=f"of the records{said}")
    return parser.parse_args().folder or Path(default or "")
