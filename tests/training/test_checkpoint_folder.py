"""Folders on disk: complete or absent at every moment, and recognised when damaged."""

import contextlib
import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismatic.evidence.files import write_json
from prismatic.training.checkpoint_folder import (
    LATEST,
    LISTING,
    MANIFEST,
    CheckpointError,
    MissingFileError,
    check_files,
    find_checkpoints,
    point_to,
    prune,
    publish,
    read_json,
    recover,
    remove_leftovers,
    replace_folder,
    start_folder,
)


class Killed(BaseException):
    pass


def fill(folder, content: str) -> None:
    (folder / "training_state").mkdir()
    write_json(folder / MANIFEST, {"content": content})
    (folder / "weights.bin").write_bytes(content.encode() * 100)
    (folder / "training_state" / "state.bin").write_bytes(content.encode() * 50)


def write(folder, content: str):
    temporary = start_folder(folder)
    fill(temporary, content)
    publish(temporary, folder)
    return folder


def content_of(folder) -> str:
    assert check_files(folder, training_state=True)
    return read_json(folder / MANIFEST)["content"]


def count_calls(monkeypatch, kill_at: int | None = None) -> list[str]:
    """Record every call that changes names or flushes, and die before call number `kill_at`."""
    calls = []

    def patch(name):
        original = getattr(os, name)

        def wrapped(*args, **kwargs):
            if len(calls) == kill_at:
                raise Killed
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, wrapped)

    for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
        patch(name)
    return calls


def test_whenever_the_process_dies_the_old_or_the_new_folder_is_there(tmp_path, monkeypatch):
    def replace_once(root, kill_at=None):
        write(root / "run--5_chkpt", "old")
        with monkeypatch.context() as patch:
            calls = count_calls(patch, kill_at)
            with contextlib.suppress(Killed):
                write(root / "run--5_chkpt", "new")
        return len(calls)

    total = replace_once(tmp_path / "whole")
    assert total > 10
    seen = set()
    for kill_at in range(total):
        root = tmp_path / str(kill_at)
        replace_once(root, kill_at)
        remove_leftovers(root, "run")
        assert [p.name for p in root.iterdir()] == ["run--5_chkpt"]
        seen.add(content_of(root / "run--5_chkpt"))
    assert seen == {"old", "new"}


def test_a_first_folder_is_absent_or_complete(tmp_path, monkeypatch):
    for kill_at in range(20):
        root = tmp_path / str(kill_at)
        root.mkdir()
        with monkeypatch.context() as patch:
            count_calls(patch, kill_at)
            with contextlib.suppress(Killed):
                write(root / "run--5_chkpt", "new")
        assert all(content_of(path) == "new" for _, path in find_checkpoints(root, "run"))
        remove_leftovers(root, "run")
        assert not list(root.glob("*.tmp"))


def test_the_files_of_the_run_survive_in_a_shared_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("1\n")
    write(folder, "first")
    (folder / "metrics.jsonl").open("a").write("2\n")
    (folder / "tensorboard").mkdir()
    write(folder, "second")
    assert content_of(folder) == "second"
    assert (folder / "metrics.jsonl").read_text() == "1\n2\n" and (folder / "tensorboard").is_dir()
    # Died after the new folder got its name: the run's files are still in the old one.
    shutil.copytree(folder, tmp_path / "run.old")
    (folder / "metrics.jsonl").unlink()
    recover(folder)
    assert (folder / "metrics.jsonl").read_text() == "1\n2\n" and not (tmp_path / "run.old").exists()


def test_an_export_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    for kill_at in range(6):
        folder = tmp_path / str(kill_at) / "run--5_chkpt--published"
        folder.mkdir(parents=True)
        (folder / "head--5_checkpoint.pt").write_text("old")
        new = start_folder(folder)
        (new / "head--latest_checkpoint.pt").write_text("new")
        with monkeypatch.context() as patch:
            count_calls(patch, kill_at)
            with contextlib.suppress(Killed):
                replace_folder(new, folder)
        remove_leftovers(folder.parent, "run")
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        assert [path.name for path in folder.iterdir()] in (["head--5_checkpoint.pt"], ["head--latest_checkpoint.pt"])


