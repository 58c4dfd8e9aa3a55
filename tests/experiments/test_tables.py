"""What the description of the experiments promises: shared cells are the same run, every table has its controls."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from craft_experiments.cells import Kind, Role
from craft_experiments.jobs.evaluate import Evaluate
from craft_experiments.jobs.train import Train
from craft_experiments.keep_cells import BENCH
from craft_experiments.presets import PRESETS
from craft_experiments.records import settings_of
from craft_experiments.settings import RunConfig, resolve
from craft_experiments.tables import TABLES, methods_of, table

BOTH = pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))


RECTANGULAR = [name for name in TABLES if name != BENCH]


def requests(preset):
    return [request for name in RECTANGULAR for request in table(name, preset).requests]


def settings(**flags):
    return resolve(RunConfig(**flags), "table1")


@BOTH
def test_a_cell_name_stands_for_one_training_run(preset):
    s = settings(preset=preset.name)
    commands = {}
    for request in requests(preset):
        if request.cell.method.role is Role.TRAINED:
            commands.setdefault(request.cell.name, set()).add(tuple(Train(request.cell).flags(s).items()))
    assert all(len(found) == 1 for found in commands.values())
    runs = [tuple(sorted(settings_of(dict(*found)).items())) for found in commands.values()]
    without_id = [tuple(pair for pair in run if pair[0] != "run_id_override") for run in runs]
    assert len(set(without_id)) == len(without_id)  # and nothing is trained twice under two names


@BOTH
def test_evaluations_of_a_cell_differ(preset):
    s = settings(preset=preset.name)
    for request in requests(preset):
        commands = [settings_of(Evaluate(request.cell, e).flags(s)) for e in request.evaluations]
        same = [e.name for e, c in zip(request.evaluations, commands, strict=True) if commands.count(c) > 1]
        # The start tasks are read by two heads: the policies differ, not the flags.
        assert {name.split("@")[0] for name in same} <= {Kind.START_TASKS.value, Kind.START_TASKS_START_HEAD.value}


@BOTH
@pytest.mark.parametrize("name", RECTANGULAR)
def test_every_table_has_controls_and_a_perturbed_column_for_every_standard_one(preset, name):
    found = table(name, preset)
    controls = {method.key for method in found.methods if method.control}
    assert {"replay", "blind"} <= controls and ("start" in controls) == bool(preset.start_suite)
    for request in found.requests:
        kinds = {kind: {e.suite for e in request.evaluations if e.kind is kind} for kind in Kind}
        only_its_own_tasks = request.cell.method.role is Role.START and request.cell.seed != preset.seeds[0]
        assert kinds[Kind.STANDARD] == kinds[Kind.PERTURBED] and bool(kinds[Kind.STANDARD]) != only_its_own_tasks
    assert {request.cell.method.key for request in found.requests} == {method.key for method in found.methods}


def test_methods_can_be_chosen_and_controls_stay():
    preset = PRESETS["tiny"]
    chosen = table("table1", preset, ("craft",))
    assert [m.key for m in chosen.methods if not m.control] == ["craft"]
    with pytest.raises(ValueError, match=r"methods of table1: found \['frozen'\]"):
        table("table1", preset, ("frozen",))
    with pytest.raises(ValueError, match="table: found 'table9'"):
        table("table9", preset)


def test_a_budget_equal_to_crafts_own_is_no_second_method():
    preset = PRESETS["tiny"]
    trained = [m for m in methods_of(preset).values() if m.role is Role.TRAINED and not m.key.endswith("_joint")]
    trained = [m for m in trained if not (m.memory or m.parent)]  # these differ by data, or by where they begin
    for first, second in itertools.combinations(trained, 2):
        assert first.train != second.train, (first.key, second.key)
    budgets = [m.train["craft_retention_budget"] for m in trained if m.key == "craft" or "craft_budget" in m.key]
    assert sorted(budgets) == sorted(preset.budgets)


def test_all_demonstrations_are_the_run_of_table_1():
    preset = PRESETS["tiny"]
    shared = {r.cell.name for r in table("table1", preset).requests} & {
        r.cell.name for r in table("table3", preset).requests
    }
    assert "plain--spatial--seed0" in shared
    limits = {r.cell.shots for r in table("table3", preset).requests if not r.cell.method.control}
    assert limits == {5, None}


def test_the_joint_policy_takes_as_many_steps_as_the_single_ones_together():
    s = settings(preset="tiny")
    joint = next(r.cell for r in table("table2", s.preset).requests if r.cell.method.key == "plain_joint")
    flags = settings_of(Train(joint).flags(s))
    assert int(flags["max_steps"]) == 3 * s.preset.max_steps
    assert flags["dataset_name"].split(",") == [s.preset.dataset(suite) for suite in joint.suites]


def test_flags_replace_values_of_the_preset():
    s = settings(
        preset="qwen25-0_5b", retention_budget=0.2, lora_rank=8, task_ids="1 2", seeds="4,5", suites="libero_goal"
    )
    cell = next(r.cell for r in table("table1", s.preset).requests if r.cell.method.key == "craft")
    flags = settings_of(Train(cell).flags(s))
    assert (flags["craft_retention_budget"], flags["lora_rank"], flags["seed"]) == ("0.2", "8", "4")
    assert flags["craft_dual_lr"] == "0.01"  # as before
    assert s.preset.task_ids["libero_goal"] == "1,2" and s.preset.suites == ("libero_goal",)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"preset": "huge"}, "--preset: found 'huge'"),
        ({"suites": "libero_90"}, r"--suites: found \['libero_90'\]"),
        ({"seeds": "0,-1"}, "--seeds: expected whole numbers"),
        ({"max_steps": 0}, "--max_steps is 0, expected at least 1"),
        ({"num_gpus": -1}, "--num_gpus"),
    ],
)
def test_unusable_flags_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        settings(**flags)


def test_a_changed_preset_changes_the_settings_of_a_command():
    s = settings(preset="tiny")
    cell = table("table1", s.preset).requests[0].cell
    changed = replace(s, preset=replace(s.preset, learning_rate=1.0))
    moved = replace(s, work_dir=Path("elsewhere"), python="/usr/bin/python3")
    assert settings_of(Train(cell).flags(s)) != settings_of(Train(cell).flags(changed))
    assert settings_of(Train(cell).flags(s)) == settings_of(Train(cell).flags(moved))
