"""Requests that wait together: one forward pass, own answers, own errors, an end to waiting."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from serving_fixtures import PATIENCE, FakePolicy

from craft_vla.serving.batching import Batcher, BusyError, PolicyError


def seen(number: float) -> SimpleNamespace:
    return SimpleNamespace(state=[number])


def run(policy: FakePolicy, work, **given) -> list:
    """Whatever `work(batcher)` returns, with the batcher running."""

    async def main():
        batcher = Batcher(policy, **({"max_batch": 8, "max_waiting": 64, "seconds": PATIENCE} | given))
        worker = asyncio.create_task(batcher.run())
        try:
            return await work(batcher)
        finally:
            policy.go.set()
            worker.cancel()

    return asyncio.run(main())


async def arrived(policy: FakePolicy) -> None:
    await asyncio.get_running_loop().run_in_executor(None, policy.arrived.wait, PATIENCE)


def together(policy: FakePolicy, numbers: list[float]):
    """Answers or errors for all numbers, which wait while the policy is busy with a first request."""

    async def work(batcher: Batcher) -> list:
        policy.go.clear()
        first = asyncio.create_task(batcher.ask(seen(0)))
        await arrived(policy)
        rest = [asyncio.create_task(batcher.ask(seen(number))) for number in numbers]
        await asyncio.sleep(0)  # each has joined the queue
        policy.go.set()
        await first
        return await asyncio.gather(*rest, return_exceptions=True)

    return work


def test_what_waits_together_is_one_batch_and_everybody_gets_the_own_answer():
    policy = FakePolicy()
    answers = run(policy, together(policy, [1, 2, 3, 4, 5, 6, 7]), max_batch=5)
    assert policy.batches == [1, 5, 2]
    assert [answer[0, 0] for answer in answers] == [1, 2, 3, 4, 5, 6, 7]


def test_one_that_is_refused_spoils_no_other():
    policy = FakePolicy()
    first, refused, last = run(policy, together(policy, [1, 1000, 3]))
    assert (first[0, 0], last[0, 0]) == (1, 3) and policy.batches == [1, 2]
    assert type(refused) is ValueError and "state is [1000], expected another" in str(refused)


def test_one_that_breaks_the_batch_fails_alone_and_names_no_file():
    policy = FakePolicy()
    first, broken, last = run(policy, together(policy, [1, 2000, 3]))
    assert (first[0, 0], last[0, 0]) == (1, 3) and policy.batches == [1, 3, 1, 1, 1]
    assert type(broken) is PolicyError and "RuntimeError" in str(broken) and "secret" not in str(broken)


def test_numbers_that_are_not_finite_are_not_sent():
    policy = FakePolicy()
    first, broken = run(policy, together(policy, [1, float("nan")]))
    assert first[0, 0] == 1 and type(broken) is PolicyError


def test_the_queue_has_an_end():
    policy = FakePolicy()

    async def work(batcher: Batcher) -> list:
        policy.go.clear()
        first = asyncio.create_task(batcher.ask(seen(0)))
        await arrived(policy)
        waiting = [asyncio.create_task(batcher.ask(seen(number))) for number in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="2 requests wait, expected fewer"):
            await batcher.ask(seen(3))
        policy.go.set()
        return [answer[0, 0] for answer in await asyncio.gather(first, *waiting)]

    assert run(policy, work, max_waiting=2) == [0, 1, 2]


def test_a_request_whose_time_is_over_is_not_computed():
    policy = FakePolicy()

    async def work(batcher: Batcher) -> np.ndarray:
        policy.go.clear()
        first = asyncio.create_task(batcher.ask(seen(0)))
        await arrived(policy)
        batcher._seconds = 0.05
        with pytest.raises(BusyError, match=r"no answer within 0\.05 s"):
            await batcher.ask(seen(1))
        batcher._seconds = PATIENCE
        policy.go.set()
        assert (await first)[0, 0] == 0
        return await batcher.ask(seen(2))

    assert run(policy, work, max_batch=1)[0, 0] == 2
    assert policy.batches == [1, 1]


def test_answers_are_shown_in_the_convention_that_was_asked_for():
    policy = FakePolicy()
    (answer,) = run(policy, together(policy, [3]), shown=lambda chunk: -chunk)
    assert answer[0, 0] == -3
