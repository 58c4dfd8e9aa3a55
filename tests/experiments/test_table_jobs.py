"""Which jobs of a table are run: what is missing, what that needs, and nothing else."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import stub_programs
from hypothesis import given, settings
from hypothesis import strategies as st

from craft_experiments import records
from craft_experiments.graph import place
from craft_experiments.jobs.base import Job, data_root, portable
from craft_experiments.jobs.plan import missing, plan, wanted_table, with_followers
from craft_experiments.runner import run_job
from craft_experiments.settings import RunConfig, resolve
from craft_experiments.tables import TABLES

REPO = Path(__file__).parents[2]
FILES = ("record", "policy", "data")


def table_in(folder: Path, **flags):
    """Settings and jobs of the retention table (it has every kind of job), one seed, everything below `folder`."""
    names = {"preset": "tiny", "seeds": "0", "methods": "plain craft interpolate_0.5"} | flags
    places = {
        "work_dir": str(folder / "work"),
        "data_root_dir": str(folder / "data"),
        "results_dir": str(folder / "out"),
    }
    s = resolve(RunConfig(**names, **places), "retention")
    return s, plan(s, wanted_table(s, "retention"))


def product(s, job: Job) -> tuple[str, Path] | None:
    """What a job leaves besides its record: a data set or a policy."""
    if job.kind == "collect":
        return "data", Path(data_root(s, job.data), job.data.dataset, "1.0.0", "dataset_info.json")
    if job.kind == "train":
        return "policy", s.runs_dir / f"{job.cell.name}--{s.preset.max_steps}_chkpt" / "model.safetensors"
    return ("policy", s.runs_dir / job.cell.name / "model.safetensors") if job.kind == "interpolate" else None


def make_everything(s, jobs) -> None:
    for job in jobs.values():
        if product(s, job) is not None:
            path = product(s, job)[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
    for job in jobs.values():
        if job.record(s) is not None:
            records.write_record(job.record(s), job.facts(s, {"seconds": 1.0}, job.content(s)))


def delete(s, job: Job) -> None:
    """Both the record and the product of a job; the folder of a policy with it."""
    kept = product(s, job)
    if kept is not None:
        kept[1].unlink()
        if kept[0] == "policy":
            kept[1].parent.rmdir()
    if job.record(s) is not None:
        job.record(s).unlink()


def names_of(flags) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        return list(table_in(Path(folder), **flags)[1])


ALL = names_of({})
MEASURED = ("train/", "evaluate/", "measure/")


@given(st.sets(st.sampled_from(ALL)))
@settings(max_examples=60, deadline=None)
def test_missing_is_what_was_deleted_and_what_that_needs(deleted):
    with tempfile.TemporaryDirectory() as folder:
        s, jobs = table_in(Path(folder))
        make_everything(s, jobs)
        for name in deleted:
            delete(s, jobs[name])
        todo = missing(s, jobs)
        # From the other end: a job runs if it was deleted, and it is a measurement or something that runs needs it.
        needed = {name for name in deleted if name.startswith(MEASURED)}
        while more := {b for n in needed for b in jobs[n].after if b in deleted} - needed:
            needed |= more
        assert set(todo) == needed
        assert [name for name in jobs if name in todo] == list(todo)  # predecessors first
        for job in todo.values():
            assert all(before in todo or jobs[before].has_result(s) for before in job.after)


@given(st.sets(st.sampled_from([name for name in ALL if not name.startswith(("evaluate/", "measure/"))])))
@settings(max_examples=30, deadline=None)
def test_policies_and_data_are_not_made_again_for_nothing(deleted):
    with tempfile.TemporaryDirectory() as folder:
        s, jobs = table_in(Path(folder))
        make_everything(s, jobs)
        for name in deleted:
            product(s, jobs[name])[1].unlink()
            if product(s, jobs[name])[0] == "policy":
                product(s, jobs[name])[1].parent.rmdir()
        assert missing(s, jobs) == {}


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith(("evaluate/interp", "measure/interp"))])
def test_an_evaluation_without_its_policy_makes_the_policy_again(tmp_path, name):
    s, jobs = table_in(tmp_path)
    make_everything(s, jobs)
    delete(s, jobs[name])
    for job in jobs.values():
        if product(s, job) is not None and product(s, job)[0] == "policy":
            product(s, job)[1].unlink()
            product(s, job)[1].parent.rmdir()
    chain = ["train/plain--spatial--seed0", "interpolate/interpolate_0.5--spatial--seed0", name]
    assert list(missing(s, jobs)) == chain


def test_only_the_last_checkpoint_is_a_trained_policy(tmp_path):
    s, jobs = table_in(tmp_path)
    make_everything(s, jobs)
    job = jobs["train/craft--spatial--seed0"]
    last = s.runs_dir / f"{job.cell.name}--{s.preset.max_steps}_chkpt"
    assert job.is_trained(s)
    last.rename(s.runs_dir / f"{job.cell.name}--{s.preset.max_steps - 1}_chkpt")
    assert not job.is_trained(s) and missing(s, jobs) == {}
    delete(s, jobs["evaluate/craft--spatial--seed0/standard@libero_spatial"])
    assert "train/craft--spatial--seed0" in missing(s, jobs)
    # --extra_train_args has the last word on the number of steps.
    shorter, _ = table_in(tmp_path, extra_train_args=f"--max_steps {s.preset.max_steps - 1}")
    assert job.is_trained(shorter)


def test_records_of_earlier_versions_hold_words_and_are_read(tmp_path):
    s, jobs = table_in(tmp_path)
    make_everything(s, jobs)
    job = jobs["train/craft--spatial--seed0"]
    old = {"command": portable(job.commands(s)[-1]), "seconds": 1.0}
    records.write_record(job.record(s), old)
    assert missing(s, jobs) == {}
    old["command"][old["command"].index("--learning_rate") + 1] = "0.9"
    records.write_record(job.record(s), old)
    with pytest.raises(records.RecordError, match="--learning_rate 0.9"):
        missing(s, jobs)


def test_followers_are_direct_and_indirect():
    with tempfile.TemporaryDirectory() as folder:
        _, jobs = table_in(Path(folder))
    found = {job.name for job in with_followers(jobs, "train/plain--spatial--seed0")}
    assert "interpolate/interpolate_0.5--spatial--seed0" in found
    assert "evaluate/interpolate_0.5--spatial--seed0/standard@libero_spatial" in found
    assert not any(name.startswith(("collect/", "train/craft")) or "start--" in name for name in found)


def test_every_job_has_its_place_right_of_what_it_waits_for():
    with tempfile.TemporaryDirectory() as folder:
        _, jobs = table_in(Path(folder))
    places = place(jobs)
    assert len(set(places.values())) == len(jobs)
    assert all(places[before][0] < places[name][0] for name, job in jobs.items() for before in job.after)
    for column in {column for column, _ in places.values()}:
        rows = sorted(row for c, row in places.values() if c == column)
        assert all(below - above >= 1 for above, below in zip(rows, rows[1:], strict=False))


def test_center_crop_is_the_paper_presets_and_can_be_replaced():
    assert resolve(RunConfig(preset="qwen25-0_5b"), "table1").preset.evaluate["center_crop"] is True
    assert resolve(RunConfig(preset="qwen25-0_5b", center_crop=False), "table1").preset.evaluate["center_crop"] is False
    assert "center_crop" not in resolve(RunConfig(), "table1").preset.evaluate


def test_a_policy_acts_in_the_units_it_learned_the_suite_in(tmp_path):
    """The start from its own demonstrations of the suite, where it has some; a fine-tuned policy from the target's."""
    s, jobs = table_in(tmp_path, preset="tiny-archive")

    def units(name):
        command = jobs[name].commands(s)[-1]
        return command[command.index("--unnorm_key") + 1]

    spatial, start_tasks = "perturbed@libero_spatial", "start_tasks@libero_object"
    assert units(f"evaluate/start--spatial--seed0/{spatial}") == "libero_spatial_start_no_noops"
    assert units(f"evaluate/plain--spatial--seed0/{spatial}") == "libero_spatial_displaced_no_noops"
    for method in ("start", "plain"):
        assert units(f"evaluate/{method}--spatial--seed0/{start_tasks}") == "libero_object_start_no_noops"
    measured = "measure/plain--spatial--seed0/held_out/libero_"
    assert units(f"{measured}spatial_displaced_no_noops") == "libero_spatial_start_no_noops"
    assert units(f"{measured}object_start_no_noops") == "libero_object_start_no_noops"