def test_leftovers_of_other_runs_stay(tmp_path):
    names = ["run--5_chkpt.tmp", "run--5_chkpt.deleted", "run--6_chkpt--published.tmp", "run.tmp"]
    others = ["run2--5_chkpt.tmp", "my-run--5_chkpt.tmp", "run--5_chkpt", "run-5.tmp"]
    for name in (*names, *others):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path, "run")
    assert {p.name for p in tmp_path.iterdir()} == set(others)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (None, None, [1, 2, 3, 4, 5, 6]),
        (2, None, [5, 6]),
        (1, 2, [2, 4, 6]),
        (1, 3, [3, 6]),
        (9, None, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_retention(tmp_path, keep_last, keep_every, kept):
    for step in range(1, 7):
        folder = write(tmp_path / f"run--{step}_chkpt", str(step))
    (tmp_path / "run--1_chkpt--published").mkdir()
    (tmp_path / "other--1_chkpt").mkdir()
    prune(tmp_path, "run", folder, keep_last, keep_every)
    assert [step for step, _ in find_checkpoints(tmp_path, "run")] == kept
    assert (tmp_path / "run--1_chkpt--published").exists() == (1 in kept)
    assert (tmp_path / "other--1_chkpt").exists() and not list(tmp_path.glob("*.deleted"))


def test_retention_never_deletes_what_was_just_written(tmp_path):
    # Resumed from step 3 although step 9 exists: step 4 is the newest in time, step 9 in steps.
    for step in (3, 9, 4):
        folder = write(tmp_path / f"run--{step}_chkpt", str(step))
    prune(tmp_path, "run", folder, keep_last=1, keep_every=None)
    assert [step for step, _ in find_checkpoints(tmp_path, "run")] == [4, 9]


def test_a_half_deleted_folder_never_looks_complete(tmp_path, monkeypatch):
    newest = tmp_path / "run--2_chkpt"
    for kill_at in range(12):
        for step in (1, 2):
            write(tmp_path / f"run--{step}_chkpt", str(step))
        with monkeypatch.context() as patch:
            count_calls(patch, kill_at)
            with contextlib.suppress(Killed):
                prune(tmp_path, "run", newest, keep_last=1, keep_every=None)
        assert all(content_of(path) == str(step) for step, path in find_checkpoints(tmp_path, "run"))
        remove_leftovers(tmp_path, "run")


def test_the_pointer_names_the_newest_folder_at_every_moment(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    point_to(run_dir, tmp_path / "run--1_chkpt")
    for kill_at in range(3):
        with monkeypatch.context() as patch:
            count_calls(patch, kill_at)
            with contextlib.suppress(Killed):
                point_to(run_dir, tmp_path / "run--2_chkpt")
        assert (run_dir / LATEST).read_text() in ("run--1_chkpt\n", "run--2_chkpt\n")
    point_to(run_dir, tmp_path / "run--3_chkpt")
    assert (run_dir / LATEST).read_text() == "run--3_chkpt\n"


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sealed") / "run--1_chkpt", "content")


def test_every_truncation_of_every_file_is_recognised(sealed):
    for file in [p for p in sealed.rglob("*") if p.is_file()]:
        content = file.read_bytes()
        for length in range(len(content)):
            file.write_bytes(content[:length])
            with pytest.raises(CheckpointError, match=file.name):
                check_files(sealed, training_state=True)
        file.write_bytes(content)
    assert check_files(sealed, training_state=True)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_changed_byte_is_recognised(sealed, data):
    file = data.draw(st.sampled_from(sorted(p for p in sealed.rglob("*") if p.is_file() and p.name != LISTING)))
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    changed = content.copy()
    changed[position] ^= data.draw(st.integers(1, 255))
    try:
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match="sha256"):
            check_files(sealed, training_state=True)
    finally:
        file.write_bytes(content)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["files", "size", "a"]), inner),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode() + b"\n"))  # fmt: skip
def test_any_list_of_files_is_read_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / LISTING).write_bytes(content)
    try:
        check_files(folder, training_state=True)
    except CheckpointError as error:
        assert str(folder) in str(error)


def test_missing_files_and_paths_outside_are_refused(tmp_path):
    folder = write(tmp_path / "run--1_chkpt", "content")
    (folder / "weights.bin").unlink()
    with pytest.raises(MissingFileError, match="weights.bin does not exist"):
        check_files(folder)
    shutil.rmtree(folder / "training_state")
    write_json(folder / LISTING, {"files": {"../outside": {"size": 1, "sha256": ""}}})
    with pytest.raises(CheckpointError, match="expected one inside the folder"):
        check_files(folder)
    (folder / LISTING).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        check_files(folder)


def test_the_training_state_may_be_deleted_from_a_folder_that_is_evaluated(tmp_path):
    folder = write(tmp_path / "run--1_chkpt", "content")
    shutil.rmtree(folder / "training_state")
    assert check_files(folder)
    with pytest.raises(MissingFileError, match="state.bin"):
        check_files(folder, training_state=True)
    (folder / LISTING).unlink()
    assert not check_files(folder, training_state=True)  # an older folder: nothing to compare with
