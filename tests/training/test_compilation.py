"""`--compile`, gradient checkpointing and what they may be combined with: the same training within rounding."""

import shutil

import micro
import pytest
import torch
from torch._functorch import config as functorch

LORA = {"use_lora": True, "lora_rank": 4}
CRAFT = {"use_craft": True, "craft_preset": "budget", "craft_retention_budget": 1e-6}
COMBINATIONS = {
    "lora_accumulation": LORA | CRAFT | {"craft_anchor": "disable_adapter", "grad_accumulation_steps": 2},
    "swap_checkpointing": CRAFT | {"craft_anchor": "online_swap", "gradient_checkpointing": True},
    "functional_frozen_vision": CRAFT | {"craft_anchor": "functional", "freeze_vision": True},
    "frozen_copy_average": CRAFT | {"craft_anchor": "frozen_copy", "ema_decay": 0.9},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Of few blocks: the time of a compilation grows with their number."""
    return str(micro.start_checkpoint(tmp_path_factory.mktemp("start")))


def trained(make_trainer, name: str, start: str, **flags) -> dict[str, torch.Tensor]:
    """Weights after two steps of SGD: AdamW's first steps turn rounding of tiny gradients into full steps."""
    given = {"config_file_path": start, "max_steps": 2, "save_freq": 100, "save_training_state": False}
    trainer = make_trainer(name, **given | flags)
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
def test_compiled_training_equals_eager_training(make_trainer, start, name):
    flags = COMBINATIONS[name]
    eager = trained(make_trainer, "eager", start, **flags)
    assert_close(trained(make_trainer, "compiled", start, compile=True, compile_backend="aot_eager", **flags), eager)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_code_of_the_default_backend_trains_alike(make_trainer, start):
    # Generating and building C++ takes most of the time: a frozen backbone halves the code, one step does without
    # the code for prompts of any length.
    flags = {"use_fz": True, "max_steps": 1}
    eager = trained(make_trainer, "eager", start, **flags)
    assert_close(trained(make_trainer, "compiled", start, compile=True, **flags), eager)


def test_unknown_backend_is_named(make_trainer):
    with pytest.raises(ValueError, match="compile_backend is 'fast', expected one of .*inductor"):
        make_trainer("run", compile=True, compile_backend="fast")


@pytest.mark.parametrize("method", [{}, CRAFT, LORA | CRAFT], ids=["plain", "craft", "lora"])
def test_gradient_checkpointing_trains_alike(make_trainer, start, method):
    plain = trained(make_trainer, "plain", start, **method)
    assert_close(trained(make_trainer, "checkpointed", start, gradient_checkpointing=True, **method), plain)
