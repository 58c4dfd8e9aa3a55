"""Checkpoint folders on disk: complete or absent, whatever happens while they are written.

A folder is written as `{name}.tmp`, every file is flushed to the disk, the list of its files (`files.json`: sizes and
sha256) comes last, and only then it gets its name. A folder of the same name is moved to `{name}.old` in between and
deleted afterwards; `recover` finishes what a dead process left. Deletion begins with a rename to `{name}.deleted`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Also the names under which others know them.
from prismatic.evidence.files import write_json
from prismatic.evidence.hashes import sha256_of
from prismatic.model_files import CheckpointError, MissingFileError, existing, read_json, reading  # noqa: F401

LISTING = "files.json"
LATEST = "latest"
MANIFEST = "craft_checkpoint.json"
CARD = "README.md"
"""The model card. It is not in the list of files: its owner edits it, and an evaluation rewrites it."""
LARGEST_CARD = 1 << 20
CARD_END = "<!-- end of the generated card: what stands below this line is kept -->"
PUBLISHED = "--published"
"""What the name of a checkpoint's export in the published layout ends with."""
TRAINING_STATE = "training_state"
_TMP, _OLD, _DELETED = ".tmp", ".old", ".deleted"
# What a run keeps in its own folder, which `--save_latest_checkpoint_only True` shares with the checkpoint.
_RUN_FILES = (
    "metrics.jsonl",
    "flags.json",
    "data_manifest.json",
    "first_batch.png",
    "first_batch.txt",
    "tensorboard",
    LATEST,
)
# Hashing these costs nothing, and they decide how much memory a model takes.
_ALWAYS_HASHED = 1 << 20


def has_own_card(folder: Path) -> bool:
    """Whether `README.md` in a folder is a model card of ours, which says things and decides nothing."""
    card = folder / CARD
    if (folder / MANIFEST).is_file() or not card.is_file():
        return card.is_file()
    return card.stat().st_size <= LARGEST_CARD and CARD_END.encode() in card.read_bytes()


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; earlier ones are untouched."""


# ------------------------------------------------------------------------------------------------ reading


def check_files(folder: Path, training_state: bool = False) -> bool:
    """Compare a folder with its list of files; False when it has none (older and published folders).

    Sizes are always compared, hashes of small files too. The training state is passed over (it may have been deleted
    from a folder that is only evaluated) unless `training_state`, which also compares its hashes.
    Raises CheckpointError naming the file, what was found and what was expected.
    """
    if not (folder / LISTING).exists():
        return False
    for name, record in _read_listing(folder / LISTING).items():
        is_state = name.startswith(f"{TRAINING_STATE}/")
        if is_state and not training_state:
            continue
        file = existing(folder / name)
        size = file.stat().st_size
        if size != record["size"]:
            raise CheckpointError(f"{file}: size is {size} bytes, expected {record['size']} as in {LISTING}")
        if is_state or size <= _ALWAYS_HASHED:
            found = sha256_of(file)
            if found != record["sha256"]:
                raise CheckpointError(f"{file}: sha256 is {found}, expected {record['sha256']} as in {LISTING}")
    return True


def _read_listing(path: Path) -> dict[str, dict[str, Any]]:
    files = read_json(path).get("files")
    if not path.read_bytes().endswith(b"}\n"):
        raise CheckpointError(f"{path}: the final newline is missing, expected a complete list of files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: files is {type(files).__name__}, expected an object")
    for name, record in files.items():
        if not isinstance(record, dict) or not isinstance(record.get("size"), int) or "sha256" not in record:
            raise CheckpointError(f"{path}: files[{name!r}] is {record!r}, expected size and sha256")
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise CheckpointError(f"{path}: files has the path {name!r}, expected one inside the folder")
    return files


def find_checkpoints(root: Path, run_id: str) -> list[tuple[int, Path]]:
    """(step, folder) of the run's complete folders `{run_id}--{step}_chkpt`, oldest step first."""
    pattern = re.compile(re.escape(run_id) + r"--(\d+)_chkpt")
    entries = root.iterdir() if root.exists() else ()
    return sorted((int(m[1]), p) for p in entries if (m := pattern.fullmatch(p.name)))


# ------------------------------------------------------------------------------------------------ writing


