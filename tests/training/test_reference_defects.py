"""What is known to be wrong in published training code, one test per defect (docs/reference_defects.md)."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from prismatic.training import loop, saving
from prismatic.training.step import optimizer_step
from prismatic.vla.datasets.sampler import EpochSampler

CRAFT = {"use_craft": True, "craft_retention_weight": 1.0}
PLANS = {
    "plain": {},
    "original": CRAFT,
    "prompt": CRAFT | {"craft_cr_token_mode": "vision_plus_prompt"},
    "priced": CRAFT | {"craft_preset": "budget", "craft_retention_budget": 1e9},
    "lora": {"use_lora": True, "lora_rank": 4, "config_file_path": "pretrained_models/tiny-libero-object"} | CRAFT,
}


def weights(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.bare_model.named_parameters()}


def metrics(trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.setup.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_d1_the_learning_rate_decays_in_a_run_with_warm_up(make_trainer):
    trainer = make_trainer(
        "run", max_steps=6, lr_warmup_steps=2, num_steps_before_decay=4, learning_rate=1e-3, save_freq=100
    )
    trainer.fit()
    rates = [line["VLA Train/Learning Rate"] for line in metrics(trainer)]
    assert rates == pytest.approx([5.5e-4, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4])
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_d4_saving_and_logging_happen_once_per_optimizer_step(make_trainer, monkeypatch):
    saved, stepped = [], []
    save, step = saving.write_checkpoint, loop.optimizer_step
    monkeypatch.setattr(saving, "write_checkpoint", lambda cfg, setup, s: saved.append(s.step) or save(cfg, setup, s))
    monkeypatch.setattr(loop, "optimizer_step", lambda *a: stepped.append(len(a[1])) or step(*a))
    trainer = make_trainer("run", max_steps=4, save_freq=2, grad_accumulation_steps=3, batch_size=1)
    trainer.fit()
    assert saved == [2, 4]
    assert stepped == [3, 3, 3, 3]
    assert [line["step"] for line in metrics(trainer)] == [1, 2, 3, 4]


def test_d5_validation_runs_on_held_out_episodes_and_ends_the_run_alive(make_trainer):
    trainer = make_trainer("run", use_val_set=True, val_fraction=0.5, val_batches=1, val_freq=2, max_steps=3)
    trainer.fit()
    values = [line.get("VLA Val/Loss") for line in metrics(trainer)]
    assert values[0] is None
    assert 0 < values[1] < 10 and 0 < values[2] < 10
    assert trainer.model.training


@pytest.mark.parametrize("method", [{}, CRAFT])
def test_d6_the_seed_fixes_the_run(make_trainer, method):
    def run(name: str, seed: int) -> dict[str, torch.Tensor]:
        trainer = make_trainer(name, seed=seed, max_steps=2, **method)
        trainer.fit()
        return weights(trainer)

    first, again, other = run("first", 3), run("again", 3), run("other", 4)
    assert [name for name, value in first.items() if not torch.equal(value, again[name])] == []
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_d10_clipping_bounds_the_gradient_that_is_applied(make_trainer, monkeypatch):
    applied = []

    def run(name: str, limit: float | None) -> float:
        trainer = make_trainer(name, max_steps=1, max_grad_norm=limit)
        step = trainer.optimizer.step

        def record(*args, **kwargs):
            gradients = [p.grad for p in trainer.bare_model.parameters() if p.grad is not None]
            applied.append(float(torch.nn.utils.get_total_norm(gradients)))
            return step(*args, **kwargs)

        monkeypatch.setattr(trainer.optimizer, "step", record)
        trainer.fit()
        return metrics(trainer)[0]["VLA Train/Gradient Norm"]

    free = run("free", None)
    limit = free / 10
    assert run("clipped", limit) == pytest.approx(free)  # the log shows the norm before clipping
    assert applied == pytest.approx([free, limit], rel=1e-3)


@pytest.fixture
def bf16(monkeypatch):
    """Trainers made in this test run in bf16; accelerate keeps the precision in a global state."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", [{}, CRAFT])
@pytest.mark.usefixtures("bf16")
def test_d10_weights_and_optimizer_are_fp32_under_bf16(make_trainer, method):
    trainer = make_trainer("run", mixed_precision="bf16", max_steps=8, image_aug=False, **method)
    trainer.sampler, kinds = EpochSampler(4, seed=7), set()
    probe = trainer.bare_model.vla.language_model.model.layers[0].mlp
    probe.register_forward_hook(lambda _module, _inputs, output: kinds.add(output.dtype))
    trainer.fit()
    assert torch.bfloat16 in kinds  # the passes ran in bf16
    assert {p.dtype for p in trainer.bare_model.parameters() if p.requires_grad} == {torch.float32}
    moments = [t for state in trainer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    assert {t.dtype for t in moments} == {torch.float32}
    losses = [line["VLA Train/Loss"] for line in metrics(trainer)]
    assert min(losses[-2:]) < losses[0]


class HostReads(TorchDispatchMode):
    """Counts operators whose result the host has to wait for on a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        self.count += name in self.WAITING or masked
        return func(*args, **(kwargs or {}))


def test_host_reads_are_seen():
    with HostReads() as reads:
        tensor = torch.arange(4.0)
        tensor.sum().item()
        bool((tensor > 1).any())
        tensor[tensor > 1].sum()
    assert reads.count >= 3


@pytest.mark.parametrize("plan", PLANS)
def test_d26_the_host_waits_per_step_and_not_per_micro_batch(make_trainer, plan):
    trainer = make_trainer("run", batch_size=1, **PLANS[plan])
    trainer.model.train()
    batches = trainer.batches()
    optimizer_step(trainer.step_context(), [next(batches)], 0)  # allocates the constraint's buffers
    counts = []
    for number in (1, 2, 4):
        micro_batches = [next(batches) for _ in range(number)]
        with HostReads() as reads:
            optimizer_step(trainer.step_context(), micro_batches, 1)
        counts.append(reads.count)
    assert counts[0] == counts[1] == counts[2] > 0
