"""Data sets that a flag names by their folder: memory, probe and replay open them here, and say alike what is wrong."""

from __future__ import annotations

from pathlib import Path

from prismatic.training.tracking import say
from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.datasets.formats import expected_files, find_format


def open_old_data(flag: str, folder: str, settings: DatasetSettings) -> VLADataset:
    """The data set in `folder`, its name that of the folder; what contradicts the start's statistics is said.

    Raises FileNotFoundError or ValueError naming flag, folder, what was found and what to do.
    """
    given, path = f"{flag} {folder}", Path(folder).resolve()
    if not path.is_dir():
        raise FileNotFoundError(f"{given}: not a data-set folder")
    if find_format(path) is None:
        found = sorted(child.name for child in path.iterdir())[:5]
        raise ValueError(
            f"{given}: not a data set, found {found or 'an empty folder'}, expected {expected_files()} in it; "
            "name the data set's own folder"
        )
    try:
        dataset = VLADataset(path.parent, path.name, settings)
    except (ValueError, KeyError, FileNotFoundError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ValueError(f"{given}: {text}. Expected what the policy was made for: see docs/datasets.md") from error
    for line in dataset.warnings:
        say(f"Warning: {flag}: {line}")
    return dataset
