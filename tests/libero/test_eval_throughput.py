"""The page of the evaluation benchmark, and its hashes, without a simulator."""

from __future__ import annotations

import copy
import pickle

import eval_throughput
import numpy as np
from fake_libero_world import FakePolicy


def make_row(name: str, wall_s: float, setups: list[float], memory: list[float]) -> dict:
    return {
        "row": name,
        "wall_s": 100.0,
        "cpu_s": 50.0,
        "policy_wait_share": 0.1,
        "process_mb": 900.0,
        "worker_mb": memory,
        "outcomes": [[0, i, "success", 100, 13] for i in range(len(setups))],
        "queries_sha256": "a",
        "episodes": [{"task_id": 0, "init_idx": i, "wall_s": wall_s + s, "setup_s": s} for i, s in enumerate(setups)],
        "load_average": 2.0,
        "versions": {},
        "gl_renderers": ["llvmpipe"],
    }


def rows() -> list[dict]:
    made = [make_row("sequential", 36.0, [4.0, 0.0], []), make_row("in_process", 9.0, [4.0, 0.0], [])]
    return made + [make_row(f"workers_{n}", 9.0, [4.0, 0.0], [1800.0] * n) for n in (1, 2, 4)]


def test_rates_leave_out_episodes_that_built_their_environment():
    whole, standing = eval_throughput.rates(rows()[3])
    assert whole == 72.0 and standing == 800.0


def test_page_compares_with_the_sequential_row():
    page = eval_throughput.page(rows())
    assert "bit-identical in all rows" in page
    assert "| workers_2 | 72 | 800 | 8.0 | 25.0 | 10 % | 1800 |" in page
    assert "| sequential | 72 | 100 | 1.0 | 25.0 | 10 % | 900 (with policy) |" in page


def test_page_says_when_rows_differ():
    other = copy.deepcopy(rows())
    other[2]["queries_sha256"] = "b"
    assert "**The rows differ.**" in eval_throughput.page(other)


def test_the_hash_covers_every_input_and_the_answer():
    policy = eval_throughput.HashingPolicy(FakePolicy())
    image, state = np.zeros((4, 4, 3), np.uint8), np.zeros(8)
    changed = image.copy()
    changed[0, 0, 0] = 1
    for request in ((image, image, state, "a"), (changed, image, state, "a"), (image, changed, state, "a")):
        policy.predict(*request)
    policy.predict(image, image, state + 1e-16, "a")
    policy.predict(image, image, state, "b")
    policy.predict(image, image, state, "a")
    assert len(set(policy.hashes)) == 5 and policy.hashes[0] == policy.hashes[-1]
    assert policy.action_spec.chunk_len == 8 and not hasattr(policy, "reset")


def test_workers_do_not_get_the_policy():
    backend = eval_throughput.HashingBackend()
    backend.policy = object()
    assert not hasattr(pickle.loads(pickle.dumps(backend)), "policy")
