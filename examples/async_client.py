"""A robot that moves without a pause: the next chunk is asked for while the present one is executed.

python examples/async_client.py 127.0.0.1 8000

Asks `craft-serve` through `openpi_client`, in a Python of its own: pip install openpi-client typing-extensions. A
chunk's actions belong to the steps from its observation on; those that have passed when it arrives are dropped.
"""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor


class AsyncChunks:
    """Actions one after another. infer: observation -> {"actions": (K, A)}. lead: steps that an answer takes, < K."""

    def __init__(self, infer, lead: int) -> None:
        self._infer, self._lead = infer, lead
        self._thread = ThreadPoolExecutor(1)
        self._chunk, self._start, self._step = [], 0, 0  # the chunk's first action belongs to step `_start`
        self._asked: tuple[int, Future] | None = None  # the step of an observation, and its answer

    def act(self, observe):
        """The action of this control step. `observe` is called when a chunk is asked for; waits when none is left."""
        left = self._start + len(self._chunk) - self._step
        if self._asked is None and left <= self._lead:
            self._asked = self._step, self._thread.submit(self._infer, observe())
        if self._asked is not None and (left == 0 or self._asked[1].done()):
            self._start, self._chunk = self._asked[0], self._asked[1].result()["actions"]
            self._asked = None
        action = self._chunk[self._step - self._start]
        self._step += 1
        return action


def main(host: str, port: int) -> None:
    """Ten seconds of a robot that shows grey images; yours reads its cameras and moves."""
    import numpy as np
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    client = WebsocketClientPolicy(host, port)
    told = client.get_server_metadata()
    period = 1 / (told["actions"]["control_hz"] or 20)
    grey = {f"observation/{c['name']}": np.full((256, 256, 3), 128, np.uint8) for c in told["cameras"]}
    seen = grey | {"observation/state": np.zeros(told["state"]["size"]), "prompt": "pick up the milk"}
    lead = math.ceil(told["latency_ms"] / 1000 / period) + 1  # the way to the server and back takes a step at most
    chunks = AsyncChunks(client.infer, min(lead, told["actions"]["chunk"] - 1))
    for _ in range(round(10 / period)):
        began = time.monotonic()
        print(np.round(chunks.act(lambda: seen), 3))
        time.sleep(max(0.0, period - (time.monotonic() - began)))


if __name__ == "__main__":
    import sys

    main(sys.argv[1], int(sys.argv[2]))
