"""Validation: fixed samples, shares of processes, and no effect on the run."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prismatic.training.config import FinetuneConfig
from prismatic.training.validation import ValidationSettings, Validator


def weights(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.bare_model.named_parameters()}


def metrics(trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.setup.run_dir / "metrics.jsonl").read_text().splitlines()]


HELD_OUT = {"use_val_set": True, "val_fraction": 0.5, "val_batches": 2}


def test_held_out_episodes_are_not_trained_on_and_normalised_alike(make_trainer):
    setup = make_trainer("run", **HELD_OUT).setup
    trained, held_out = setup.dataset.episode_ids, setup.val_dataset.episode_ids
    for name, episodes in held_out.items():
        assert episodes and not set(episodes) & set(trained[name])
        assert setup.val_dataset.normalizers[name] is setup.dataset.normalizers[name]
    everything = make_trainer("all").setup.dataset
    assert len(setup.dataset) + len(setup.val_dataset) == len(everything)
    assert setup.dataset.settings.image_aug and not setup.val_dataset.settings.image_aug


@pytest.mark.parametrize("method", [{}, {"use_craft": True}])
def test_a_run_with_validation_has_the_weights_of_one_without(make_trainer, method):
    start = make_trainer("base", max_steps=1)
    start.fit()
    # Dropout and the head's start noise draw from the generator that validation must leave alone.
    flags = HELD_OUT | {"use_lora": True, "lora_rank": 4, "lora_dropout": 0.2, "val_freq": 2, "max_steps": 4} | method
    flags["config_file_path"] = str(start.setup.run_dir.parent / "base--1_chkpt")
    plain = make_trainer("plain", **flags)
    plain.validator = None
    plain.fit()
    state = torch.get_rng_state()
    validated = make_trainer("validated", **flags)
    validated.fit()
    assert torch.equal(torch.get_rng_state(), state)
    expected = weights(plain)
    assert [n for n, value in weights(validated).items() if not torch.equal(value, expected[n])] == []
    assert [i for i, line in enumerate(metrics(validated)) if "VLA Val/Loss" in line] == [1, 3]


def test_values_are_means_over_the_samples_in_eval_mode(make_trainer):
    trainer = make_trainer("run", **HELD_OUT)
    found = trainer.validator.measure(trainer.bare_model)
    dataset = trainer.setup.val_dataset
    model = trainer.bare_model.eval()
    errors = []
    for key in [key for batch in trainer.validator.batches(len(dataset)) for key in batch]:
        batch = trainer._collator()([dataset[key]])
        with torch.no_grad():
            errors.append((model(batch).actions - batch["actions"]).abs()[0])
    assert len(errors) == 4
    errors = torch.stack(errors)
    assert found["VLA Val/Loss"] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert found["VLA Val/Curr Action L1 Loss"] == pytest.approx(errors[:, 0].mean().item(), rel=1e-5)
    assert found["VLA Val/Next Actions L1 Loss"] == pytest.approx(errors[:, 1:].mean().item(), rel=1e-5)


def test_training_mode_comes_back_and_values_repeat(make_trainer):
    trainer = make_trainer("run", **HELD_OUT)
    trainer.bare_model.train()
    trainer.bare_model.vla.vision_backbone.eval()
    flags = [m.training for m in trainer.bare_model.modules()]
    first = trainer.validator.measure(trainer.bare_model)
    assert [m.training for m in trainer.bare_model.modules()] == flags
    assert trainer.validator.measure(trainer.bare_model) == first


def test_the_average_is_what_is_validated(make_trainer):
    trainer = make_trainer("run", ema_decay=0.9, **HELD_OUT)
    trainer.fit()
    with trainer.ema.averaged_weights():
        averaged = trainer.validator.measure(trainer.bare_model)
    assert metrics(trainer)[-1]["VLA Val/Loss"] == averaged["VLA Val/Loss"]
    assert trainer.validator.measure(trainer.bare_model) != averaged


class Nine:
    """As much of a data set of nine samples as choosing some of them needs."""

    settings = SimpleNamespace(image_aug=False)

    def __len__(self) -> int:
        return 9


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_processes_share_the_same_samples(world):
    def shares(limit: int, processes: int) -> list[list[list[tuple[int, int]]]]:
        settings = [ValidationSettings(2, limit, 7, rank, processes) for rank in range(processes)]
        return [Validator(Nine(), list, s, torch.device("cpu")).batches(9) for s in settings]

    everything = [key for share in shares(0, world) for batch in share for key in batch]
    assert sorted(everything) == [(0, index) for index in range(9)]
    limited = {key for share in shares(3, world) for batch in share for key in batch}
    assert limited == {key for share in shares(3, 1) for batch in share for key in batch}
    assert len(limited) == 6


def test_augmented_samples_are_refused(make_trainer):
    trainer = make_trainer("run")
    with pytest.raises(ValueError, match="image_aug is True"):
        Validator(trainer.setup.dataset, list, ValidationSettings(2), torch.device("cpu"))


@pytest.mark.parametrize(
    "flags", [{"val_fraction": 0.0}, {"val_fraction": 1.0}, {"val_freq": 0}, {"val_batches": -1}], ids=str
)
def test_bad_flags_are_named(flags):
    with pytest.raises(ValueError, match=f"{next(iter(flags))} is"):
        FinetuneConfig(**flags)


# A split of the files


@pytest.fixture
def two_splits(golden_dir, tmp_path):
    """The small data set with its second shard as the split `valid`."""
    folder = tmp_path / "data" / "libero_mini_no_noops" / "1.0.0"
    source = golden_dir / "rlds_mini" / "libero_mini_no_noops" / "1.0.0"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".craft_index"))
    info = json.loads((folder / "dataset_info.json").read_text())
    name, (split,) = info["name"], info["splits"]
    lengths = split["shardLengths"]
    for number, new in enumerate(("train", "valid")):
        (folder / f"{name}-train.tfrecord-{number:05d}-of-00002").rename(
            folder / f"{name}-{new}.tfrecord-00000-of-00001"
        )
    info["splits"] = [{"name": new, "shardLengths": [lengths[n]]} for n, new in enumerate(("train", "valid"))]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return str(tmp_path / "data"), [int(length) for length in lengths]


def test_another_split_is_measured_on_and_all_of_train_is_trained_on(make_trainer, two_splits):
    root, (train, valid) = two_splits
    setup = make_trainer("run", data_root_dir=root, use_val_set=True, val_split="valid").setup
    assert [len(ids) for ids in setup.dataset.episode_ids.values()] == [train]
    assert [len(ids) for ids in setup.val_dataset.episode_ids.values()] == [valid]
    assert setup.val_dataset.fingerprints != setup.dataset.fingerprints
    assert setup.val_dataset.normalizers.keys() == setup.dataset.normalizers.keys()
    assert not setup.val_dataset.settings.image_aug
    other = make_trainer("other", data_root_dir=root, split="valid").setup
    assert other.dataset.fingerprints == setup.val_dataset.fingerprints
    assert other.dataset.manifest()["libero_mini_no_noops"]["split"] == "valid"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"val_split": "valid"}, "--val_split valid has no effect: it needs --use_val_set True"),
        ({"val_split": "train", "use_val_set": True}, "--val_split train is the split that is trained on"),
        ({"val_split": "a", "split": "a", "use_val_set": True}, "--val_split a is the split that is trained on"),
    ],
)
def test_a_validation_split_that_makes_no_sense(flags, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**flags)


def test_a_split_that_is_not_there_lists_those_that_are(make_trainer, two_splits):
    with pytest.raises(ValueError, match=r"no split 'test', found splits \['train', 'valid'\]: name one with --split"):
        make_trainer("run", data_root_dir=two_splits[0], split="test")


def test_a_broken_episode_stops_a_run_unless_it_is_left_out(make_trainer, two_splits, capsys):
    root, (train, _) = two_splits
    (shard,) = Path(root).glob("*/*/*-train.tfrecord*")
    content = bytearray(shard.read_bytes())
    content[500] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="record 0 .*--skip_bad_episodes True"):
        make_trainer("strict", data_root_dir=root)
    setup = make_trainer("lenient", data_root_dir=root, skip_bad_episodes=True).setup
    assert [len(ids) for ids in setup.dataset.episode_ids.values()] == [train - 1]
    assert list(setup.dataset.manifest()["libero_mini_no_noops"]["left_out"]) == ["0"]
    assert f"1 of {train} episodes are left out" in capsys.readouterr().out
