"""Where programs write: whether they can is said before any work; one writer per folder, until its process ends."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from experiments.robot.libero import merge_shards
from prismatic import output_folder
from prismatic.command_line import UsageError
from prismatic.output_folder import check_file, held, hold, is_held, release
from prismatic.programs.interpolate_weights import InterpolateConfig, interpolate
from prismatic.programs.measure_retention import MeasureConfig, measure
from prismatic.vla.datasets.inspect import inspect


def test_another_process_is_refused_and_named(tmp_path, held_elsewhere):
    folder = tmp_path / "out"
    with held_elsewhere(folder) as other, pytest.raises(UsageError) as error:
        hold(folder, "--output_dir")
    assert f"--output_dir {folder}: process {other.pid} on host {os.uname().nodename}" in str(error.value)
    assert not folder.exists()


def test_a_killed_writer_leaves_the_folder_free(tmp_path, held_elsewhere):
    folder = tmp_path / "out"
    with held_elsewhere(folder):
        pass  # killed
    with held(folder, "--output_dir"):
        pass


def test_who_asks_whether_a_folder_is_held_disturbs_nobody(tmp_path, held_elsewhere):
    folder = tmp_path / "out"
    assert not is_held(folder) and list(tmp_path.iterdir()) == []
    with held_elsewhere(folder):
        assert is_held(folder)
        with pytest.raises(UsageError):
            hold(folder, "--output_dir")
    assert not is_held(folder)  # killed
    with held(folder, "--output_dir"):
        assert is_held(folder) and is_held(folder)
        context = multiprocessing.get_context("fork")
        with context.Pool(1) as pool:
            assert pool.apply(_is_held_by_another, [folder])
    assert not is_held(folder)


def _is_held_by_another(folder) -> bool:
    """As another program would see it, with nothing that this process knows of its own locks."""
    output_folder._HELD.clear()
    return is_held(folder)


def test_nothing_is_left_behind(tmp_path, held_elsewhere):
    with held(tmp_path / "a" / "b" / "out", "--output_dir"):
        assert list(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "a" / "out", "--output_dir"):
        (tmp_path / "a" / "out").mkdir()
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "out"]
    (tmp_path / "a" / "out").rmdir()
    (tmp_path / "a").rmdir()
    with held_elsewhere(tmp_path / "out"):  # and the next one can have it
        pass


def test_a_process_may_hold_again_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hold(tmp_path / "out", "--a")
    hold(tmp_path.relative_to(tmp_path) / "out", "--b")
    release(tmp_path / "out")
    release(tmp_path / "out")


def test_a_child_does_not_keep_the_lock_of_its_parent(tmp_path, held_elsewhere):
    folder = tmp_path / "out"
    hold(folder, "--output_dir")
    context = multiprocessing.get_context("fork")
    end = context.Event()
    child = context.Process(target=end.wait)
    child.start()
    release(folder)
    with held_elsewhere(folder):
        pass
    end.set()
    child.join()


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    import errno
    import fcntl

    def refuse(*_args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with held(tmp_path / "out", "--output_dir"):
        pass


# --- folders that cannot be written to, here those of a mode that says so


@pytest.fixture
def closed(tmp_path):
    """A folder with a file and a folder in it, all of which can be read only."""
    folder = tmp_path / "closed"
    (folder / "below").mkdir(parents=True)
    (folder / "file").touch(0o444)
    for path in (folder / "below", folder):
        path.chmod(0o555)
    yield folder
    for path in (folder, folder / "below"):
        path.chmod(0o755)  # so that pytest can delete it


def test_what_cannot_be_written_is_named(closed, tmp_path, run_unprivileged):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "lost").symlink_to(tmp_path / "nowhere")
    program = """
import json, sys
from pathlib import Path
from prismatic.command_line import UsageError
from prismatic.output_folder import check_file, check_folder, hold
def said(check, path):
    try:
        check(Path(path), "--flag")
    except UsageError as error:
        return str(error)
