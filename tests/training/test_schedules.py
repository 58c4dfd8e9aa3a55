"""Learning-rate schedules."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismatic.training.command_line import parse_flags
from prismatic.training.config import FinetuneConfig
from prismatic.training.schedules import cosine_factor, decay_factor, warm_up_factor


def rates(steps: int = 100, **flags) -> list[float]:
    cfg = FinetuneConfig(learning_rate=1.0, max_steps=steps, **flags)
    return [cfg.learning_rate_at(step) for step in range(steps)]


def test_multistep_multiplies_at_each_boundary():
    found = rates(lr_schedule="multistep", lr_decay_steps="30,60", lr_decay_factor=0.5)
    assert (found[29], found[30], found[59], found[60], found[99]) == (1.0, 0.5, 0.5, 0.25, 0.25)


def test_step_is_multistep_with_one_boundary():
    step = rates(num_steps_before_decay=40, lr_decay_factor=0.3, lr_warmup_steps=10)
    assert step == rates(lr_schedule="multistep", lr_decay_steps="40", lr_decay_factor=0.3, lr_warmup_steps=10)


def test_cosine_ends_at_the_given_ratio_and_warm_up_comes_first():
    found = rates(lr_schedule="cosine", lr_min_ratio=0.2, lr_warmup_steps=10)
    assert found[9] == found[10] == 1.0
    assert found[55] == pytest.approx(0.6)
    assert found[99] == pytest.approx(0.2, abs=1e-3)
    assert FinetuneConfig(learning_rate=1.0, max_steps=10, lr_schedule="cosine", lr_min_ratio=0.2).learning_rate_at(
        50
    ) == pytest.approx(0.2)


def test_warm_up_values_are_kept():
    assert rates(lr_warmup_steps=10)[:10] == [min(1.0, 0.1 + 0.9 * (step + 1) / 10) for step in range(10)]
    assert rates(lr_warmup_steps=0.1)[:10] == rates(lr_warmup_steps=10)[:10]


@given(st.integers(0, 10_000), st.integers(0, 500), st.integers(1, 5_000), st.floats(0, 0.99))
def test_factors_stay_between_zero_and_one(step, warm_up, length, minimum):
    assert 0.1 <= warm_up_factor(step, warm_up) <= 1
    assert minimum - 1e-12 <= cosine_factor(step, warm_up, warm_up + length, minimum) <= 1 + 1e-12
    assert 0 < decay_factor(step, (length, 2 * length), 0.1) <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr_schedule": "multistep"}, "multistep needs steps"),
        ({"lr_decay_steps": "10"}, "multistep needs steps"),
        ({"lr_schedule": "multistep", "lr_decay_steps": "20,10"}, "lr_decay_steps is '20,10'.*rising"),
        ({"lr_schedule": "multistep", "lr_decay_steps": "soon"}, "lr_decay_steps is 'soon'"),
        ({"lr_schedule": "multistep", "lr_decay_steps": "0"}, "lr_decay_steps is '0'"),
        ({"lr_decay_factor": 0.0}, "lr_decay_factor is 0.0"),
        ({"lr_decay_factor": 2.0}, "lr_decay_factor is 2.0"),
        ({"lr_min_ratio": 1.0}, "lr_min_ratio is 1.0"),
        ({"lr_warmup_steps": -1}, "lr_warmup_steps is -1"),
        ({"lr_warmup_steps": float("nan")}, "lr_warmup_steps is nan"),
    ],
)
def test_bad_flags_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**flags)


@pytest.mark.parametrize("steps", ["100000,150000", "100000"])
def test_decay_steps_come_from_the_command_line(monkeypatch, steps):
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--lr_schedule", "multistep", "--lr_decay_steps", steps])
    cfg = parse_flags()
    assert cfg.schedule_settings.boundaries == tuple(int(s) for s in steps.split(","))
