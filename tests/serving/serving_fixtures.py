"""A policy that is told what to do, and a server in a thread."""

from __future__ import annotations

import http.client
import json
import threading
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
from websockets.sync.client import connect

from craft_vla.serving.limits import Limits
from craft_vla.serving.server import listen, make_server

CAMERAS = ("image", "wrist_image")
METADATA = {"unnorm_key": "d", "latency_ms": 1.0}
PATIENCE = 60.0
"""Seconds after which a test that waits for an event has failed."""


class FakePolicy:
    """Says state[0] eight times; a state of 1000 is refused, of 2000 or more breaks the whole batch.

    `go` cleared holds the worker thread at the next batch; `arrived` is set when one is there.
    """

    cameras = CAMERAS

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.go, self.arrived = threading.Event(), threading.Event()
        self.go.set()

    def check(self, observation: Any) -> None:
        if observation.state is None or observation.state[0] == 1000:
            raise ValueError(f"state is {observation.state}, expected another")

    def predict_many(self, observations: list[Any]) -> list[np.ndarray]:
        self.batches.append(len(observations))
        self.arrived.set()
        assert self.go.wait(PATIENCE)
        if any(one.state[0] >= 2000 for one in observations):
            raise RuntimeError("secret /home/name/file.py")
        return [np.full((8, 7), one.state[0], np.float64) for one in observations]


def limits(**given: Any) -> Limits:
    return Limits(**({"requests_per_second": 1e6} | given))


@contextmanager
def serving(policy: Any, given: Limits | None = None, token: str | None = None, metadata: Any = None, **more: Any):
    """Port of a running server; the list `servers`, if given, gets the server itself."""
    servers = more.pop("servers", [])
    place = listen("127.0.0.1", 0)
    server = make_server(policy, policy.cameras, metadata or METADATA, given or limits(), token, **more)
    servers.append(server)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    try:
        yield place.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def openpi_array(array: np.ndarray) -> dict[bytes, Any]:
    """What openpi's client sends for an array, written down apart from the code under test."""
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


def openpi_message(state: float = 3.0, **changes: Any) -> bytes:
    picture = openpi_array(np.zeros((4, 4, 3), np.uint8))
    message = {
        "observation/image": picture,
        "observation/wrist_image": picture,
        "observation/state": openpi_array(np.full(8, state)),
        "prompt": "pick up the milk",
    }
    return msgpack.packb({name: value for name, value in (message | changes).items() if value is not None})


def read_openpi(message: bytes | str) -> Any:
    assert isinstance(message, bytes), message

    def array(values: dict) -> Any:
        if b"__ndarray__" not in values:
            return values
        return np.frombuffer(values[b"data"], values[b"dtype"]).reshape(values[b"shape"])

    return msgpack.unpackb(message, object_hook=array)


@contextmanager
def robot(port: int, **options: Any):
    """(connection, metadata) of a websocket client."""
    with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, **options) as connection:
        yield connection, read_openpi(connection.recv(PATIENCE))


def ask(connection: Any, state: float = 3.0) -> np.ndarray:
    connection.send(openpi_message(state))
    return read_openpi(connection.recv(PATIENCE))["actions"]


def http_call(port: int, path: str, body: Any = None, method: str = "", **headers: str) -> tuple[int, Any]:
    """(status, JSON or text) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    content = {"Content-Type": "application/json"} if body is not None else {}
    method = method or ("GET" if body is None else "POST")
    connection.request(method, path, body, content | {name.replace("_", "-"): word for name, word in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, json.loads(text) if "json" in answer.headers["content-type"] else text