print(json.dumps({path: [said(check, path) for check in (check_folder, hold, check_file)] for path in sys.argv[1:]}))
"""
    bad = [closed, closed / "below", closed / "new", closed / "new" / "deep"]
    good = [tmp_path / "given" / "new", tmp_path / "new" / "deep"]
    done = run_unprivileged(program, *map(str, [*bad, *good]))
    found = json.loads(done.stdout)
    for path in bad:
        folder, held_folder, file = found[str(path)]
        assert folder == held_folder
        assert folder.startswith(f"--flag {path}: ") and "cannot be written to; choose another folder" in folder
        assert file.startswith(f"--flag {path}: ")
    assert [found[str(path)] for path in good] == [[None] * 3] * len(good)
    assert not (tmp_path / "new").exists()


def test_only_files_are_replaced(tmp_path):
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "lost", Path("/dev/null")):
        with pytest.raises(UsageError, match=f"--flag {path}: expected the name of a file"):
            check_file(path, "--flag")
    check_file(__file__, "--flag")


ROOT = Path(__file__).parents[1]
START, DATA = ROOT / "pretrained_models" / "tiny-libero-object", ROOT / "datasets" / "rlds"
SPATIAL = "libero_spatial_scripted_no_noops"
EVALUATE = ["--pretrained_checkpoint", START, "--task_suite_name", "libero_object", "--rollout_dir", "OPEN"]
PROGRAMS = {
    "vla-scripts/finetune.py": [
        *("--config_file_path", START, "--data_root_dir", DATA, "--dataset_name", SPATIAL, "--run_root_dir", "CLOSED"),
    ],
    "vla-scripts/measure_retention.py": [
        *("--checkpoint", START, "--start", START, "--dataset_name", SPATIAL, "--output", "CLOSED/a.json"),
    ],
    "vla-scripts/interpolate_weights.py": ["--checkpoint", START, "--output", "CLOSED/a"],
    "experiments/robot/libero/run_libero_eval.py": [*EVALUATE, "--local_log_dir", "OPEN", "--results_dir", "CLOSED"],
    "experiments/robot/libero/compare_evals.py": ["OPEN", "OPEN", "--output", "CLOSED/a.md"],
    "experiments/robot/libero/make_report.py": ["EPISODES", "--output", "CLOSED/a.html"],
    "experiments/robot/libero/merge_shards.py": ["OPEN", "--output", "CLOSED/a"],
    "experiments/robot/libero/collect_demos.py": [
        *("--task_suite_name", "libero_object", "--task_ids", "0", "--dataset_name", "x", "--output_dir", "CLOSED"),
    ],
    "experiments/robot/doctor/__main__.py": ["--json", "CLOSED/a.json"],
    "prismatic/vla/datasets/inspect.py": [DATA / SPATIAL, "--output", "CLOSED"],
    "craft_experiments/__main__.py": ["run", "table1", "--work_dir", "OPEN", "--results_dir", "CLOSED"],
    "craft_experiments/00_demo/run_demo.py": ["--work_dir", "CLOSED"],
}
"""Program -> a command line with a folder that cannot be written to, its last flag."""


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_say_so_before_any_work(program, closed, tmp_path, run_unprivileged):
    given = tmp_path / "given"
    given.mkdir()
    places = {"CLOSED": closed, "OPEN": given, "EPISODES": ROOT / "results" / "demo" / "evaluations" / "start-target"}
    words = [str(word) for word in PROGRAMS[program]]
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    code = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run_unprivileged(code, program, *words, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stdout == "", done.stderr
    flag = next(word for word in reversed(words) if word.startswith("--"))
    assert done.stderr.count("\n") == 1 and f"{flag} {closed}" in done.stderr.replace("/--run_id_override", "")
    assert "cannot be written to; choose another folder" in done.stderr
    assert list(given.iterdir()) == []


WRITERS = {
    "interpolate": lambda out: interpolate(InterpolateConfig(checkpoint=str(START), output=str(out))),
    "measure": lambda out: measure(
        MeasureConfig(checkpoint=str(START), start=str(START), dataset_name=SPATIAL, output=str(out))
    ),
    "merge shards": lambda out: merge_shards.merge([out], out),
    "inspect": lambda out: inspect(DATA / SPATIAL, out),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_program_is_the_only_writer_of_its_output(writer, tmp_path, held_elsewhere):
    out = tmp_path / "out"
    with held_elsewhere(out), pytest.raises(UsageError, match=f"{out}: process .* writes to it at this moment"):
        WRITERS[writer](out)
    assert not out.exists()