@pytest.mark.parametrize("name", TABLES)
def test_demonstrations_are_collected_before_they_are_read(tmp_path, name):
    s = resolve(RunConfig(preset="tiny", data_root_dir=str(tmp_path / "data")), name)
    jobs = plan(s, wanted_table(s, name))
    read = {}
    for job in jobs.values():
        (command, *_), before = job.commands(s)[-1:], [jobs[after] for after in job.after]
        made = [product(s, other)[1].parent for other in before if other.kind == "collect"]
        if "--replay_dataset" in command:
            assert made == [Path(command[command.index("--replay_dataset") + 1])]
            assert [jobs[after].data.task_ids for after in job.after] == [command[command.index("--task_ids") + 1]]
        elif "--data_root_dir" in command:
            root, names = (command[command.index(flag) + 1] for flag in ("--data_root_dir", "--dataset_name"))
            places = [Path(root, part) for part in names.split(",")]
            for flag in ("--craft_memory_data", "--replay_data"):
                places += map(Path, command[command.index(flag) + 1].split(",") if flag in command else ())
            assert {folder.parent for folder in made} == set(places)
        else:
            continue
        read[job.name] = made
    assert any("replay" in job for job in read) and any("plain" in job for job in read)


def test_flags_that_were_without_effect():
    assert resolve(RunConfig(dataset_suffix=""), "table1").preset.dataset("libero_goal") == "libero_goal"
    assert resolve(RunConfig(preset="qwen25-0_5b", collect_demos=True), "table1").preset.collect == {}
    assert resolve(RunConfig(collect_demos=False), "table1").preset.collect is None
    few = resolve(RunConfig(num_trials=1), "table2").preset
    assert (few.num_trials, few.pro_trials, few.start_trials) == (1, 1, 1)


