"""Of which policy, on which processor: what a page says about where its records come from.

A fresh machine trains again what it needs, and may get another policy. Records of earlier versions have neither
`policy` nor `processor`; nothing is said about those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from craft_experiments.cells import Kind, Role
from craft_experiments.jobs.base import Job
from craft_experiments.jobs.evaluate import Evaluate
from craft_experiments.jobs.train import Train
from craft_experiments.sequence import before
from craft_experiments.settings import Settings

Records = Mapping[str, Mapping[str, Any]]


def origin_lines(s: Settings, jobs: Mapping[str, Job], records: Records) -> list[str]:
    """Lines of a page: records of another policy than the recorded training's, processors, versions."""
    others = list(_of_another_policy(s, jobs, records))
    lines = [
        f"* **Of another policy** than the one whose training is recorded, which was made again and differs: {name}."
        for name in others
    ]
    for field, text in (("processor", "Made on"), ("versions", "Evaluated with")):
        if found := dict.fromkeys(_said(records[name][field]) for name in sorted(records) if records[name].get(field)):
            lines.append(f"* {text} {'; '.join(found)}.")
    return lines


def _of_another_policy(s: Settings, jobs: Mapping[str, Job], records: Records) -> Iterator[str]:
    """Evaluations of a policy, and trainings that start from one, that is not the recorded one."""
    for name, job in jobs.items():
        if name not in records:
            continue
        if isinstance(job, Evaluate) and job.policy.method.role is Role.TRAINED:
            is_last = job.evaluation.step is None and job.evaluation.kind is not Kind.START_TASKS_START_HEAD
            source, used = (job.policy, records[name].get("policy")) if is_last else (None, None)
        elif isinstance(job, Train):
            source, used = before(s.preset, job.policy), records[name].get("start")
        else:
            continue
        trained = None if source is None else records.get(Train(source).name, {}).get("policy")
        if trained is not None and used is not None and trained != used:
            yield f"`{name}`"


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return str(value)
