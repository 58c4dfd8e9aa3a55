"""Which instructions a policy was trained on: what checkpoints record, and that the record goes with the weights."""

from __future__ import annotations

import json
from pathlib import Path

import micro
import pytest
from published_fixtures import make_published_folder
from test_interpolation import edit_manifest, run_script

from prismatic.models.presets import PRESETS
from prismatic.training.checkpoint_files import read_manifest
from prismatic.training.checkpoint_folder import CheckpointError
from prismatic.training.checkpoints import load_checkpoint
from prismatic.training.instruction_record import recorded_instructions, with_trained_on
from prismatic.training.interpolation import interpolate_checkpoint, save_policy
from prismatic.training.published import export_published
from prismatic.vla.datasets.dataset import VLADataset

REPO = Path(__file__).parents[2]
SHIPPED = sorted(REPO.glob("pretrained_models/*/craft_checkpoint.json"))
OLD = {"old_set": ["open the drawer", "push the plate"]}


@pytest.fixture
def train(make_trainer, tmp_path, monkeypatch):
    """train(name, **flags): (trainer, its last checkpoint) of a run of the micro model, two steps as a rule."""
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)

    def run(name: str, **flags):
        trainer = make_trainer(name, **({"max_steps": 2} | flags))
        trainer.fit()
        return trainer, tmp_path / "runs" / f"{name}--{trainer.cfg.max_steps}_chkpt"

    return run


@pytest.fixture
def start(train) -> Path:
    """A checkpoint whose record is that of another data set."""
    folder = train("start", max_steps=1)[1]
    edit_manifest(folder, instructions=OLD)
    return folder


def sentences(trainer) -> list[str]:
    """Distinct instructions of the training samples, by reading all of them."""
    data = trainer.setup.dataset
    return sorted({data[(0, index)]["instruction"] for index in range(len(data))})


def record(folder: Path) -> dict[str, list[str]]:
    return json.loads((folder / "craft_checkpoint.json").read_text())["instructions"]


# ------------------------------------------------------------------------------------------------ the union


def test_the_record_is_distinct_sorted_and_only_grows():
    data = {
        "old_set": {"episodes": {"push the plate": [3], "close the drawer": [0, 1]}},
        "new_set": {"episodes": {"b": [1], "a": [0]}, "replay": True},
    }
    found = with_trained_on(OLD | {"other": ["x"]}, data)
    assert found == {
        "old_set": ["close the drawer", "open the drawer", "push the plate"],
        "other": ["x"],
        "new_set": ["a", "b"],
    }
    assert OLD == {"old_set": ["open the drawer", "push the plate"]}
    assert with_trained_on(found, data) == found


def test_a_manifest_without_the_entry_records_nothing():
    assert recorded_instructions({"step": 3}, Path("m.json")) == {}


@pytest.mark.parametrize("entry", [["a"], None, {"set": "a"}, {"set": [1]}])
def test_an_entry_of_another_form_is_refused_with_the_file(entry):
    with pytest.raises(CheckpointError, match="m.json: instructions is .*expected {data set name"):
        recorded_instructions({"instructions": entry}, Path("m.json"))


# ------------------------------------------------------------------------------------------------ runs


def test_a_run_records_what_it_saw_on_top_of_its_start(start, train):
    trainer, folder = train("next", config_file_path=str(start))
    assert trainer.setup.start_instructions == OLD
    assert len(sentences(trainer)) > 1
    assert record(folder) == OLD | {"libero_mini_no_noops": sentences(trainer)}
    again, last = train("again", config_file_path=str(folder))
    assert again.setup.start_instructions == record(folder) == record(last)


def test_only_kept_episodes_count(train, monkeypatch):
    whole = VLADataset.manifest

    def first_instruction(self):
        content = whole(self)
        return {n: e | {"episodes": dict(list(e["episodes"].items())[:1])} for n, e in content.items()}

    trainer, folder = train("all", max_steps=1)
    assert record(folder) == {"libero_mini_no_noops": sentences(trainer)}
    monkeypatch.setattr(VLADataset, "manifest", first_instruction)
    assert len(record(train("fewer", max_steps=1)[1])["libero_mini_no_noops"]) == 1


def test_a_start_of_an_older_version_records_nothing(start, train):
    manifest = read_manifest(start)
    del manifest["instructions"]
    (start / "craft_checkpoint.json").write_text(json.dumps(manifest))
    trainer, folder = train("next", config_file_path=str(start))
    assert trainer.setup.start_instructions == {}
    assert record(folder) == {"libero_mini_no_noops": sentences(trainer)}


def test_a_resumed_run_records_what_an_uninterrupted_one_does(start, train):
    flags = {"config_file_path": str(start), "save_freq": 1}
    whole = train("whole", max_steps=2, **flags)[1]
    train("cut", max_steps=1, **flags)
    resumed = train("cut", max_steps=2, resume=True, **flags)[1]
    assert record(resumed) == record(whole) and OLD.items() < record(whole).items()


# ------------------------------------------------------------------------------------------------ with the weights


def test_interpolation_keeps_the_record_and_gives_it_to_the_next_run(start, train, tmp_path):
    folder = train("next", config_file_path=str(start))[1]
    out = save_policy(interpolate_checkpoint(folder, 0.5), tmp_path / "out")
    assert record(out) == record(folder)
    assert train("last", config_file_path=str(out))[0].setup.start_instructions == record(folder)


def test_the_merge_keeps_the_record(start, train, tmp_path, monkeypatch):
    lora = {"config_file_path": str(start), "use_lora": True, "lora_rank": 2}
    folder, merged = train("lora", **lora)[1], tmp_path / "merged"
    expected = record(folder)
    assert OLD.items() < expected.items()
    arguments = f"--lora_finetuned_checkpoint_dir {folder}"
    run_script(monkeypatch, "merge_lora_weights_and_save", "merge", f"{arguments} --output_dir {merged}")
    run_script(monkeypatch, "merge_lora_weights_and_save", "merge", arguments)
    assert record(merged) == record(folder) == expected
    assert record(train("during", merge_lora_during_training=True, **lora)[1]) == expected


def test_published_folders_record_nothing_and_a_run_from_one_what_it_saw(train, tmp_path):
    begin = make_published_folder(tmp_path / "published")
    trainer, folder = train("run", config_file_path=str(begin))
    assert trainer.setup.start_instructions == {}
    assert record(folder) == {"libero_mini_no_noops": sentences(trainer)}
    out = export_published(load_checkpoint(folder), tmp_path / "exported", "2_checkpoint")
    assert not (out / "craft_checkpoint.json").exists()
    assert recorded_instructions(load_checkpoint(out).manifest, out) == {}


# ------------------------------------------------------------------------------------------------ what is shipped


@pytest.mark.parametrize("file", SHIPPED, ids=[file.parent.name for file in SHIPPED])
def test_shipped_checkpoints_record_the_instructions_of_their_demonstrations(file):
    manifest = json.loads(file.read_text())
    tasks = {name: data["tasks"].values() for name, data in manifest["datasets"].items()}
    collected = {
        name: sorted(task["instruction"] for task in found if task["episodes"]) for name, found in tasks.items()
    }
    assert recorded_instructions(manifest, file) == collected
    assert list(manifest["instructions"]) == list(manifest["datasets"])