def test_the_suite_of_tables_3_and_4_is_one_of_the_chosen():
    assert resolve(RunConfig(), "table4").preset.ablation_suite == "libero_spatial"
    assert resolve(RunConfig(suites="libero_goal libero_spatial"), "table4").preset.ablation_suite == "libero_spatial"
    assert resolve(RunConfig(suites="libero_goal libero_10"), "table4").preset.ablation_suite == "libero_goal"


def test_a_table_without_any_policy_is_an_error():
    with pytest.raises(ValueError, match="--suites: found libero_10, table2"):
        wanted_table(resolve(RunConfig(suites="libero_10"), "table2"), "table2")


def test_locks_without_fcntl(tmp_path, monkeypatch):
    """Windows: msvcrt gives up after ten seconds, the driver does not."""
    tries = []

    class Msvcrt:
        LK_LOCK = 1

        @staticmethod
        def locking(descriptor, mode, count):
            tries.append((mode, count))
            if len(tries) < 3:
                raise OSError(36, "Resource deadlock avoided")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", Msvcrt)
    with records.locked(tmp_path / "locks" / "a.lock") as descriptor:
        os.fstat(descriptor)
    assert tries == [(1, 1)] * 3
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_driver_that_waits_for_another_one_says_so_once(tmp_path):
    said = []
    with records.locked(tmp_path / "a.lock", lambda: said.append("early")):
        other = threading.Thread(target=lambda: _enter(tmp_path / "a.lock", said))
        other.start()
        while "waits" not in said:
            other.join(0.01)
        assert other.is_alive()
    other.join()
    assert said == ["waits", "entered"]


def _enter(lock, said):
    with records.locked(lock, lambda: said.append("waits")):
        said.append("entered")


# ------------------------------------------------------------------------------------------ one job at a time


def test_single_jobs_keep_the_states(tmp_path):
    """What a workflow engine calls."""
    variables = stub_programs.install(tmp_path)
    flags = [
        "--suites=libero_goal",
        "--seeds=0",
        "--methods=craft",
        "--controls=False",
        "--max_steps=4",
        "--save_freq=2",
    ]
    flags += [f"--work_dir={tmp_path}/work", f"--results_dir={tmp_path}/out", f"--data_root_dir={tmp_path}/data"]
    flags += [f"--python={variables['PYTHON']}", "--num_trials=4"]

    def job(name: str, **failures: str) -> tuple[int, dict]:
        command = [sys.executable, "-m", "craft_experiments", "job", "table1", name, *flags]
        environment = os.environ | variables | {"PYTHONPATH": str(REPO)} | failures
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPO)
        manifest = json.loads((tmp_path / "work/tiny/records/manifest.json").read_text())
        return done.returncode, manifest["craft--goal--seed0"]

    failed = {"state": "failed", "code": "TRAINING_FAILED"}
    assert job("collect/libero_goal_displaced_no_noops", STUB_COLLECT_FAILS="libero_goal") == (1, failed)
    assert job("collect/libero_goal_displaced_no_noops") == (0, failed)  # until the training begins
    assert job("train/craft--goal--seed0") == (0, {"state": "trained"})
    standard, perturbed = (f"evaluate/craft--goal--seed0/{kind}@libero_goal" for kind in ("standard", "perturbed"))
    assert job(standard, STUB_NO_FINAL_LINE="libero_goal") == (1, {"state": "failed", "code": "PARSE_FAILED"})
    assert job(standard)[0] == 0
    assert job("evaluate/craft--goal--seed0/start_tasks@libero_object")[0] == 0
    assert job(perturbed) == (0, {"state": "evaluated"})
    calls = (tmp_path / "calls").read_text().splitlines()
    assert job(perturbed)[0] == 0 and (tmp_path / "calls").read_text().splitlines() == calls


@pytest.mark.skipif(os.name != "posix", reason="the system does not count them")
def test_seconds_of_processor_are_those_of_a_program_and_its_own_programs(tmp_path):
    """0.3 s each, whatever this process does meanwhile."""
    work = "import time\nwhile time.process_time() < 0.3: pass\n"
    both = work + f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {work!r}], check=True)"

    class Work(Job):
        kind, parts = "work", ("a",)
        spent: dict = {}  # noqa: RUF012

        def commands(self, s):
            return [[sys.executable, "-c", both]]

        def content(self, s):
            return {}

        def finish(self, s, spent, content):
            self.spent.update(spent)

    busy = threading.Thread(target=lambda: [sum(range(10**6)) for _ in range(100)])
    busy.start()
    run_job(resolve(RunConfig(work_dir=str(tmp_path)), "retention"), Work())
    busy.join()
    assert 0.6 <= Work.spent["processor_seconds"] <= Work.spent["seconds"] + 0.2


def test_an_unknown_job_is_an_error():
    command = [sys.executable, "-m", "craft_experiments", "job", "table1", "train/nothing"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 2 and "found 'train/nothing', expected one of `list table1`" in done.stderr
