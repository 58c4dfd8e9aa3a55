"""Moving average of the trained weights: arithmetic, what checkpoints hold, resume."""

import pytest
import torch
from torch import nn

from prismatic.training.checkpoints import load_checkpoint
from prismatic.training.config import FinetuneConfig
from prismatic.training.ema import WeightAverage


def weights(module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def test_average_follows_the_formula_and_leaves_frozen_weights_alone():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    average, expected = WeightAverage(module, decay=0.5), module.weight.detach().clone()
    for update in range(20):
        with torch.no_grad():
            module.weight.add_(torch.randn(2, 2))
        average.update()
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    trained = module.weight.detach().clone()
    with average.averaged_weights():
        torch.testing.assert_close(module.weight.detach(), expected)
    assert torch.equal(module.weight.detach(), trained)
    assert set(average.state_dict()) == {"weight", "updates"}


def test_trained_weights_come_back_after_an_error():
    module = nn.Linear(2, 2)
    average, before = WeightAverage(module, 0.9), weights(module)
    with torch.no_grad():
        module.weight.add_(1)
    with pytest.raises(KeyError), average.averaged_weights():
        raise KeyError
    assert torch.equal(module.weight, before["weight"] + 1)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_silly_decays_are_refused(decay):
    with pytest.raises(ValueError, match="ema_decay"):
        FinetuneConfig(ema_decay=decay)


def test_state_of_another_model_is_refused():
    state = WeightAverage(nn.Linear(2, 2), 0.9).state_dict()
    with pytest.raises(ValueError, match="found \\(2, 2\\), expected \\(2, 3\\)"):
        WeightAverage(nn.Linear(3, 2), 0.9).load_state_dict(state)
    with pytest.raises(ValueError, match="bias"):
        WeightAverage(nn.Linear(2, 2, bias=False), 0.9).load_state_dict(state)


def test_checkpoints_hold_the_average_and_training_is_the_same(make_trainer):
    plain = make_trainer("plain")
    plain.fit()
    trainer = make_trainer("run", ema_decay=0.9)
    trainer.fit()
    trained = weights(trainer.bare_model)
    assert all(torch.equal(trained[name], value) for name, value in weights(plain.bare_model).items())
    with trainer.ema.averaged_weights():
        averaged = weights(trainer.bare_model)
    assert any(not torch.equal(trained[name], value) for name, value in averaged.items())
    loaded = weights(load_checkpoint(trainer.setup.run_dir.parent / "run--3_chkpt").model)
    assert [name for name, value in averaged.items() if not torch.equal(loaded[name], value)] == []


@pytest.mark.parametrize("method", [{}, {"use_craft": True}])
def test_resumed_equals_uninterrupted_bit_for_bit(make_trainer, method):
    flags = {"max_steps": 4, "save_freq": 2, "ema_decay": 0.9} | method
    whole = make_trainer("run", **flags)
    whole.fit()
    resumed = make_trainer("run", **flags, resume=True, resume_step=2)
    assert resumed.ema.updates == 2
    resumed.fit()
    first, second = whole.ema.state_dict(), resumed.ema.state_dict()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []
    for name, value in weights(whole.bare_model).items():
        assert torch.equal(value, weights(resumed.bare_model)[name])


def test_resume_of_a_run_without_average_is_refused(make_trainer):
    make_trainer("run", max_steps=1).fit()
    with pytest.raises(FileNotFoundError, match=r"ema\.safetensors"):
        make_trainer("run", max_steps=2, resume=True, ema_decay=0.9)


def test_merged_adapters_are_the_average(make_trainer):
    start = make_trainer("base", max_steps=1)
    start.fit()
    base = start.setup.run_dir.parent / "base--1_chkpt"
    flags = {"config_file_path": str(base), "use_lora": True, "lora_rank": 4, "merge_lora_during_training": True}
    trainer = make_trainer("lora", **flags, ema_decay=0.9)
    trainer.fit()
    batch = next(trainer.batches())
    with torch.no_grad(), trainer.ema.averaged_weights():
        expected = trainer.bare_model.eval()(batch).actions
    loaded = load_checkpoint(trainer.setup.run_dir.parent / "lora--3_chkpt").model
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch).actions, expected, atol=1e-5, rtol=1e-4)
