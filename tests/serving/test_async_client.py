"""The client of the examples: steps go on while a chunk is computed, and every action belongs to its step."""

import runpy
import threading
from pathlib import Path

import numpy as np
import pytest

PATIENCE = 60.0
AsyncChunks = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "async_client.py"))["AsyncChunks"]


class Server:
    """Answers step * 10 + row for an observation of `step`, when it is told to."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.arrived, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def infer(self, step: int) -> dict:
        self.asked.append(step)
        self.arrived.release()
        assert self.go.acquire(timeout=PATIENCE)
        return {"actions": np.arange(8) + 10 * step}


def test_a_chunk_that_comes_in_time_goes_on_where_time_has_got_to():
    server = Server()
    chunks = AsyncChunks(server.infer, lead=3)
    server.go.release()
    actions = [chunks.act(lambda: 0) for _ in range(5)]  # waits for the first chunk
    assert actions == [0, 1, 2, 3, 4] and server.asked == [0]
    assert chunks.act(lambda: 5) == 5  # three are left: the next is asked for, and this one executed
    assert server.arrived.acquire(timeout=PATIENCE) and server.arrived.acquire(timeout=PATIENCE)
    assert chunks.act(lambda: 6) == 6 and server.asked == [0, 5]
    server.go.release()
    chunks._asked[1].result(PATIENCE)
    assert chunks.act(lambda: 7) == 52  # of the chunk seen at step 5 the first two have passed
    assert [chunks.act(lambda: 8) for _ in range(2)] == [53, 54]


def test_a_chunk_that_comes_late_is_waited_for():
    server = Server()
    chunks = AsyncChunks(server.infer, lead=3)
    server.go.release()
    assert [chunks.act(lambda: 0) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert [chunks.act(lambda: 5) for _ in range(3)] == [5, 6, 7]
    threading.Timer(0.05, server.go.release).start()
    assert chunks.act(lambda: 8) == 53 and server.asked == [0, 5]


@pytest.mark.parametrize("lead", range(8))
def test_no_action_is_executed_out_of_its_step(lead):
    server = Server()
    for _ in range(100):
        server.go.release()
    chunks = AsyncChunks(server.infer, lead)
    for step in range(60):
        action = chunks.act(lambda now=step: now)
        seen, row = divmod(int(action), 10)
        assert seen + row == step and 0 <= row < 8


def test_an_error_of_the_server_reaches_the_robot():
    def infer(seen):
        raise RuntimeError("camera image is missing")

    with pytest.raises(RuntimeError, match="camera image is missing"):
        AsyncChunks(infer, 2).act(lambda: 0)
