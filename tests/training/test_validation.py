"""Validation: fixed samples, shares of processes, and no effect on the run."""

import json
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
