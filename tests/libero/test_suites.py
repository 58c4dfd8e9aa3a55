"""Suite names, instruction sources and their pitfalls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.robot.libero.eval_config import EvalConfig
from experiments.robot.libero.suite_names import (
    BASE_SUITES,
    PRO_PERTURBATIONS,
    LanguageSource,
    bddl_language,
    language_warnings,
    perturbation,
    resolve_language_source,
    split_suite,
    with_language,
)
from experiments.robot.libero.suites import describe_suite


@dataclass(frozen=True)
class Task:
    language: str
    bddl_file: Path


def task(folder: Path, language: str, bddl: str) -> Task:
    file = folder / f"{len(list(folder.iterdir()))}.bddl"
    file.write_text(f"(define (problem X)\n  (:domain robosuite)\n  (:language {bddl})\n  (:regions))\n")
    return Task(language, file)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("libero_spatial", ("libero_spatial", None)),
        ("libero_object_object", ("libero_object", "object")),
        ("libero_10_with_red_stick", ("libero_10", "with_red_stick")),
        ("libero_100", (None, None)),
        ("libero_study_table", (None, None)),
    ],
)
def test_suite_names_are_split(name, parts):
    assert split_suite(name) == parts and perturbation(name) == parts[1]


def test_statistics_of_perturbed_suites_are_those_of_the_base():
    assert EvalConfig(task_suite_name="libero_object_lan").statistics_key() == "libero_object"
    assert EvalConfig(task_suite_name="libero_study_table").statistics_key() == "libero_study_table"


@pytest.mark.parametrize(("suite", "source"), [("libero_goal_lan", "bddl"), ("libero_10_task", "bddl")])
def test_perturbed_instructions_come_from_the_task_description(suite, source):
    assert resolve_language_source(suite, None).value == source
    assert resolve_language_source(suite, LanguageSource.FILENAME) is LanguageSource.FILENAME
    assert resolve_language_source("libero_goal_swap", None) is LanguageSource.FILENAME
    assert EvalConfig(task_suite_name=suite).resolved_language_source().value == source


def test_instruction_of_the_task_description(tmp_path):
    found = task(tmp_path, "open the drawer", "  Open the\n   middle layer ")
    assert with_language(found, LanguageSource.BDDL).language == "Open the middle layer"
    assert with_language(found, LanguageSource.FILENAME) is found


def test_a_description_without_instruction_is_named(tmp_path):
    file = tmp_path / "x.bddl"
    file.write_text("(define (problem X))")
    with pytest.raises(ValueError, match=r"x\.bddl: expected a line \(:language"):
        bddl_language(file)


def test_numbered_file_names_are_reported(tmp_path):
    """LIBERO-Plus names its variants `turn_on_the_stove_light_8`."""
    tasks = [task(tmp_path, "turn on the stove light 8", "turn on the stove")]
    lines = language_warnings("libero_goal", LanguageSource.FILENAME, tasks)
    assert len(lines) == 1 and "1 of 1" in lines[0] and "light 8" in lines[0] and "--language_source bddl" in lines[0]
    assert language_warnings("libero_goal", LanguageSource.BDDL, tasks) == []


def test_hidden_perturbations_are_reported_but_published_instructions_are_not(tmp_path):
    tasks = [task(tmp_path, "open the drawer", "Pull it open"), task(tmp_path, "stack it", "Stack it")]
    lines = language_warnings("libero_goal_lan", LanguageSource.FILENAME, tasks)
    assert len(lines) == 1 and "1 of 2" in lines[0] and "Pull it open" in lines[0]
    assert language_warnings("libero_goal", LanguageSource.FILENAME, tasks) == []


@pytest.mark.simulator
@pytest.mark.slow
def test_installed_suites():
    pytest.importorskip("libero")
    for base in BASE_SUITES[:4]:
        for name in (base, *(f"{base}_{change}" for change in PRO_PERTURBATIONS)):
            row = describe_suite(name)
            assert (row.tasks, row.installed, row.init_states) == (10, 10, "50"), row
            if row.perturbation in ("lan", "task"):
                assert row.language_differs == 10, row
    assert describe_suite("libero_goal_env").installed == 0  # registered, but without files
