"""Writes the report of an evaluation: one HTML file that needs no network.

    python -m experiments.robot.libero.make_report RESULTS_DIR [--controls DIR,DIR] [--output FILE]

Rollout videos are embedded up to a size limit, else linked relative to the report. Exit code 0: written; 2: nothing to
report.
"""

from __future__ import annotations

import argparse
import base64
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from experiments.robot.libero.compare_evals import NotComparableError, compare_runs
from experiments.robot.libero.report_page import ControlRun, ReportData, Video, compose, control_label
from prismatic.command_line import OneLineParser, bad_input_in_one_line, in_range, split_places
from prismatic.evidence.episodes import EpisodeId, RecordedRun, read_run
from prismatic.evidence.files import write_text
from prismatic.output_folder import check_file

MEGABYTE = 1 << 20
EMBED_MB = 3.0
EMBED_TOTAL_MB = 40.0


class VideoError(ValueError):
    """A recording that may not go into a report; the message is its note there."""


class VideoFinder:
    """Finds recordings that may have moved together with their results folder.

    Args:
        folders: results folders and others; searched by file name, below them as well, when the recorded path leads
            nowhere.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = list(folders)
        self._by_name: dict[str, tuple[Path, Path]] | None = None

    def find(self, recorded: str) -> Path | None:
        """The file a record names: absolute and in one of the folders or in this one, or relative to the directory the
        run was started in (this one, or one above the folders); else one of its name in the folders. None for none.

        A record, or a link beside it, must not bring another file into a report.

        Raises:
            VideoError: links lead out of the folder that the file is named in, or to a file of another kind.
        """
        path = Path(recorded)
        if path.suffix != ".mp4" or "\0" in recorded:
            return None
        outside = False
        for place, root in [*self._places(path), *self._names(path.name)]:
            if place.is_file():
                real = place.resolve()
                if real.is_relative_to(root.resolve()) and real.suffix == ".mp4":
                    return place
                outside = True
        if outside:
            raise VideoError(f"not shown: {path.name} leads out of its folder")
        return None

    def _places(self, path: Path) -> list[tuple[Path, Path]]:
        """(where the file may be, the folder it must stay in)."""
        if path.is_absolute():  # elsewhere on the machine are files of others
            roots = [folder.absolute() for folder in (*self._folders, Path())]
            return [(path, root) for root in roots if path.is_relative_to(root)]
        above = [ancestor for folder in self._folders for ancestor in folder.resolve().parents[:-1]]
        return [(root / path, root) for root in (Path(), *above)]

    def _names(self, name: str) -> list[tuple[Path, Path]]:
        if self._by_name is None:
            self._by_name = {}
            for folder in self._folders:
                for path in sorted(folder.rglob("*.mp4")):
                    self._by_name.setdefault(path.name, (path, folder))
        return [self._by_name[name]] if name in self._by_name else []


def is_mp4(path: Path) -> bool:
    """Whether a file is made of the boxes of an MP4: `ftyp` first, then others up to its end, one of them `moov`."""
    size, place = path.stat().st_size, 0
    kinds: list[bytes] = []
    with open(path, "rb") as file:
        while place < size and len(kinds) < 10_000:
            file.seek(place)
            head = file.read(16)
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            if length == 1:
                length = int.from_bytes(head[8:16], "big")
            length = size - place if length == 0 else length  # up to the end
            if length < 8 or not kind.isalnum():
                return False
            kinds.append(kind)
            place += length
    return place == size and kinds[:1] == [b"ftyp"] and b"moov" in kinds


class VideoShelf:
    """Embeds videos until the limits are reached.

    Args:
        report: folder of the report, for relative links.
        folders: see :class:`VideoFinder`.
        each: bytes of the largest video to embed.
        total: bytes to embed altogether.
    """

    def __init__(self, report: Path, folders: Sequence[Path], each: float, total: float) -> None:
        self.report, self.finder, self.each, self.left = report, VideoFinder(folders), each, total

    def place(self, recorded: str) -> Video:
        """The video of one record."""
        try:
            path = self.finder.find(recorded)
            if path is not None and not is_mp4(path):
                raise VideoError(f"not shown: {path.name} is no MP4 file")
        except (VideoError, OSError) as error:
            return Video(None, None, str(error))
        if path is None:
            return Video(None, None, f"file not found: {recorded}")
        size = path.stat().st_size
        if size <= min(self.each, self.left):
            self.left -= size
            return Video("data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode("ascii"), None, "")
        link = Path(os.path.relpath(path, self.report)).as_posix()
        return Video(None, quote(link, safe="/=-_.~"), f"{size / MEGABYTE:.1f} MB, beside the report")


def place_videos(run: RecordedRun, shelf: VideoShelf) -> dict[EpisodeId, Video]:
    """Videos of a run; failures are embedded before successes."""
    order = sorted(run.episodes, key=lambda key: (run.episodes[key]["status"] == "success", key))
    return {key: shelf.place(run.episodes[key]["video"]) for key in order if run.episodes[key].get("video")}


def read_controls(run: RecordedRun, places: Sequence[str]) -> list[ControlRun]:
    """Control runs, each paired with the policy's run; differing protocols are shown, not refused.

    Raises:
        FileNotFoundError, RecordsError: see :func:`read_run`.
    """
    controls, labels = [], []
    for place in places:
        other = read_run(place)
        label = control_label(other)
        labels.append(label)
        if labels.count(label) > 1:
            label += f" ({Path(place).name})"
        try:
            comparison = compare_runs(run, other, allow=["all"])
        except NotComparableError:
            comparison = None
        controls.append(ControlRun(label, other, comparison))
    return controls


def recorded_controls(run: RecordedRun) -> tuple[list[str], list[str]]:
    """(control folders that the run's results.json names and that exist, a note for each that does not)."""
    named = [item.get("results") for facts in run.facts for item in facts.get("controls") or [] if item.get("results")]
    found = [place for place in named if (Path(place) / "episodes.jsonl").is_file()]
    return found, [f"Control not found: {place}" for place in named if place not in found]


def make_report(
    results: str,
    controls: Sequence[str] | None = None,
    output: Path | None = None,
    video_folders: Sequence[Path] = (),
    limits_mb: tuple[float, float] = (EMBED_MB, EMBED_TOTAL_MB),
) -> Path:
    """Write the report.

    Args:
        results: results folder or several separated by commas.
        controls: results folders of control runs; None: those named in results.json.
        output: the file; None: `report.html` in the first results folder.
        video_folders: where to look for videos that are no longer where the records say.
        limits_mb: megabytes of the largest video to embed, and of all embedded together.

    Returns:
        Path of the report.

    Raises:
        FileNotFoundError, RecordsError: see :func:`read_run`.
        UsageError: the output cannot be written.
    """
    run = read_run(results)
    places, notes = recorded_controls(run) if controls is None else (list(controls), [])
    output = output or run.folders[0] / "report.html"
    check_file(output, "--output")
    each, total = (MEGABYTE * limit for limit in limits_mb)
    shelf = VideoShelf(output.parent, [*run.folders, *video_folders], each, total)
    data = ReportData(run, tuple(read_controls(run, places)), place_videos(run, shelf), tuple(notes))
    write_text(output, compose(data))
    return output


def _argument_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m experiments.robot.libero.make_report", description="Write an evaluation's report.html."
    )
    parser.add_argument("results", metavar="RESULTS_DIR", help="results folder; several separated by commas")
    parser.add_argument("--controls", metavar="DIR,DIR", help="results folders of control runs of the same policy")
    parser.add_argument("--output", metavar="FILE", type=Path, help="default: report.html in RESULTS_DIR")
    parser.add_argument("--videos", metavar="DIR,DIR", default="", help="where to look for videos that have moved")
    parser.add_argument("--embed_mb", type=in_range(float, at_least=0), default=EMBED_MB, help="largest video to embed")
    parser.add_argument(
        "--embed_total_mb",
        type=in_range(float, at_least=0),
        default=EMBED_TOTAL_MB,
        help="all embedded videos",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _argument_parser().parse_args(arguments)
    controls = None if args.controls is None else split_places(args.controls)
    folders, limits = [Path(word) for word in split_places(args.videos)], (args.embed_mb, args.embed_total_mb)
    try:
        path = make_report(args.results, controls, args.output, folders, limits)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    with bad_input_in_one_line("make_report"):
        sys.exit(main())
