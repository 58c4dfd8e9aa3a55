"""The files of an RLDS version directory: names of its shards, how they are written, `dataset_info.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from prismatic.vla.datasets.source import DataSetError
from prismatic.vla.datasets.tfrecord import RecordSpan, read_record, write_records

DEFAULT_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def shard_name(template: object, fields: Mapping[str, object], info_path: Path) -> str:
    """The file name that `filepathTemplate` gives; DataSetError for one that leads out of the folder."""
    # Plain replacement: str.format would run the widths and attributes a damaged template asks for.
    parts = re.split(r"\{(\w+)\}", template) if isinstance(template, str) else ["", ""]
    unknown = set(parts[1::2]) - set(fields)
    file_name = "".join(str(fields.get(part)) if number % 2 else part for number, part in enumerate(parts))
    if unknown or Path(file_name).name != file_name:
        raise DataSetError(
            f"{info_path}: filepathTemplate is {template!r} (file name {file_name!r}), expected the name of a file in "
            f"this folder made from {sorted(fields)}"
        )
    return file_name


def write_shards(directory: Path, name: str, spool: Path, spans: list[RecordSpan], shards: int) -> list[int]:
    """Distribute the records of `spool`, which is removed, in order; returns the episodes of each shard."""
    if not 1 <= shards <= len(spans):
        raise ValueError(f"{shards} shards for {len(spans)} episodes: every shard needs at least one episode")
    bounds = [round(len(spans) * shard / shards) for shard in range(shards + 1)]
    for shard in range(shards):
        path = directory / f"{name}-train.tfrecord-{shard:05d}-of-{shards:05d}"
        write_records(path, (read_record(spool, span) for span in spans[bounds[shard] : bounds[shard + 1]]))
    spool.unlink()
    return [bounds[shard + 1] - bounds[shard] for shard in range(shards)]


def dataset_info(name: str, version: str, shard_lengths: list[int], num_bytes: int) -> dict:
    """Content of `dataset_info.json` for one split, `train`."""
    split = {
        "filepathTemplate": DEFAULT_TEMPLATE,
        "name": "train",
        "numBytes": str(num_bytes),
        "shardLengths": [str(length) for length in shard_lengths],
    }
    return {
        "description": "Robot demonstrations in the LIBERO RLDS layout.",
        "fileFormat": "tfrecord",
        "moduleName": "prismatic.vla.datasets.rlds",
        "name": name,
        "releaseNotes": {version: "Initial release."},
        "splits": [split],
        "version": version,
    }
