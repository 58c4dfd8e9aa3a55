"""The bench `keep`: the chain of its trainings, the order of its jobs, its report on made-up records."""

import csv
import re
from pathlib import Path

import fake_records as fake
import pytest

from craft_experiments.__main__ import main
from craft_experiments.cells import Kind
from craft_experiments.jobs.evaluate import question
from craft_experiments.jobs.plan import missing, plan, wanted_table
from craft_experiments.keep_costs import estimate, job_seconds, relative_work
from craft_experiments.keep_data import load_keep
from craft_experiments.keep_reports import write_keep_reports
from craft_experiments.keep_verdicts import compare_rows, verdicts
from craft_experiments.records import read_record, set_states, write_record
from craft_experiments.settings import RunConfig, preset_of, resolve
from craft_experiments.tables import table
from prismatic.evidence.failure_codes import FailureCode

OLD = (0, 3, 5, 7)
SPREAD = {0: 0.0, 1: 0.05, 2: -0.05, 3: 0.1, 4: -0.1}  # of a seed's rate about its row's


def bench(folder, **flags):
    s = fake.settings(folder, "keep", preset="tiny", **flags)
    return s, table("keep", s.preset, s.methods)


def jobs_of(folder, **flags):
    s, wanted = bench(folder, **flags)
    return s, plan(s, wanted)


# --- Jobs ---------------------------------------------------------------------------------------------------------


def test_a_second_task_begins_with_the_policy_after_the_first(tmp_path):
    s, jobs = jobs_of(tmp_path)
    second = jobs["train/keep_data_5--near+far--seed3"]
    words = second.commands(s)[0]
    assert words[words.index("--config_file_path") + 1] == str(s.runs_dir / "keep_data_5--near--seed3--800_chkpt")
    assert "train/keep_data_5--near--seed3" in second.after
    first = jobs["train/keep_data_5--near--seed3"]
    assert first.flags(s)["config_file_path"] == "pretrained_models/tiny-libero-object-four"


def test_the_memory_grows_by_the_first_new_task(tmp_path):
    s, jobs = jobs_of(tmp_path)
    for key, flag in (
        ("keep_data_1", "craft_memory_data"),
        ("replay_1", "replay_data"),
        ("distilled_1", "replay_data"),
    ):
        old, new = (jobs[f"train/{key}--{tasks}--seed0"].flags(s)[flag] for tasks in ("near", "near+far"))
        assert old == "memory_1/libero_object_start_no_noops"
        assert new == f"{old},memory_1/libero_object_near_no_noops"
        after = {f"collect/{name}" for name in new.split(",")}
        assert after <= set(jobs[f"train/{key}--near+far--seed0"].after)
    assert not {"craft_memory_data", "replay_data"} & jobs["train/keep_none--near+far--seed0"].flags(s).keys()


def test_a_record_does_not_say_where_policies_and_demonstrations_lie(tmp_path):
    """A fresh machine makes them again, perhaps elsewhere: the records must still fit."""
    s, jobs = jobs_of(tmp_path)
    moved, again = jobs_of(tmp_path / "elsewhere", data_root_dir=str(tmp_path / "other"))
    for name, job in jobs.items():
        if job.kind == "train":
            found = [set(job.flags(s).items()), set(again[name].flags(moved).items())]
            assert {flag for flag, _ in found[0] ^ found[1]} <= {"run_root_dir", "data_root_dir"}


def test_a_record_does_not_depend_on_how_far_the_first_training_is(tmp_path):
    """It is made again on a fresh machine, while the second one's record is there."""
    s, jobs = jobs_of(tmp_path)
    for key, ending in (("keep_none", "--800_chkpt"), ("plain_after_interpolate_0.5", "")):
        job = jobs[f"train/{key}--near+far--seed0"]
        first = f"{key.removeprefix('plain_after_')}--near--seed0"
        for step in ("", "--400_chkpt"):
            if step:
                (s.runs_dir / f"{first}{step}").mkdir(parents=True)
            assert job.flags(s)["config_file_path"] == first + ending


