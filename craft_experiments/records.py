"""What jobs leave behind: one compressed JSON file per training, evaluation and measurement, and the list of states.

    {records_dir}/{cell}/training.json.gz     policy, start, data, metrics
    {records_dir}/{cell}/{kind}@{suite}.json.gz   policy, versions, rate, every episode
    {records_dir}/{cell}/retention@{data}.json.gz   what `measure_retention.py` found
    {records_dir}/manifest.json               cell -> state, failure code

Each has program, flags, content, processor, seconds and processor_seconds as well. `policy` and `start` are hashes of
weights, `data` of demonstrations, `content` of what the files and folders hold that flags name: where they lie does not
count. Tables and figures are made of these files alone.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

from prismatic.command_line import split_places
from prismatic.evidence.checks import RECORD, check_fields, is_count, is_number, parse_object, read_object
from prismatic.evidence.failure_codes import FailureCode
from prismatic.evidence.files import write_bytes, write_text
from prismatic.evidence.hashes import content_hash
from prismatic.training.checkpoint_folder import CARD, TRAINING_STATE, has_own_card

FORMAT = 1
MAX_RECORD_BYTES = 1 << 28
"""Largest record, decompressed: a small file can hold gigabytes of zeros."""
_LIMITS = replace(RECORD, characters=MAX_RECORD_BYTES)
TRAINING, RETENTION = "training", "retention"
MEMORY = "Memory/Peak GiB"
METRICS = (
    "VLA Train/Loss",
    "VLA Train/Curr Action L1 Loss",
    "VLA Train/Gradient Norm",
    "CRaFT/Retention Loss",
    "CRaFT/Lambda",
    "CRaFT/Conflict Ratio",
    "CRaFT/Gate Open",
    "CRaFT/Out Of Reach",
    MEMORY,
)
_SECONDS = ("seconds", "processor_seconds")
# Where files are, how fast they are made and how often something is measured changes no result.
_NO_SETTINGS = {
    "craft_log_freq",
    "run_root_dir",
    "local_log_dir",
    "results_dir",
    "rollout_dir",
    "pretrained_checkpoint",
    "checkpoint",
    "base",
    "output",
    "data_root_dir",
    "replay_dataset",
    "control_results",
    "num_workers",
    "resume",
    "save_videos",
    "standalone",
    "nnodes",
}


# Flags that name files and folders which decide a result: what these hold is compared.
CONTENT = (
    "base_checkpoint",
    "config_file_path",
    "craft_memory_data",
    "craft_memory_instructions",
    "craft_probe_data",
    "data_set_file",
    "initial_states_path",
    "replay_data",
    "resum_vla_path",
    "start",
    "tokenizer_path",
    "vlm_path",
)


class RecordError(ValueError):
    """A record that cannot be read, or that other settings made; names the file."""


class State(str, Enum):
    """How far a cell is."""

    PENDING = "pending"
    TRAINING = "training"
    TRAINED = "trained"
    EVALUATED = "evaluated"
    FAILED = "failed"


def record_path(records_dir: Path, cell: str, name: str) -> Path:
    """File of a record."""
    return records_dir / cell / f"{name}.json.gz"


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write aside and rename. The same record gives the same bytes: the file holds no time."""
    text = json.dumps({"format": FORMAT, **record}, separators=(",", ":"), ensure_ascii=False)
    write_bytes(path, gzip.compress(text.encode(), mtime=0))


def read_record(path: Path) -> dict[str, Any]:
    """Read one record.

    Raises:
        FileNotFoundError: no such file.
        RecordError: no gzipped JSON object of this format.
    """
    try:
        with gzip.open(path) as stream:
            data = stream.read(MAX_RECORD_BYTES + 1)
        if len(data) > MAX_RECORD_BYTES:
            raise RecordError(f"{path}: found more than {MAX_RECORD_BYTES >> 20} MiB of text, expected a record")
        record = parse_object(data.decode(), str(path), finite=False, limits=_LIMITS)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, (FileNotFoundError, RecordError)):
            raise
        raise RecordError(f"{path}: no gzipped JSON: {error}") from None
    if record.get("format") != FORMAT:
        raise RecordError(f"{path}: format: found {record.get('format')!r:.60}, expected {FORMAT}")
    _check_record(path, record)
    return record


def _check_record(path: Path, record: Mapping[str, Any]) -> None:
    try:
        check_fields(
            record,
            {"command": list, "flags": dict, "content": dict, "metrics": dict, "episodes": list, RETENTION: dict},
            str(path),
        )
        check_fields(record, {"rate": (int, float)} | dict.fromkeys(_SECONDS, (int, float)), str(path))
    except ValueError as error:
        raise RecordError(str(error)) from None
    rate, seconds = record.get("rate", 0), [record.get(name, 0) for name in _SECONDS]
    if not (is_number(rate) and 0 <= rate <= 1 and all(is_number(value) and value >= 0 for value in seconds)):
        raise RecordError(f"{path}: found rate {rate!r} and seconds {seconds!r:.60}, expected 0 to 1 and >= 0")
    for row in record.get("episodes", ()):
        if not isinstance(row, list) or len(row) < 3 or not all(map(is_count, row[:3])) or row[2] > 1:
            raise RecordError(f"{path}: episodes: found {row!r:.60}, expected [task, initial state, 0 or 1, steps]")
    if not all(isinstance(word, str) for word in (*record.get("command", ()), *record.get("flags", {}).values())):
        raise RecordError(f"{path}: expected words as the values of its flags")


