"""Watch a run: losses, drift against its budget, speed and time left, from the files that it writes.

craft-watch RUN_DIR

On a terminal the page is drawn again every two seconds until the run ends; Ctrl-C ends the watching, not the run.
Elsewhere, and with --once, it is printed once. RUN_DIR is `{run_root_dir}/{run_id}` of craft-finetune.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from prismatic.command_line import MISTAKES, OneLineParser, bad_input_in_one_line
from prismatic.training.watch_page import BLOCKS, Screen, page
from prismatic.training.watched_run import WatchedRun

PROGRAM = "craft-watch"
_SECONDS = 2.0
_UNKNOWN_SIZE = (80, 24)


def main(argv: Sequence[str] | None = None) -> None:
    """Watch; exit code 0 at the end of the run and after Ctrl-C, 2 for a folder that is not that of a run."""
    parser = OneLineParser(prog=PROGRAM, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of a run, which holds metrics.jsonl")
    parser.add_argument("--once", action="store_true", help="print the page once, also on a terminal")
    args = parser.parse_args(argv)
    with bad_input_in_one_line(PROGRAM, MISTAKES):
        run = WatchedRun(args.run_dir)
        try:
            if args.once or not _can_redraw(sys.stdout):
                print("\n".join(page(run.look(), _screen(sys.stdout))), flush=True)
            else:
                watch(run, sys.stdout, time.sleep)
        except KeyboardInterrupt:
            return
        except BrokenPipeError:  # the reader has seen enough; what is left in the buffer goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def watch(run: WatchedRun, stream: TextIO, wait: Callable[[float], None]) -> None:
    """Draw the page again and again, each over the one before, until the run is not running any more.

    Args:
        run: to look at.
        stream: a terminal.
        wait: seconds until the next page.
    """
    above = 0
    while True:
        view = run.look()
        lines = page(view, _screen(stream))[: max(1, _size()[1] - 1)]  # what scrolls away cannot be drawn over
        stream.write((f"\x1b[{above}F" if above else "") + "\x1b[J" + "\n".join(lines) + "\n")
        stream.flush()
        above = len(lines)
        if view.state != "running":
            return
        wait(_SECONDS)


def _can_redraw(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def _screen(stream: TextIO) -> Screen:
    """Blocks only where they can be shown: on a terminal whose encoding has them."""
    if not stream.isatty():
        return Screen(_UNKNOWN_SIZE[0])
    try:
        BLOCKS.levels.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return Screen(_size()[0])
    return Screen(_size()[0], BLOCKS)


def _size() -> tuple[int, int]:
    """Columns and lines of the terminal; of one that does not say, those of the oldest ones."""
    columns, lines = shutil.get_terminal_size(_UNKNOWN_SIZE)
    return columns, lines


if __name__ == "__main__":
    main()
