"""The page of the evaluation benchmark, and its hashes, without a simulator."""

from __future__ import annotations

import pickle

import eval_throughput
import numpy as np
import pytest
from fake_libero_world import FakePolicy


def make_row(name: str, finished_s: list[float], memory: list[float]) -> dict:
    return {
        "row": name,
        "wall_s": 100.0,
        "cpu_s": 50.0,
        "policy_wait_share": 0.1,
        "process_mb": 900.0,
        "worker_mb": memory,
        "outcomes": [[0, i, "success", 100, 2] for i in range(len(finished_s))],
        "queries": sorted(f"{i}{q}" for i in range(len(finished_s)) for q in "ab"),
        "episodes": [{} for _ in finished_s],
        "finished_s": finished_s,
        "load_average": 2.0,
        "gl_renderers": ["llvmpipe"],
    }


def rows() -> list[dict]:
    made = [make_row("sequential", [40.0, 76.0], []), make_row("in_process", [20.0, 29.0, 38.0, 47.0, 56.0], [])]
    return made + [make_row(f"workers_{n}", [20.0, 21.0, 24.0, 25.0, 28.0], [1800.0] * n) for n in (1, 2, 4)]


def test_rates_begin_when_every_worker_has_an_environment():
    whole, standing = eval_throughput.rates(rows()[3])
    assert whole == 180.0 and standing == pytest.approx(3600 * 3 / 7)


def test_page_compares_with_the_sequential_row():
    page = eval_throughput.page(rows())
    assert "bit-identical in all rows" in page and "runs the first 2 episodes" in page
    assert "| workers_2 | 180 | 1543 | 15.4 | 10.0 | 10 % | 1800 |" in page
    assert "| sequential | 72 | 100 | 1.0 | 25.0 | 10 % | 900 (with policy) |" in page


@pytest.mark.parametrize("row", [0, 2])
def test_page_says_when_rows_differ(row):
    other = rows()
    other[row]["queries"][0] = "0c"
    assert "**The rows differ.**" in eval_throughput.page(other)
    other = rows()
    other[row]["outcomes"][1][2] = "failure"
    assert not eval_throughput.agree(other)


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


def test_the_watch_sees_lines_appear(tmp_path):
    path = tmp_path / "episodes.jsonl"
    watch = eval_throughput.Watch(path)
    watch.start()
    watch.look()
    assert watch.finished_s == []
    path.write_text("{}\n{}\n{}")
    watch.look()
    assert len(watch.finished_s) == 2