def test_interpolation_goes_back_after_each_task(tmp_path):
    s, jobs = jobs_of(tmp_path)
    key = "interpolate_llm_0.5"
    words = jobs[f"interpolate/{key}--near+far--seed0"].commands(s)[0]
    value = dict(zip(words[2::2], words[3::2], strict=True))
    assert value["--parts"] == "llm" and value["--base"] == str(s.runs_dir / f"{key}--near--seed0")
    assert Path(value["--checkpoint"]).name == f"plain_after_{key}--near+far--seed0--800_chkpt"
    trained = jobs[f"train/plain_after_{key}--near+far--seed0"]
    assert trained.flags(s)["config_file_path"] == f"{key}--near--seed0"
    first = jobs[f"interpolate/{key}--near--seed0"].commands(s)[0]
    assert first[first.index("--checkpoint") + 1].endswith("/plain--near--seed0--800_chkpt")


def test_old_tasks_are_learned_again_from_the_end_of_the_row(tmp_path):
    s, jobs = jobs_of(tmp_path)
    flags = jobs["train/old_after_keep_data_5--near+far+old--seed0"].flags(s)
    assert flags["config_file_path"] == "keep_data_5--near+far--seed0--800_chkpt"
    assert (flags["use_craft"], flags["lr_schedule"], flags["max_steps"]) == ("False", "constant", "200")
    assert flags["dataset_name"] == s.preset.start_dataset  # in the start's units
    asked = [n for n in jobs if n.startswith("evaluate/old_after_keep_data_5--near+far+old--seed0/")]
    assert len(asked) == 4 and sum("--step" in name for name in asked) == 3


def test_cells_are_finished_one_after_another_the_first_seed_of_primary_rows_first(tmp_path):
    """A session that ends early leaves whole cells."""
    s, jobs = jobs_of(tmp_path)
    measured = [job for job in jobs.values() if job.measured]
    cells = [job.cell.name for job in measured]
    assert len(dict.fromkeys(cells)) == len([n for i, n in enumerate(cells) if i == 0 or cells[i - 1] != n])
    bench = s.preset.bench
    place = {}
    for index, job in enumerate(measured):
        place.setdefault((job.cell.method.key, job.cell.seed), index)
    seed_0 = [place[key, 0] for key in bench.primary]
    assert seed_0 == sorted(seed_0) and max(seed_0) < min(place[key, 1] for key in bench.primary)
    assert max(place[key, 4] for key in bench.primary) < min(place[key, 0] for key in bench.secondary)
    with_start = [index for (key, _), index in place.items() if key == "start"]
    assert max(with_start) < min(place[key, 0] for key in bench.secondary)


def test_what_is_asked_after_each_task(tmp_path):
    s, wanted = bench(tmp_path)
    p = s.preset
    asked = {
        r.cell.name: {e.name: question(p, r.cell, e) for e in r.evaluations}
        for r in wanted.requests
        if r.cell.seed == 0
    }
    second = asked["plain--near+far--seed0"]
    assert {name: found.trials for name, found in second.items()} == {
        "new@far": 40, "new@near": 40, "new@far--step400": 10, "unseen@far": 20, "start_tasks@libero_object": 40,
    }  # fmt: skip
    assert {name: found.trials for name, found in asked["plain--near--seed0"].items()} == {
        "new@near": 40, "new@near--step400": 10, "unseen@near": 20, "start_tasks@libero_object": 20,
    }  # fmt: skip
    assert {found.trials for found in asked["frozen--near+far--seed0"].values()} == {10}
    old, far, unseen = (second[name] for name in ("start_tasks@libero_object", "new@far", "unseen@far"))
    assert (old.task_ids, old.dataset, old.flags) == ("0,3,5,7", p.start_dataset, {"init_noise_mm": 50})
    assert (far.suite, far.task_ids, far.flags) == ("libero_spatial", "0", {"init_noise_mm": 35})
    assert (unseen.suite, unseen.dataset, unseen.flags) == ("libero_spatial_object", far.dataset, far.flags)
    assert asked["start--nothing--seed0"]["new@far"].dataset == p.start_dataset  # it knows no other units
    assert set(asked["start_grey--nothing--seed0"]) == {"start_tasks@libero_object"}


