"""A run's folder is taken over only when that is asked for, and before anything is written."""

import shutil

import micro
import pytest

from prismatic.command_line import UsageError, check_name
from prismatic.models.presets import PRESETS
from prismatic.training import saving
from prismatic.training.checkpoint_folder import find_checkpoints
from prismatic.training.checkpoints import load_checkpoint
from prismatic.training.config import FinetuneConfig
from prismatic.training.run_folder import claim_run_folder


def contents(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_used_run_id_is_refused_and_left_as_it_is(make_trainer, tmp_path):
    make_trainer("run", max_steps=2).fit()
    before = contents(tmp_path / "runs")
    ways_out = "run run is in .*newest checkpoint: .*run--2_chkpt.*--resume auto.*--overwrite True"
    with pytest.raises(UsageError, match=ways_out):
        make_trainer("run", max_steps=1)
    assert contents(tmp_path / "runs") == before


def test_the_ways_out(make_trainer, tmp_path):
    make_trainer("run", max_steps=2).fit()
    assert make_trainer("run", max_steps=3, resume="auto").step == 2
    make_trainer("run--other", max_steps=1).fit()
    anew = make_trainer("run", max_steps=1, overwrite=True)
    assert anew.step == 0 and find_checkpoints(tmp_path / "runs", "run") == []
    anew.fit()
    assert [step for step, _ in find_checkpoints(tmp_path / "runs", "run")] == [1]
    assert [step for step, _ in find_checkpoints(tmp_path / "runs", "run--other")] == [1]


@pytest.mark.parametrize(
    "mistake",
    [
        {"dataset_name": "libero_absent"},
        {"use_craft": True, "craft_preset": "keep", "craft_memory_instructions": "absent"},
    ],
)
def test_a_run_that_cannot_begin_replaces_nothing(make_trainer, tmp_path, mistake):
    make_trainer("run", max_steps=1).fit()
    before = contents(tmp_path / "runs")
    with pytest.raises((ValueError, OSError)):
        make_trainer("run", overwrite=True, config_file_path=str(tmp_path / "runs" / "run--1_chkpt"), **mistake)
    with pytest.raises((ValueError, OSError)):
        make_trainer("run", overwrite=True, **mistake)
    with pytest.raises(UsageError, match="--overwrite True would delete --config_file_path"):
        make_trainer("run", overwrite=True, config_file_path=str(tmp_path / "runs" / "run--1_chkpt"))
    assert contents(tmp_path / "runs") == before


def test_metrics_alone_are_a_run_too(tmp_path):
    cfg = FinetuneConfig(run_root_dir=str(tmp_path), run_id_override="run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    claim_run_folder(cfg)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UsageError, match="metrics: .*metrics.jsonl"):
        claim_run_folder(cfg)


def test_continuing_another_run_is_no_licence_for_this_folder(make_trainer, tmp_path):
    make_trainer("a", max_steps=1).fit()
    make_trainer("b", max_steps=1).fit()
    other = {"resume": True, "resum_vla_path": str(tmp_path / "runs" / "b--1_chkpt"), "max_steps": 2}
    with pytest.raises(UsageError, match="run a is in"):
        make_trainer("a", **other)
    assert make_trainer("b", **other).step == 1
    assert make_trainer("c", **other).step == 1


def test_a_run_goes_on_from_its_own_start(make_trainer, tmp_path):
    """A run id that was used with another start would else give that start's policy under the new one's name."""
    starts = []
    for seed in (1, 2):
        make_trainer(f"start{seed}", max_steps=1, seed=seed).fit()
        starts.append(str(tmp_path / "runs" / f"start{seed}--1_chkpt"))
    make_trainer("run", max_steps=1, config_file_path=starts[0]).fit()
    before = contents(tmp_path / "runs")
    with pytest.raises(ValueError, match="start2--1_chkpt: sha256 .*run--1_chkpt started from .*--run_id_override"):
        make_trainer("run", max_steps=2, config_file_path=starts[1], resume="auto")
    after = contents(tmp_path / "runs")
    assert {path: after[path] for path in before} == before  # beside it there is the lock of this process
    moved = shutil.copytree(starts[0], tmp_path / "moved")
    assert make_trainer("run", max_steps=2, config_file_path=str(moved), resume="auto").step == 1
    assert make_trainer("run", max_steps=2, config_file_path=starts[1], resume=True).step == 1


def test_a_run_has_one_writer(make_trainer, tmp_path, held_elsewhere, monkeypatch):
    folder, removed = tmp_path / "runs" / "run", []
    with monkeypatch.context() as patch, held_elsewhere(folder):
        patch.setattr(saving, "remove_leftovers", lambda *words: removed.append(words))
        with pytest.raises(UsageError, match=f"{folder}: process .* writes to it"):
            make_trainer("run", resume="auto")
    assert removed == []
    make_trainer("run", max_steps=1).fit()
    with held_elsewhere(folder):  # released with the end of the run
        pass


@pytest.mark.parametrize("run_id", ["it's a", "12:30:45"])
def test_data_and_run_may_lie_in_folders_with_any_name(make_trainer, odd_folder, monkeypatch, run_id):
    """Adapters find their base there, too."""
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)
    shutil.copytree(micro.DATA, odd_folder / "data")
    places = {"data_root_dir": str(odd_folder / "data"), "run_root_dir": str(odd_folder / "runs")}
    make_trainer(run_id, max_steps=1, **places).fit()
    again = make_trainer(run_id, max_steps=2, resume="auto", **places)
    assert again.step == 1
    again.fit()
    start = odd_folder / "runs" / f"{run_id}--2_chkpt"
    lora = {"use_lora": True, "lora_rank": 2, "config_file_path": str(start)}
    make_trainer("b", max_steps=1, **lora, **places).fit()
    assert load_checkpoint(odd_folder / "runs" / "b--1_chkpt").manifest["tuning"] == "lora"


@pytest.mark.parametrize("run_id", ["exp/a", "../a", "a\\b", "", ".", "a\nb", "x" * 300])
def test_a_run_id_is_a_name(run_id):
    with pytest.raises(UsageError, match="--run_id_override is"):
        FinetuneConfig(run_id_override=run_id)


BASE = {"use_craft": True, "craft_preset": "keep"}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"max_steps": 5},
        {"batch_size": 3},
        {"craft_retention_budget": 0.02},
        {"craft_preset": "budget"},
        {"craft_every": 3},
        {"craft_memory_data": "x"},
        {"use_craft": False, "craft_preset": "original"},
        {"replay_data": "x"},
        {"replay_data": "x", "replay_fraction": 0.5},
        {"use_lora": True},
        {"use_lora": True, "lora_rank": 8},
        {"freeze_vision": True},
    ],
)
def test_runs_with_other_settings_have_other_default_ids(change):
    ids = {FinetuneConfig(**BASE).run_id, FinetuneConfig(**BASE | change).run_id}
    assert len(ids) == 2 and FinetuneConfig(**BASE, save_freq=7, run_root_dir="elsewhere").run_id in ids


def test_a_default_id_is_a_name():
    many = {"run_id_note": "note", "config_file_path": "/models/start/", "use_lora": True, "replay_data": "x"}
    check_name("run id", FinetuneConfig(dataset_name="libero_spatial:0.5,libero_object:2", **BASE, **many).run_id)
