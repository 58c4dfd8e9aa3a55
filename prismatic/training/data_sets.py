"""Where training and measuring open data sets: every one says what stands out in it, under the flag that named it."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from prismatic.command_line import split_places
from prismatic.progress import say
from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.datasets.format_table import expected_files, find_format, folder_and_split


def open_data(
    flag: str, root: str | os.PathLike[str], name: str, settings: DatasetSettings, said: Collection[str] = ()
) -> VLADataset:
    """The data sets of a name below `root`; oddities and what is left out are said, but for the lines in `said`."""
    dataset = VLADataset(root, name, settings)
    for line in dataset.warnings:
        if line not in said:
            say(f"Warning: {flag}: {line}")
    return dataset


def open_old_data(flag: str, place: str, settings: DatasetSettings) -> VLADataset:
    """The data set at `FOLDER` or `FOLDER:SPLIT`, its name that of the folder, for memory, probe and replay.

    Several with commas between are one, each in proportion to its size and in its own units; they lie side by side.

    Raises FileNotFoundError or ValueError naming flag, folder, what was found and what to do.
    """
    found = [_old_folder(flag, part) for part in split_places(place) or [place]]
    if len({(path.parent, split) for path, split in found}) > 1:
        raise ValueError(f"{flag} {place}: found several folders, expected folders side by side and one split")
    try:
        (first, split), names = found[0], ",".join(path.name for path, _ in found)
        return open_data(flag, first.parent, names, replace(settings, split=split))
    except (ValueError, KeyError, FileNotFoundError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        expected = "Expected what the policy was made for: see docs/datasets.md"
        raise ValueError(f"{flag} {place}: {text}. {expected}") from error


def _old_folder(flag: str, place: str) -> tuple[Path, str | None]:
    """Folder of a data set, and its split."""
    folder, split = folder_and_split(place)
    given, path = f"{flag} {place}", Path(folder).resolve()
    if not path.is_dir():
        raise FileNotFoundError(f"{given}: not a data-set folder")
    if find_format(path) is None:
        found = sorted(child.name for child in path.iterdir())[:5]
        raise ValueError(
            f"{given}: not a data set, found {found or 'an empty folder'}, expected {expected_files()} in it; "
            "name the data set's own folder"
        )
    return path, split
