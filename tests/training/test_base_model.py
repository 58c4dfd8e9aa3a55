"""The base of adapters: found wherever both are, and named with every place that was looked at when it is not."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from small_checkpoints import LORA, act, train

from prismatic.command_line import parse
from prismatic.evidence.files import write_json
from prismatic.model_files import CheckpointError, MissingFileError
from prismatic.training.base_model import BaseModel
from prismatic.training.checkpoint_folder import LISTING, MANIFEST, read_json
from prismatic.training.checkpoints import load_checkpoint, load_unmerged
from prismatic.training.config import FinetuneConfig
from prismatic.training.interpolation import interpolate_checkpoint
from prismatic.training.setup import load_start_model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`home/models/start--1_chkpt` and adapters on it in `home/runs`, trained with a relative --config_file_path."""
    home = tmp_path_factory.mktemp("pair") / "home"
    train(home / "models", "start")
    before = os.getcwd()
    os.chdir(home)
    try:
        for name, tuning in (("lora", LORA), ("full", {})):
            flags = {"config_file_path": "models/start--1_chkpt", "save_training_state": False}
            train(Path("runs"), name, **flags, **tuning)
    finally:
        os.chdir(before)
    return home


@pytest.fixture
def home(pair, tmp_path, monkeypatch):
    """A copy at another place; the original is gone as far as the copy knows, and the working directory is neither."""
    shutil.copytree(pair, tmp_path / "home")
    edit_base(tmp_path / "home/runs/lora--1_chkpt", path=str(tmp_path / "home/models/start--1_chkpt"))
    edit_base(tmp_path / "home/runs/full--1_chkpt", entry="start", path=str(tmp_path / "home/models/start--1_chkpt"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def edit_base(folder: Path, entry: str = "base", **changes) -> None:
    manifest = read_json(folder / MANIFEST)
    base = {key: value for key, value in (manifest[entry] | changes).items() if value is not None}
    write_json(folder / MANIFEST, manifest | {entry: base})
    (folder / LISTING).unlink(missing_ok=True)


def other_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")


def test_the_record_names_the_base_from_anywhere_and_from_the_checkpoint(pair):
    base = read_json(pair / "runs/lora--1_chkpt" / MANIFEST)["base"]
    assert base["path"] == str(pair / "models/start--1_chkpt")
    assert base["relative"] == "../../models/start--1_chkpt"
    assert base["sha256"] == BaseModel.of_checkpoint(pair / "models/start--1_chkpt").sha256


@pytest.mark.parametrize("how", ["as trained", "moved together", "moved apart", "into one folder", "earlier version"])
def test_the_base_is_found_from_any_working_directory(home, tmp_path, how):
    folder, start = home / "runs/lora--1_chkpt", home / "models/start--1_chkpt"
    expected = act(load_checkpoint(folder).model)
    if how == "moved together":
        folder = home.rename(tmp_path / "archive") / "runs/lora--1_chkpt"
    elif how == "moved apart":
        folder = folder.rename(tmp_path / "elsewhere" / folder.name)
    elif how == "into one folder":
        start.rename(tmp_path / "elsewhere" / start.name)
        folder = folder.rename(tmp_path / "elsewhere" / folder.name)
    elif how == "earlier version":  # as it was typed, without the other path
        edit_base(folder, path="models/start--1_chkpt", relative=None)
    assert torch.equal(act(load_checkpoint(folder).model), expected)


def test_interpolation_finds_the_start_of_whole_weights_as_well(home, tmp_path):
    folder = home.rename(tmp_path / "archive") / "runs/full--1_chkpt"
    policy = interpolate_checkpoint(folder, 0.0)
    assert torch.equal(act(policy.model), act(load_checkpoint(tmp_path / "archive/models/start--1_chkpt").model))
    other_weights(tmp_path / "archive/models/start--1_chkpt")
    with pytest.raises(CheckpointError, match="expected weights with sha256.*--base"):
        interpolate_checkpoint(folder, 0.0)


def test_the_flag_overrides_and_its_weights_are_compared(home, tmp_path):
    folder = home / "runs/lora--1_chkpt"
    expected = act(load_checkpoint(folder).model)
    moved = shutil.move(home / "models/start--1_chkpt", tmp_path / "elsewhere" / "renamed")
    with pytest.raises(MissingFileError, match=r"models/start--1_chkpt: not there.*--base_checkpoint"):
        load_checkpoint(folder)
    assert torch.equal(act(load_checkpoint(folder, base=moved).model), expected)
    assert torch.equal(act(load_unmerged(folder, moved).model), act(load_unmerged(folder, moved).model))
    flags = {"config_file_path": str(folder), "base_checkpoint": str(moved), "dataset_name": "libero_mini_no_noops"}
    assert torch.equal(act(load_start_model(FinetuneConfig(**flags)).model), expected)
    other_weights(moved)
    with pytest.raises(CheckpointError, match=r"renamed: [0-9a-f]{64}; expected weights with sha256"):
        load_checkpoint(folder, base=moved)


def test_a_folder_at_the_place_with_other_weights_is_passed_over_for_the_right_one(home, tmp_path):
    folder, start = home / "runs/lora--1_chkpt", home / "models/start--1_chkpt"
    shutil.copytree(start, folder.parent / start.name)  # beside the adapters
    other_weights(start)
    load_checkpoint(folder)
    other_weights(folder.parent / start.name)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert str(start) in str(caught.value) and str(folder.parent / start.name) in str(caught.value)


def test_a_base_for_a_checkpoint_that_needs_none_is_refused(home):
    start = home / "models/start--1_chkpt"
    with pytest.raises(CheckpointError, match="--base_checkpoint.*needs no base"):
        load_checkpoint(start, base=start)


def test_a_checkpoint_that_is_its_own_base_ends(home):
    """Directly, through a second one, and through a link to itself."""
    first = home / "runs/lora--1_chkpt"
    second = Path(shutil.copytree(first, home / "runs/second--1_chkpt"))
    own = BaseModel.of_checkpoint(first).sha256
    link = home / "runs/link"
    link.symlink_to(first)
    for path in (first, link, second):
        edit_base(first, path=str(path), sha256=own, relative=None)
        edit_base(second, path=str(first), sha256=own, relative=None)
        with pytest.raises(CheckpointError, match="its own base"):
            load_checkpoint(first)


@pytest.mark.parametrize(
    "changes",
    [{"kind": "remote"}, {"path": ["x"]}, {"sha256": 5}, {"path": "a\0b"}, {"relative": {}}, {"revision": "main"}],
)
def test_the_record_is_checked(home, changes):
    edit_base(home / "runs/lora--1_chkpt", **changes)
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: base is"):
        load_checkpoint(home / "runs/lora--1_chkpt")


def test_merging_records_the_base_as_seen_from_the_new_folder(home, tmp_path, monkeypatch):
    sys.path.insert(0, str(Path(__file__).parents[2] / "vla-scripts"))
    import merge_lora_weights_and_save as script

    sys.path.pop(0)
    out = tmp_path / "elsewhere" / "deep" / "merged"
    out.parent.mkdir()
    script.merge(
        parse(
            script.MergeConfig,
            ["--lora_finetuned_checkpoint_dir", str(home / "runs/lora--1_chkpt"), "--output_dir", str(out)],
        )
    )
    relative = json.loads((out / MANIFEST).read_text())["base"]["relative"]
    assert (out / relative).resolve() == (home / "models/start--1_chkpt").resolve()