def start_folder(folder: Path) -> Path:
    """An empty temporary folder beside `folder`, to be given to `publish`."""
    temporary = folder.with_name(folder.name + _TMP)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def seal(folder: Path) -> None:
    """Flush all files to the disk and write the list of files, last; the model card is not in it."""
    (folder / LISTING).unlink(missing_ok=True)
    paths = sorted(folder.rglob("*"))
    files = {}
    for path in paths:
        if path.is_file():
            _sync(path)
            if path == folder / CARD:
                continue
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    write_json(folder / LISTING, {"files": files})
    _sync(folder / LISTING)
    for path in (*(p for p in paths if p.is_dir()), folder):
        _sync(path)


def publish(temporary: Path, folder: Path) -> None:
    """Seal a finished temporary folder and give it its name.

    Files of the run that lie in a folder of that name move over.
    """
    seal(temporary)
    replace_folder(temporary, folder)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Give a finished folder its name. A folder of that name is kept until the new one is in place."""
    old = folder.with_name(folder.name + _OLD)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _sync(folder.parent)
    recover(folder)


def recover(folder: Path) -> None:
    """Finish a replacement of `folder` that a dead process left half done: afterwards the folder is old or new."""
    old = folder.with_name(folder.name + _OLD)
    if not old.exists():
        return
    if not folder.exists():
        old.rename(folder)
        _sync(folder.parent)
        return
    for path in _files_of_the_run(old):
        if not (folder / path.name).exists():
            path.rename(folder / path.name)
    remove_folder(old)


def _files_of_the_run(folder: Path) -> list[Path]:
    if folder.name.removesuffix(_OLD).endswith(PUBLISHED):
        return []
    entries = list(folder.iterdir())
    if not (folder / MANIFEST).exists():  # a run's folder before its first checkpoint
        return entries
    if not (folder / LISTING).exists():
        return [path for path in entries if path.name in _RUN_FILES]
    of_checkpoint = {LISTING, CARD, *(name.split("/")[0] for name in _read_listing(folder / LISTING))}
    return [path for path in entries if path.name not in of_checkpoint]


def remove_folder(folder: Path) -> None:
    """Delete a folder; a half-deleted one never has the name of a complete one."""
    doomed = folder.with_name(folder.name + _DELETED)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    _sync(folder.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(root: Path, run_id: str) -> None:
    """Finish what dead processes of this run left: replacements, half-written and half-deleted folders."""
    pattern = re.compile(rf"{re.escape(run_id)}(--\d+_chkpt)?({PUBLISHED})?(\.old)?(\.tmp|\.old|\.deleted)")
    for path in sorted(root.iterdir()) if root.exists() else ():
        if not pattern.fullmatch(path.name):
            continue
        if path.name.endswith(_OLD):
            recover(path.with_name(path.name.removesuffix(_OLD)))
        else:
            shutil.rmtree(path, ignore_errors=True)


def point_to(run_dir: Path, folder: Path) -> None:
    """Let `{run_dir}/latest` name `folder`, the newest complete checkpoint; replaced in one step."""
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f"{LATEST}{_TMP}"
    temporary.write_text(folder.name + "\n", encoding="utf-8")
    _sync(temporary)
    temporary.replace(run_dir / LATEST)
    _sync(run_dir)


def prune(root: Path, run_id: str, newest: Path, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Delete what the retention policy does not keep and return it.

    Kept are `newest` (just written), the `keep_last` highest steps (None: all) and steps divisible by `keep_every`.
    """
    if keep_last is None:
        return []
    found = find_checkpoints(root, run_id)
    kept = {newest, *(path for _, path in found[-keep_last:])}
    kept |= {path for step, path in found if keep_every is not None and step % keep_every == 0}
    removed = [path for _, path in found if path not in kept]
    for path in removed:
        for folder in (path, path.with_name(f"{path.name}{PUBLISHED}")):
            if folder.exists():
                remove_folder(folder)
    return removed


@contextmanager
def explained_write_errors(temporary: Path, folder: Path) -> Iterator[None]:
    """Remove the temporary folder when writing fails, and say where and why when the disk is the reason.

    Raises CheckpointWriteError with the free space for errors of the disk; other errors pass unchanged.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        recover(folder)
        # Rust libraries (weights, tokenizers) report the system's error as text only.
        if isinstance(error, OSError) or re.search(r"os error \d+|Os \{ code", str(error)):
            usage = shutil.disk_usage(folder.parent)
            raise CheckpointWriteError(
                f"{folder}: the checkpoint could not be written: {error}. {usage.free / 2**30:.2f} of "
                f"{usage.total / 2**30:.2f} GiB of this disk are free. Earlier checkpoints are untouched"
            ) from error
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot flush folders
            raise
    finally:
        os.close(descriptor)