def test_a_lost_policy_is_made_again_for_what_is_missing_and_nothing_else(tmp_path):
    """Records are there, policies are not: of a cell's second stage, both trainings and the missing evaluation."""
    s, jobs = jobs_of(tmp_path, methods="plain", seeds="0")
    fill(s, table("keep", s.preset, s.methods))
    assert missing(s, jobs) == {}
    jobs["evaluate/plain--near+far--seed0/new@far"].record(s).unlink()
    todo = [name for name in missing(s, jobs) if not name.startswith("collect/")]
    assert todo == [
        "train/plain--near--seed0",
        "train/plain--near+far--seed0",
        "evaluate/plain--near+far--seed0/new@far",
    ]


def test_the_preset_without_a_bench_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["list", "keep", "--preset", "tiny-archive"])
    assert "--preset: found 'tiny-archive', which has no bench keep" in capsys.readouterr().err


# --- Report -------------------------------------------------------------------------------------------------------


def rates(key, stage, kind):
    """Rate of a row: plain forgets, keep does not, and all learn."""
    if kind is Kind.START_TASKS:
        return 0.85 if key == "start" else 0.7 if key.startswith(("keep", "replay", "distilled")) else 0.15
    return 0.6


def fill(s, wanted, rate=rates, skip=()):
    """Records of every job; exactly the share of episodes that the rate asks for succeeds."""
    for name, job in plan(s, wanted).items():
        if job.record(s) is None or any(part in name for part in skip):
            continue
        key, seed, stage = job.cell.method.key, job.cell.seed, len(job.cell.tasks)
        if job.kind == "train":
            metrics = {"step": [1, 2], "VLA Train/Loss": [0.1, 0.1], "Memory/Peak GiB": [0.5, 0.7]}
            if key.startswith("keep"):
                metrics |= {"CRaFT/Retention Loss": [0.01, 0.03], "CRaFT/Out Of Reach": [1.0, float(seed == 2)]}
            fake.training(s, job, metrics, 600.0 if job.cell.method.train.get("use_craft") else 500.0)
            continue
        asked = question(s.preset, job.cell, job.evaluation)
        share = rate(key, stage, job.evaluation.kind) + SPREAD[seed] * (0.5 if key == "plain" else 1)
        tasks, count = [int(word) for word in asked.task_ids.split(",")], asked.trials
        fake.evaluation(s, job, {(t, i): i < round(share * count) for t in tasks for i in range(count)})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Settings and data of a bench with every record."""
    s, wanted = bench(tmp_path_factory.mktemp("keep"))
    fill(s, wanted)
    return s, wanted, load_keep(s, wanted)


def test_measures_are_means_over_tasks_of_the_right_stage(whole):
    _, _, data = whole
    values = data.values["keep_data_5"]
    assert values["old"][0] == pytest.approx(0.7) and values["old"][3] == pytest.approx(0.8)
    assert values["start"][0] == pytest.approx(0.85) and values["new"][0] == pytest.approx(0.6)
    assert values["final"][0] == pytest.approx((4 * 0.7 + 2 * 0.6) / 6)
    # Old tasks: .85 - .7 in both later stages; near: nothing lost.
    assert values["backward"][0] == pytest.approx(4 * 0.15 / 5)
    assert (values["time"][0], values["memory"][0]) == (1080, 0.7)
    assert (values["drift"][0], values["out_of_reach"]) == (0.03, {0: 0, 1: 0, 2: 1, 3: 0, 4: 0})
    assert set(data.values["frozen"]["old"]) == {0, 1} and "forward" not in data.values["interpolate_0.5"]


def test_clear_data_supports_h4_and_h5_and_leaves_replay_undecided(whole):
    _, _, data = whole
    found = verdicts(data)
    assert [verdict.decision for verdict in found[:2]] == ["supported", "supported"]
    assert found[2].decision == "no difference to replay_5 shown; no difference to distilled_5 shown"
    old, new = found[0].differences
    assert old.by_seed[3] == pytest.approx(0.8 - 0.2) and old.only_second == 0 and old.flips == 1 / 32
    assert old.p_holm is not None and new.p < 0.05 and new.bound == -0.10
    # The largest p of both halves, times the number of tests that are left.
    assert old.p_holm >= max(old.p, new.p)


def decided(folder, rate, skip=()):
    s, wanted = bench(folder)
    fill(s, wanted, rate, skip)
    return [verdict.decision for verdict in verdicts(load_keep(s, wanted))]


def test_new_tasks_that_are_worse_leave_half_of_a_hypothesis(tmp_path):
    def rate(key, stage, kind):
        worse = key == "keep_none" and kind is not Kind.START_TASKS
        return 0.4 if worse else rates(key, stage, kind)

    first, second, _ = decided(tmp_path, rate)
    assert first == "supported" and second.startswith("half supported")


def test_no_more_kept_than_plain_is_not_supported(tmp_path):
    def rate(key, stage, kind):
        return 0.15 if key == "keep_none" and kind is Kind.START_TASKS else rates(key, stage, kind)

    assert decided(tmp_path, rate)[1] == "not supported"


def test_a_missing_seed_leaves_everything_open(tmp_path):
    assert decided(tmp_path, rates, skip=("plain--near+far--seed4",)) == ["open"] * 3


def test_a_comparison_of_two_seeds_has_no_part_in_the_correction(whole):
    _, _, data = whole
    found = compare_rows(data, "keep_data_1", "replay_1", "old", two_sided=True)
    assert (found.wanted, found.complete, found.p_holm, found.flips) == (2, True, None, None)


def test_fewer_seeds_than_planned_leave_everything_open(tmp_path):
    s, wanted = bench(tmp_path, seeds="0,1,2")
    fill(s, wanted)
    found = verdicts(load_keep(s, wanted))
    assert [verdict.decision for verdict in found] == ["open"] * 3
    assert all((d.wanted, len(d.by_seed)) == (5, 3) for d in found[0].differences)


def page_of(folder, monkeypatch, rate, skip=()):
    monkeypatch.setattr("craft_experiments.keep_reports.write_keep_figures", lambda data, folder: {})
    s, wanted = bench(folder)
    fill(s, wanted, rate, skip)
    write_keep_reports(s, wanted)
    return s, (s.results_dir / "keep.md").read_text(encoding="utf-8")


def test_a_weak_start_and_new_tasks_that_nobody_learns_are_said_first(tmp_path, monkeypatch, whole):
    def rate(key, stage, kind):
        weak = {"start": 0.5, "start_grey": 1.0}
        return weak.get(key, rates(key, stage, kind)) if kind is Kind.START_TASKS else 0.1

    _, page = page_of(tmp_path, monkeypatch, rate)
    head = page.split("## Hypotheses")[0]
    assert "**The start solves 50 % of its own episodes**, less than 80 %" in head
    assert "**The start hardly looks**: with grey images it solves 40 of 40 episodes" in head
    assert "**Plain fine-tuning solves 10 % of the new tasks**, less than 20 %" in page.split("### H4")[0]
    s, wanted, _ = whole
    write_keep_reports(s, wanted)
    good = (s.results_dir / "keep.md").read_text(encoding="utf-8")
    assert not any(said in good for said in ("The start solves", "hardly looks", "Plain fine-tuning solves"))


def test_records_of_two_policies_are_told_apart(tmp_path, monkeypatch):
    s, wanted = bench(tmp_path, methods="plain", seeds="0")
    fill(s, wanted)
    policies = {
        "plain--near--seed0/training": {"policy": "a", "processor": "one"},
        "plain--near--seed0/new@near": {"policy": "b"},  # evaluated after A was trained again
        "plain--near--seed0/new@near--step400": {"policy": "c"},  # another step is another policy
        "plain--near+far--seed0/training": {"policy": "d", "start": "b"},
        "plain--near+far--seed0/new@far": {"policy": "d", "versions": {"mujoco": "3"}},
    }
    for name, changed in policies.items():
        path = s.records_dir / f"{name}.json.gz"
        write_record(path, read_record(path) | changed)
    told = load_keep(s, wanted).origins
    others = [line for line in told if "Of another policy" in line]
    assert [line.split("`")[1] for line in others] == [
        "evaluate/plain--near--seed0/new@near",
        "train/plain--near+far--seed0",
    ]
    assert (
        any(line.startswith("* Made on ") and "one" in line for line in told)
        and told[-1] == "* Evaluated with mujoco 3."
    )


def test_the_report_is_the_same_bytes_again_and_its_csv_parses(whole):
    s, wanted, _ = whole
    paths = write_keep_reports(s, wanted)
    once = {path: path.read_bytes() for path in paths}
    assert {path.name for path in paths} >= {"keep.md", "keep.csv", "keep_matrix.csv", "keep_tests.csv", "keep.tex"}
    assert sum(path.suffix == ".png" for path in paths) == 3
    write_keep_reports(s, wanted)
    assert {path: path.read_bytes() for path in paths} == once
    rows = list(csv.DictReader((s.results_dir / "keep_matrix.csv").read_text().splitlines()))
    one = next(
        r for r in rows if r["cell"] == "plain--near+far--seed3" and r["kind"] == "start_tasks" and r["task"] == "5"
    )
    assert (one["successes"], one["episodes"], one["stage"]) == ("8", "40", "2")
    page = once[s.results_dir / "keep.md"].decode()
    assert "Not finished" not in page and "python -m craft_experiments run keep --preset tiny\n" in page
    assert str(s.work_dir) not in page
    assert re.search(r"\| keep, no old data \| 60\.0 ± 9\.8 \|", page)
    assert "| *start checkpoint, grey images* | - | - | 8 of 40 |" in page  # 1.5 of 10, four tasks


def test_what_is_missing_and_what_failed_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("craft_experiments.keep_reports.write_keep_figures", lambda data, folder: {})
    s, wanted = bench(tmp_path)
    fill(s, wanted, skip=("keep_none--near+far", "distilled_5--"))
    set_states(s.records_dir, {"distilled_5--near--seed0": FailureCode.TRAINING_FAILED})
    write_keep_reports(s, wanted)
    page = (s.results_dir / "keep.md").read_text(encoding="utf-8")
    assert "**Not finished.** Records are missing of 15 cells: " in page and "`keep_none--near+far--seed0`" in page
    assert "* Failed: `distilled_5--near--seed0` (TRAINING_FAILED)." in page
    assert "| distilled replay of 5 demonstrations per old task | - | - | - | - |" in page
    assert "H5, without old data: open" in page and "no seed yet" in page


def test_chosen_rows_alone_make_a_page_without_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr("craft_experiments.keep_reports.write_keep_figures", lambda data, folder: {})
    s, wanted = bench(tmp_path, methods="plain,replay_5", seeds="0")
    fill(s, wanted)
    write_keep_reports(s, wanted)
    page = (s.results_dir / "keep.md").read_text(encoding="utf-8")
    assert page.count(": open") == 3 and "| replay of 5 demonstrations per old task | 60.0 |" in page


# --- Costs --------------------------------------------------------------------------------------------------------


def test_more_steps_and_episodes_cost_more_and_the_plan_fits_its_hours(tmp_path):
    s, jobs = jobs_of(tmp_path)
    pace = s.preset.pace
    cost = {name: job_seconds(s, job, pace) for name, job in jobs.items()}
    assert (
        cost["train/keep_none--near--seed0"] > cost["train/replay_5--near--seed0"] == cost["train/plain--near--seed0"]
    )
    assert cost["evaluate/plain--near+far--seed0/start_tasks@libero_object"] == pytest.approx(
        pace.program + 160 * 280 * pace.control_step
    )
    assert sum(cost.values()) / 3600 / 2 <= 14.05
    assert "hours of two" in estimate(s, jobs)[-1]


def test_the_full_size_plan_names_work_cards_and_an_assumption():
    s = resolve(RunConfig(preset="qwen25-0_5b"), "keep")
    lines = estimate(s, plan(s, wanted_table(s, "keep")))
    assert any(
        re.search(r"keep_none: \d+\.\d TFLOP a step, 50000 steps, \d+\.\d GiB, a card of 24 GB", x) for x in lines
    )
    assert any("an assumption" in line for line in lines)


def test_work_of_a_row_is_that_of_the_formulas():
    methods = {m.key: m for m in table("keep", preset_of("tiny", "keep")).methods}
    # docs/IDEA.md, section 7: 3F + 4F ns/k with n = 1, s = 1/4, k = 2.
    assert relative_work(methods["keep_none"]) == pytest.approx((3 + 4 * 0.25 / 2) / 3)
    assert relative_work(methods["plain"]) == relative_work(methods["replay_5"]) == 1
    assert relative_work(methods["craft"]) == 2 and relative_work(methods["interpolate_0.5"]) is None
