"""One writer per folder, until its process ends, however it ends."""

import multiprocessing
import os

import pytest

from prismatic.command_line import UsageError
from prismatic.output_folder import held, hold, release


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
