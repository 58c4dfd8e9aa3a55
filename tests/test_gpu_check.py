"""The GPU check runs on a CPU, finds what is wrong, and says of each part why it could not run."""

import json
import subprocess
import sys
from pathlib import Path

import gpu_check
import gpu_parts
import gpu_paths
import gpu_runs
import inference
import pytest
import torch
from gpu_findings import Check, PartConfig, tried

from prismatic.training.memory.ledger import Ledger

ROOT = Path(__file__).parents[1]
CPU = PartConfig(torch.device("cpu"), "tiny")


def test_all_parts_pass_on_a_cpu_and_the_page_says_that_there_was_no_gpu(tmp_path):
    record, page = tmp_path / "cpu.json", tmp_path / "gpu.md"
    words = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--output", record, "--page", page]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(record.read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(gpu_parts.PARTS, "passed")
    named = {check["what"] for check in parts["paths"]["checks"]}
    assert named >= {*gpu_runs.TRIED, "resume", "merge", "evaluation"}
    assert "no GPU was available" in page.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_card_every_part_says_so(tmp_path):
    words = [sys.executable, "benchmarks/gpu_check.py", "--output", tmp_path / "a.json", "--page", tmp_path / "a.md"]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode == 0
    parts = json.loads((tmp_path / "a.json").read_text())["parts"].values()
    assert {(part["status"], part["why"]) for part in parts} == {
        ("not run", "this machine has no GPU that PyTorch can use")
    }
    assert subprocess.run([*words, "--parts", "speed"], cwd=ROOT, capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize(
    ("checks", "ended", "status", "why"),
    [
        ([Check("a", "", "", True), Check("b", "", "", None)], None, "passed", ""),
        ([Check("a", "", "", True), Check("b", "", "", False)], None, "failed", "b"),
        ([Check("a", "", "", True)], "stopped after 60 s", "failed", "stopped after 60 s"),
        ([Check("a", "needs two GPUs")], None, "not run", "needs two GPUs"),
        ([], None, "not run", "nothing to check"),
    ],
)
def test_the_outcome_of_a_part_follows_from_its_checks(checks, ended, status, why):
    assert gpu_check.judged(checks, ended) == {"status": status, "why": why}


def test_what_is_misplaced_is_named(tmp_path):
    trainer = gpu_runs.prepared(CPU, str(tmp_path), "run", mixed_precision="bf16", use_lora=True, lora_rank=2)
    assert gpu_paths.misplaced(trainer, CPU.device, torch.bfloat16) == []
    trainer.bare_model.action_head.double()
    assert any("in torch.float64" in wrong for wrong in gpu_paths.misplaced(trainer, CPU.device, torch.bfloat16))
    assert all("on cpu" in wrong for wrong in gpu_paths.misplaced(trainer, torch.device("cuda"), None)[:5])


def test_a_fault_of_one_path_is_its_outcome():
    def fault():
        raise RuntimeError("illegal memory access")

    check = tried("plain", fault)
    assert (check.passed, check.found) == (False, "RuntimeError: illegal memory access")


def test_the_straightforward_form_of_inference_says_the_same_and_does_more():
    model = inference.random_policy("tiny").eval()
    record = inference.measure(model, rounds=1)
    assert record["difference"] <= 1e-5 * max(1.0, record["largest_action"])
    works = {}
    for form in (inference.straightforward, inference.prediction):
        with Ledger() as ledger:
            form(model)
        works[form.__name__] = ledger.flops
    assert works["prediction"] < works["straightforward"]
    assert "times as fast" in inference.page({"tiny_cpu": record})