def flags_in(command: Sequence[str]) -> dict[str, str]:
    """Flags of a command, {"seed": "0", ...}; the last of several counts."""
    pairs = zip(command, [*command[1:], ""], strict=True)
    return {word[2:]: value for word, value in pairs if word.startswith("--") and not value.startswith("--")}


def settings_of(flags: Mapping[str, str]) -> dict[str, str]:
    """The flags that decide a result."""
    return {name: value for name, value in flags.items() if name not in _NO_SETTINGS}


def flags_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Flags of the program that made a record. Records of earlier versions hold its words."""
    return record["flags"] if "flags" in record else flags_in(record["command"])


def contents_of(flags: Mapping[str, str], names: Iterable[str] = CONTENT) -> dict[str, str]:
    """Flag -> hash of what the file or folder holds that it names; of several with commas, hashes with commas.

    Flags that name neither are left out. The training state of a checkpoint does not count: it may be deleted. Nor does
    its model card, which is written anew.
    """
    places = {name: split_places(flags[name]) for name in names if flags.get(name)}
    hashes = {name: [_content_of(place) for place in found] for name, found in places.items()}
    return {name: ",".join(map(str, found)) for name, found in hashes.items() if None not in found}


def _content_of(place: str) -> str | None:
    return content_hash(place, TRAINING_STATE, (CARD,) if has_own_card(Path(place)) else ())


def check_settings(path: Path, record: Mapping[str, Any], flags: Mapping[str, str]) -> None:
    """Raise RecordError when `record` was made with other flags, or files of another content; names them.

    Records of earlier versions know the names of files alone.
    """
    before, now = settings_of(flags_of(record)), settings_of(flags)
    held = record.get("content", {})
    hold = contents_of(flags, held)
    different = {name for name in before.keys() | now.keys() if name not in hold and before.get(name) != now.get(name)}
    changed = {name for name in hold if hold[name] != held[name]}
    if different or changed:
        said = {n: f"{now.get(n, 'not given')}{', another content' * (n in changed)}" for n in different | changed}
        pairs = ", ".join(f"--{n} {before.get(n, '(not given)')} (now {said[n]})" for n in sorted(said))
        raise RecordError(
            f"{path} was made with other settings: {pairs}. Give other settings a --work_dir and a --results_dir (and "
            "--records_dir, if it is given) of their own"
        )


# --- States -------------------------------------------------------------------------------------------------------


def manifest_path(records_dir: Path) -> Path:
    """The list of states."""
    return records_dir / "manifest.json"


def read_manifest(records_dir: Path) -> dict[str, dict[str, str]]:
    """cell -> {"state": ..., "code": ... if failed}; empty before the first job."""
    path = manifest_path(records_dir)
    if not path.exists():
        return {}
    try:
        manifest = read_object(path)
    except ValueError as error:
        raise RecordError(str(error)) from None
    for cell, entry in manifest.items():
        codes = entry.get("code", FailureCode.EVAL_FAILED) if isinstance(entry, dict) else None
        if codes not in list(FailureCode) or not isinstance(entry.get("state"), str):
            raise RecordError(f"{path}: {cell}: found {entry!r:.60}, expected a state and, if failed, a known code")
    return manifest


def set_states(records_dir: Path, changes: Mapping[str, State | FailureCode], only_new: bool = False) -> None:
    """Change the states of cells; several processes may do so at once. A failure code means FAILED.

    only_new: leave cells alone that have a state.
    """
    records_dir.mkdir(parents=True, exist_ok=True)
    with locked(records_dir / "manifest.lock"):
        manifest = read_manifest(records_dir)
        for cell, state in changes.items():
            if only_new and cell in manifest:
                continue
            failed = isinstance(state, FailureCode)
            manifest[cell] = {"state": State.FAILED.value, "code": state.value} if failed else {"state": state.value}
        text = json.dumps(dict(sorted(manifest.items())), indent=1) + "\n"
        write_text(manifest_path(records_dir), text)


@contextlib.contextmanager
def locked(path: Path, waits: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Hold an exclusive lock on a file; yields its descriptor. A child that inherits it holds the lock as well.

    `waits` is called once when another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, waits)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, waits: Callable[[], None]) -> None:
    """Wait until this process alone holds the open file."""
    try:
        import fcntl
    except ModuleNotFoundError:
        return _lock_on_windows(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waits()
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _lock_on_windows(descriptor: int) -> None:
    import msvcrt

    while True:
        with contextlib.suppress(OSError):  # raised after ten seconds of waiting
            msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]  # mypy reads it for Linux
            return
