"""`--compile`, gradient checkpointing and what they may be combined with: the same training within rounding."""

import shutil

import pytest
import torch
from torch._functorch import config as functorch

LORA = {"use_lora": True, "lora_rank": 4, "config_file_path": "pretrained_models/tiny-libero-object"}
CRAFT = {"use_craft": True, "craft_preset": "budget", "craft_retention_budget": 1e-6}
COMBINATIONS = {
    "lora_accumulation": LORA | {"grad_accumulation_steps": 2, "batch_size": 1},
    "online_swap": CRAFT | {"craft_anchor": "online_swap"},
    "functional_frozen_vision": CRAFT | {"craft_anchor": "functional", "freeze_vision": True},
    "frozen_copy_average": CRAFT | {"craft_anchor": "frozen_copy", "ema_decay": 0.9},
    "disable_adapter": LORA | CRAFT | {"craft_anchor": "disable_adapter"},
    "craft_checkpointing": CRAFT | {"gradient_checkpointing": True},
}


def trained(make_trainer, name: str, **flags) -> dict[str, torch.Tensor]:
    """Weights after three steps of SGD: AdamW's first steps turn rounding of tiny gradients into full steps."""
    trainer = make_trainer(name, save_freq=100, save_training_state=False, **flags)
    trainer.optimizer = torch.optim.SGD([p for p in trainer.bare_model.parameters() if p.requires_grad], lr=0.1)
    trainer.cfg.learning_rate = 0.1
    trainer.fit()
    return {n: p.detach().clone() for n, p in trainer.bare_model.named_parameters()}


def assert_close(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing compiled is left over, and the compiler's settings are as before."""
    donated = functorch.donated_buffer
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    functorch.donated_buffer = donated


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINATIONS)
def test_compiled_training_equals_eager_training(make_trainer, name):
    flags = COMBINATIONS[name]
    eager = trained(make_trainer, "eager", **flags)
    assert_close(trained(make_trainer, "compiled", compile=True, compile_backend="aot_eager", **flags), eager)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_code_of_the_default_backend_trains_alike(make_trainer):
    # Generating and building C++ takes most of the time: a frozen backbone halves the code.
    flags = {"use_fz": True}
    eager = trained(make_trainer, "eager", **flags)
    assert_close(trained(make_trainer, "compiled", compile=True, **flags), eager)


def test_unknown_backend_is_named(make_trainer):
    with pytest.raises(ValueError, match="compile_backend is 'fast', expected one of .*inductor"):
        make_trainer("run", compile=True, compile_backend="fast")


@pytest.mark.parametrize("method", [{}, CRAFT, LORA | CRAFT], ids=["plain", "craft", "lora"])
def test_gradient_checkpointing_trains_alike(make_trainer, method):
    plain = trained(make_trainer, "plain", **method)
    assert_close(trained(make_trainer, "checkpointed", gradient_checkpointing=True, **method), plain)
