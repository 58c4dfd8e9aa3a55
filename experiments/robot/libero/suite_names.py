"""LIBERO suites by name: base suite, perturbation, and where a task's instruction comes from. Without a simulator."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

from prismatic.command_line import nearest

BASE_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")

PRO_PERTURBATIONS = ("object", "swap", "lan", "task")
"""The LIBERO-PRO perturbations whose files are installed for each of the four suites of ten tasks."""

_PERTURBED_LANGUAGE = ("lan", "task")
_BDDL_LANGUAGE = re.compile(r"\(\s*:language\s+([^()]*)\)")


class LanguageSource(str, Enum):
    """Where a task's instruction is read.

    FILENAME: the name of the task file with blanks for underscores, as the published evaluations do.
    BDDL: the `(:language ...)` line of the task description.
    """

    FILENAME = "filename"
    BDDL = "bddl"


def split_suite(name: str) -> tuple[str | None, str | None]:
    """Suite name -> (base suite, perturbation).

    `libero_goal_swap` -> ("libero_goal", "swap"), `libero_goal` -> ("libero_goal", None); a name that is derived from
    no base suite -> (None, None).
    """
    for base in BASE_SUITES:
        if name == base:
            return base, None
        if name.startswith(base + "_"):
            return base, name[len(base) + 1 :]
    return None, None


def nearest_suite(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` for what papers, data sets and other code bases call a suite, and where all are listed."""
    known, word = set(known), re.sub(r"[\W_]+", "_", name.lower()).strip("_")
    word = re.sub(r"(_scripted)?(_no_noops?)?(_rlds|_lerobot|_hdf5)?$", "", word)
    word = re.sub(r"^(libero_?)?", "libero_", word).replace("libero_long", "libero_10")
    ends = {suite.removeprefix("libero_") for suite in known}  # what all begin with makes nothing alike
    alike = nearest(word.removeprefix("libero_"), ends | {"long"}, "libero_").replace("libero_long", "libero_10")
    meant = f"; did you mean {word}?" if word in known else alike
    return f"{meant or ';'} python -m experiments.robot.libero.suites lists all"


def perturbation(name: str) -> str | None:
    """The perturbation in a suite name, None for a base suite: `libero_10_with_mug` -> "with_mug"."""
    return split_suite(name)[1]


def resolve_language_source(suite: str, wanted: LanguageSource | None) -> LanguageSource:
    """The flag, else what the suite needs.

    `_lan` and `_task` suites keep the file names of their base suite and change only the BDDL line: read from the file
    names, `_lan` is the base suite once more and `_task` asks for another goal than the one that is checked. So BDDL
    for these two, FILENAME for all others.
    """
    if wanted is not None:
        return wanted
    return LanguageSource.BDDL if perturbation(suite) in _PERTURBED_LANGUAGE else LanguageSource.FILENAME


def bddl_language(file: str | Path) -> str:
    """Instruction in the `(:language ...)` line of a BDDL file, blanks collapsed.

    Raises:
        ValueError: there is no such line, or it is empty; names the file.
    """
    found = _BDDL_LANGUAGE.search(Path(file).read_text(encoding="utf-8"))
    words = found[1].split() if found else []
    if not words:
        raise ValueError(f"{file}: expected a line (:language ...) with an instruction, found none")
    return " ".join(words)


def with_language(task: Any, source: LanguageSource) -> Any:
    """The task with its instruction (`language`) from `source`; a task read from the file name is returned as it is.

    Args:
        task: dataclass with `language` (from the file name) and, for BDDL, `bddl_file`.

    Raises:
        ValueError: BDDL, and the task description holds no instruction.
    """
    if source is LanguageSource.FILENAME:
        return task
    return dataclasses.replace(task, language=bddl_language(task.bddl_file))


def language_warnings(suite: str, source: LanguageSource, tasks: Iterable[Any]) -> list[str]:
    """What may be wrong with the instructions a policy is about to get, at most one line per kind of problem.

    A file name that ends in a number tells the policy which variant of the task it sees (LIBERO-Plus names its
    variants so); a file name that says something else than the task description hides the perturbation. The latter is
    not reported for base suites, where the file names are the published instructions.

    Args:
        suite: suite name.
        source: where the instructions come from.
        tasks: tasks with `language` from the file name and `bddl_file`; tasks without a `bddl_file` are left out.
    """
    if source is not LanguageSource.FILENAME:
        return []
    tasks = [task for task in tasks if getattr(task, "bddl_file", None) is not None]
    leaks = [task.language for task in tasks if re.search(r"\d$", task.language.strip())]
    pairs = [(task.language, bddl_language(task.bddl_file)) for task in tasks] if perturbation(suite) else []
    different = [pair for pair in pairs if pair[0].lower() != pair[1].lower()]
    lines = []
    if leaks:
        lines.append(
            f"{suite}: {len(leaks)} of {len(tasks)} instructions end in a number ({leaks[0]!r}), which names the "
            "variant of the task to the policy; use --language_source bddl"
        )
    if different:
        lines.append(
            f"{suite}: {len(different)} of {len(tasks)} file names say something else than the task description "
            f"({different[0][0]!r} against {different[0][1]!r}); --language_source bddl uses the latter"
        )
    return lines
