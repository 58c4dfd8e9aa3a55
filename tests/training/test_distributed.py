"""Two real processes (gloo) train like one: same weights on both ranks, equal to one process with the whole batch."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import micro
import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")
ROOT = Path(__file__).resolve().parents[2]
DATA = micro.DATA

LORA = {"use_lora": True, "lora_rank": 4}
PRESETS = {
    "original": {"craft_retention_budget": 1e-4},
    # A budget between the drifts of these few steps: the gate opens and closes, so that all plans occur. The small
    # rate keeps lambda near 1.
    "budget": {
        "craft_preset": "budget",
        "craft_retention_budget": 3e-2,
        "craft_dual_lr": 0.005,
        "craft_projection_granularity": "module",
    },
}
EQUAL = [
    {
        "name": f"{tuning}-{preset}-{accumulation}",
        "sgd": True,
        "double": True,
        "global_batch": 4,
        "flags": {"use_craft": True, "max_steps": 5, "grad_accumulation_steps": accumulation}
        | options
        | (LORA if tuning == "lora" else {}),
    }
    for tuning in ("full", "lora")
    for preset, options in PRESETS.items()
    for accumulation in (1, 4)
]
# Old instructions on the new images and observations of a data set, held by a controller that reads both norms.
KEEP = {
    "craft_preset": "keep",
    "craft_retention_budget": 1e-3,
    "craft_every": 1,
    "craft_memory": "instructions,data",
    "craft_memory_data": str(DATA / "libero_mini_no_noops"),
}
LAND = {"craft_land": True, "craft_retention_budget": 0.05}
EQUAL += [
    {
        "name": f"{tuning}-keep-{accumulation}",
        "sgd": True,
        "double": True,
        "global_batch": 4,
        "memory": 2,
        "flags": {"use_craft": True, "max_steps": 5, "grad_accumulation_steps": accumulation} | KEEP | options,
    }
    for tuning, accumulation, options in (("full", 4, LAND), ("lora", 1, LORA))
]
ADAMW = {
    "name": "adamw",
    "global_batch": 2,
    "flags": {"use_craft": True, "max_steps": 20, "craft_every": 2} | PRESETS["budget"],
}
MONITOR = {
    "name": "monitor",
    "sgd": True,
    "double": True,
    "flags": {"use_craft": True, "max_steps": 3, "craft_preset": "budget", "craft_retention_budget": math.inf},
}
SCENARIOS = [*EQUAL, ADAMW, MONITOR]
# One process gets a NaN: in the actions, which its loss sees, or in the images, which its features see as well.
POISONED = [
    {"name": f"nan-{entry}-{preset}", "poison": entry, "flags": {"max_steps": 3, **flags}}
    for entry in ("actions", "pixel_values")
    for preset, flags in {"plain": {}, "craft": {"use_craft": True} | PRESETS["original"]}.items()
]
# Three validation batches: two for the first of two processes, one for the second.
VALIDATED = {
    "name": "validated",
    "validate": True,
    "batch_size": 2,
    "flags": {"max_steps": 1, "use_val_set": True, "val_fraction": 0.5, "val_batches": 3},
}
HEAD = {"name": "head", "head": True, "flags": {"max_steps": 1}}

pytestmark = pytest.mark.slow


def run(folder: Path, processes: int, start: Path, scenarios: list[dict]) -> list[dict]:
    folder.mkdir()
    arguments = [str(WORKER), str(folder), str(DATA), str(start), json.dumps(scenarios)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *(launcher if processes > 1 else []), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return micro.start_checkpoint(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def two(tmp_path_factory, start):
    return run(tmp_path_factory.mktemp("distributed") / "two", 2, start, [*SCENARIOS, *POISONED, VALIDATED, HEAD])


@pytest.fixture(scope="module")
def one(tmp_path_factory, start):
    return run(tmp_path_factory.mktemp("distributed") / "one", 1, start, [*SCENARIOS, VALIDATED])[0]


@pytest.mark.parametrize("name", [s["name"] for s in SCENARIOS])
def test_the_ranks_hold_the_same_weights_and_multiplier(two, name):
    first, second = (result[name] for result in two)
    # Every part, the action head included.
    assert [n for n, p in first["weights"].items() if not torch.equal(p, second["weights"][n])] == []
    assert first["dual"] == second["dual"]
    for mine, other in zip(first["metrics"], second["metrics"], strict=True):
        assert mine == other  # the conflict mask is the same, or its mean would differ


@pytest.mark.parametrize("name", [s["name"] for s in [*EQUAL, MONITOR]])
def test_two_processes_with_half_the_batch_equal_one(two, one, name):
    distributed, single = two[0][name], one[name]
    for parameter, value in distributed["weights"].items():
        torch.testing.assert_close(
            value, single["weights"][parameter], rtol=1e-5, atol=1e-7, msg=lambda m, n=parameter: f"{n} {m}"
        )
    # The model computes in float64; what is left are the features, gradients and losses that CRaFT keeps in float32.
    assert distributed["dual"]["lambda"] == pytest.approx(single["dual"]["lambda"], rel=1e-5, abs=1e-9)
    for mine, other in zip(distributed["metrics"], single["metrics"], strict=True):
        assert mine["CRaFT/Gate Open"] == other["CRaFT/Gate Open"]
        assert mine["CRaFT/Retention Loss"] == pytest.approx(other["CRaFT/Retention Loss"], rel=1e-5, abs=1e-9)
    if single["landing"] is not None:
        assert distributed["landing"]["scale"] == single["landing"]["scale"]
        assert distributed["landing"]["drift"] == pytest.approx(single["landing"]["drift"], rel=1e-4)


def test_the_scenarios_reach_every_plan(one):
    gates = {line["CRaFT/Gate Open"] for name in ("full-budget-1", "lora-budget-4") for line in one[name]["metrics"]}
    assert gates == {0.0, 1.0}
    assert any(line["CRaFT/Lambda"] > 0 for line in one["full-budget-1"]["metrics"])
    assert one["monitor"]["metrics"][-1]["CRaFT/Retention Loss"] > 0
    assert 0 < one["full-keep-4"]["landing"]["scale"] < 1


@pytest.mark.parametrize("name", [s["name"] for s in SCENARIOS])
def test_one_collective_per_constrained_step_beside_that_of_the_losses(two, name):
    result = two[0][name]
    assert result["collectives"] == result["steps"] + result["constrained_steps"] > result["steps"]


@pytest.mark.parametrize("name", [s["name"] for s in POISONED])
def test_a_nan_of_one_process_stops_all(two, name):
    # Both processes came to their end: none was left waiting for the other in a collective.
    innocent, guilty = (result[name] for result in two)
    for result in (innocent, guilty):
        assert result["error"].startswith("action loss is nan at optimizer step 1")
        assert result["finite"] and result["step"] == 1
    assert "non-finite input in samples" in guilty["error"]
    assert "another one is not finite" in innocent["error"]
    for parameter, value in innocent["weights"].items():
        assert torch.equal(value, guilty["weights"][parameter]), parameter


def test_validation_is_the_mean_over_samples_whatever_the_number_of_processes(two, one):
    first, second = (result["validated"] for result in two)
    assert first == second
    assert first == pytest.approx(one["validated"], rel=1e-5)
    assert first["VLA Val/Loss"] > 0


def test_the_head_is_synchronised_and_would_not_be_past_its_wrapper(two):
    ours, published = ([result["head"][way] for result in two] for way in ("ours", "published"))
    assert ours[0].abs().sum() > 0
    assert torch.equal(*ours)
    # The published call `action_head.module.predict_action(...)` skips DDP's forward: its gradients stay local.
    assert not torch.allclose(*published, rtol=1e-3)
