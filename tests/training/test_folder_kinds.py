"""A path that is no checkpoint: what it is, and which folder was meant. Nothing is loaded for that."""

import json
import os

import pytest

from prismatic.model_files import CheckpointError, MissingFileError
from prismatic.training.checkpoint_folder import LATEST, MANIFEST
from prismatic.training.folder_kinds import check_is_checkpoint

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 9\n"
PLAIN = ("config.json", "preprocessor_config.json", "dataset_statistics.json")


def checkpoint(folder):
    """As far as can be seen without loading."""
    folder.mkdir(parents=True)
    for name in (*PLAIN, MANIFEST, "model.safetensors", "action_head--1_checkpoint.safetensors"):
        (folder / name).write_text("{}")
    return folder


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        file = folder / name.replace("__", "/").replace("_json", ".json").replace("_pt", ".pt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def message(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_is_checkpoint(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_is_taken(tmp_path):
    assert check_is_checkpoint(str(checkpoint(tmp_path / "r--1_chkpt"))) == tmp_path / "r--1_chkpt"


def test_a_run_and_a_folder_of_runs_name_the_newest_checkpoint(tmp_path):
    first, last = (checkpoint(tmp_path / f"r--{step}_chkpt") for step in (9, 10))
    (tmp_path / "r").mkdir()
    assert f"the folder of a run; its newest checkpoint is {last}" in message(tmp_path / "r")
    (tmp_path / "r" / LATEST).write_text("r--9_chkpt\n")  # after a resume from an earlier step
    assert f"its newest checkpoint is {first}" in message(tmp_path / "r")
    (tmp_path / "r" / LATEST).write_text("gone--3_chkpt\n")
    assert f"its newest checkpoint is {last}" in message(tmp_path / "r")
    os.utime(first, (2e9, 2e9))  # the clock was set back in between
    assert f"a folder of runs with 2 checkpoints; the newest is {last}" in message(tmp_path)
    other = checkpoint(tmp_path / "other--1_chkpt")
    os.utime(other, (1e9, 1e9))
    assert f"a folder of runs with 3 checkpoints; the newest is {last}" in message(tmp_path)
    os.utime(other, (3e9, 3e9))
    assert f"the newest is {other}" in message(tmp_path)


def test_a_run_that_saved_nothing_yet(tmp_path):
    assert "a run that has no checkpoint" in message(write(tmp_path / "r", **{"metrics.jsonl": "{}"}))


@pytest.mark.parametrize("part", ["lora_adapter", "training_state"])
def test_parts_of_a_checkpoint_name_it(tmp_path, part):
    folder = checkpoint(tmp_path / "r--1_chkpt")
    (folder / part).mkdir()
    assert message(folder / part).endswith(f"name the checkpoint: {folder}")
    assert message(folder / "model.safetensors").endswith(str(folder))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("some-lab/Policy-7b", "hf download some-lab/Policy-7b --local-dir pretrained_models/Policy-7b"),
        ("https://huggingface.co/some-lab/Policy/tree/main", "hf download some-lab/Policy "),
        ("hf://some-lab/Policy", "hf download some-lab/Policy "),
        ("runs/frist--1_chkpt", "did you mean runs/first--1_chkpt?"),
        ("/no/such/place/at/all", "does not exist, expected the folder of a checkpoint"),
        ("x" * 5000, "no path of a folder"),
        ("a\0b", "no path of a folder"),
    ],
)
def test_nothing_there(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/first--1_chkpt").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=".") as caught:
        check_is_checkpoint(text)
    assert words in str(caught.value)


FOREIGN = {
    "unmerged adapters": (
        {"adapter_config_json": {"base_model_name_or_path": "org/base"}},
        "holds LoRA adapters alone; merge them into their base .org/base.",
    ),
    "unmerged checkpoint of the public code": (
        {"lora_adapter__adapter_config_json": {}, "action_head--5_checkpoint_pt": "x"},
        "adapters are not merged",
    ),
    "a VLM alone": ({"config_json": {"model_type": "qwen2"}, "model.safetensors": "x"}, "qwen2 without an action head"),
    "OpenVLA": (
        {"config_json": {"model_type": "openvla"}, "model.safetensors": "x"},
        "vision-language model without an action head.*finetune.py --config_file_path",
    ),
    "LeRobot": (
        {"config_json": {"type": "pi0", "input_features": {}}, "model.safetensors": "x"},
        "LeRobot policy.*pi0",
    ),
    "openpi": ({"params___METADATA": "x", "assets__x": "x"}, "openpi"),
    "pickled weights": ({"pytorch_model.bin": "x", "config_json": {}}, "pickle"),
    "DeepSpeed": ({"global_step5__x": "x"}, "sharded training state"),
    "native VLM": ({"config_json": {"model": {}}, "checkpoints__step-1_pt": "x"}, "--vlm_path"),
    "hub cache": ({"snapshots__abc__config_json": {}}, "name the folder in it: .*snapshots/abc"),
    "RLDS version": ({"dataset_info_json": {}}, "a data set"),
    "RLDS": ({"1.0.0__dataset_info_json": {}}, "a data set"),
    "HDF5": ({"pick_it_demo.hdf5": "x"}, "a data set"),
    "LeRobot data": ({"meta__info_json": {}}, "a data set"),
    "empty": ({}, "an empty folder"),
    "something else": ({"notes.txt": "x"}, "is no checkpoint: expected .*found notes.txt"),
    "description that is no JSON": ({"config_json": "{"}, "is no checkpoint"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_folders_of_other_kinds(tmp_path, kind):
    files, words = FOREIGN[kind]
    with pytest.raises(MissingFileError, match=words):
        check_is_checkpoint(write(tmp_path / "here" / "x", **files))


def test_half_written_and_one_level_up(tmp_path):
    (tmp_path / "a--1_chkpt.tmp").mkdir()
    assert "without this ending" in message(tmp_path / "a--1_chkpt.tmp")
    inner = checkpoint(tmp_path / "clone" / "weights")
    assert f"name one, such as {inner}" in message(tmp_path / "clone")


@pytest.mark.parametrize("name", [*PLAIN, "model.safetensors", "action_head--1_checkpoint.safetensors"])
def test_files_that_were_not_downloaded_or_are_no_files(tmp_path, name):
    folder = checkpoint(tmp_path / "r--1_chkpt")
    bad = {
        "is a Git LFS pointer.*git lfs pull": lambda file: file.write_text(POINTER),
        "is a web page": lambda file: file.write_text("<!DOCTYPE html><html>Sign in</html>"),
        "is empty": lambda file: file.write_text(""),
        "is a device, pipe or socket": os.mkfifo,
        "is a device, pipe or socket ": lambda file: file.symlink_to("/dev/zero"),
        "is a folder": os.mkdir,
    }
    for words, change in bad.items():
        (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
        change(folder / name)
        with pytest.raises(CheckpointError, match=f"{name} {words.strip()}"):
            check_is_checkpoint(folder)


@pytest.mark.parametrize("name", [*PLAIN, "model.safetensors"])
def test_links_to_nothing_and_loops_of_links(tmp_path, name):
    folder = checkpoint(tmp_path / "r--1_chkpt")
    for target in ("nowhere", name):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        with pytest.raises(CheckpointError, match=name):
            check_is_checkpoint(folder)


def test_a_shard_index_leads_nowhere_else(tmp_path):
    folder = checkpoint(tmp_path / "r--1_chkpt")
    (tmp_path / "outside.safetensors").write_text("x")
    (folder / "model.safetensors").unlink()
    for target in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "", 5, ".."):
        write(folder, **{"model.safetensors.index.json": {"weight_map": {"a": target}}})
        with pytest.raises(CheckpointError, match="weight_map"):
            check_is_checkpoint(folder)
    write(folder, **{"model.safetensors.index.json": {"weight_map": {"a": "model-1.safetensors"}}})
    with pytest.raises(MissingFileError, match="model-1.safetensors"):
        check_is_checkpoint(folder)
