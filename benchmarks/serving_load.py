"""A server under load: clients that ask at the same time, some of them wrong, slow or gone in the middle.

    python benchmarks/serving_load.py
    python benchmarks/serving_load.py --requests 300 --clients 4

Starts `craft-serve` on the loopback address. Each client is a process with a websocket of its own that sends two images
of 256 px and the next question when it has its answer. One request in twenty is no message, has no camera, has a state
that is not finite, or belongs to another connection that never ends its header or its message, breaks off in a message,
or leaves before its answer. Checked: every good question gets the chunk that its client got for it before, every
mistake a text, every connection that never ends is closed, the server lives and logs nothing. Memory is that of the
server process (VmRSS). Ends with exit code 1 when something was wrong. Raw numbers go to {output}/load.json.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import platform
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_page import write, write_section
from websockets.sync.client import ClientConnection, connect

from craft_vla.serving.messages import pack, unpack
from prismatic.command_line import bad_input_in_one_line, flag, parse
from prismatic.progress import Progress

SECONDS = 60.0
"""After which an answer is missing."""
SLOW_SECONDS = 1.0
"""What the server allows for a header or a message."""
ONE_IN = 20
SCENES = 3
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
)
PART_OF_A_MESSAGE = b"\x82\xfe\x10\x00abcd" + b"x" * 100


@dataclass
class LoadConfig:
    """Flags."""

    checkpoint: str = "pretrained_models/tiny-libero-object"
    requests: int = flag(10_000, "of all clients together", at_least=40)
    clients: int = flag(8, at_least=1, at_most=64)
    output: str = "results/serving"
    page: str = "docs/performance.md"


# ------------------------------------------------------------------------------------------------------------ a client


class Client:
    """One process of the load. `outcomes` counts what happened, `wrong` says what should not have."""

    def __init__(self, port: int, number: int) -> None:
        self.port, self.number = port, number
        self.rng = np.random.default_rng(number)
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.milliseconds: list[float] = []
        self.unending: list[socket.socket] = []
        self.connection = self.connected()
        self.scenes = [self._scene() for _ in range(SCENES)]
        self.first = [self._actions(scene) for scene in self.scenes]
        self.mistakes: dict[str, Callable[[], None]] = {
            "no message": lambda: self._refused(b"\xc1" + self.rng.bytes(100)),
            "no camera": lambda: self._refused(pack({"prompt": "pick up the milk", "observation/state": np.zeros(8)})),
            "state not finite": lambda: self._refused(pack(self.scenes[0] | {"observation/state": np.full(8, np.nan)})),
            "header never ends": lambda: self._unending(b"GET / HTTP/1.1\r\nHost: a\r\nX-", b""),
            "message never ends": lambda: self._unending(UPGRADE, PART_OF_A_MESSAGE),
            "broken off in a message": self._broken_off,
            "gone before the answer": self._gone,
        }

    def connected(self) -> ClientConnection:
        """A websocket, behind its metadata."""
        opened = connect(f"ws://127.0.0.1:{self.port}", compression=None, max_size=None, open_timeout=SECONDS)
        connection = opened.__enter__()  # left open: a client keeps its connection, or breaks it off
        unpack(connection.recv(SECONDS))
        return connection

    def _scene(self) -> dict[str, Any]:
        views = {name: self.rng.integers(0, 256, (256, 256, 3), np.uint8) for name in ("image", "wrist_image")}
        seen = {f"observation/{name}": view for name, view in views.items()}
        return seen | {"observation/state": self.rng.normal(size=8) * 0.1, "prompt": "pick up the milk"}

    def _actions(self, scene: dict[str, Any]) -> np.ndarray:
        self.connection.send(pack(scene))
        answer = self.connection.recv(SECONDS)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return unpack(answer)["actions"]

    def good(self) -> None:
        """One question, whose answer is known."""
        which = int(self.rng.integers(SCENES))
        began = time.perf_counter()
        actions = self._actions(self.scenes[which])
        self.milliseconds.append(1000 * (time.perf_counter() - began))
        # In batches of other sizes the last bits differ; the scenes of other clients are far away.
        if np.abs(actions - self.first[which]).max() > 1e-4:
            self.wrong.append("another answer than before")
        self.outcomes["answered"] += 1

    def _refused(self, message: bytes) -> None:
        self.connection.send(message)
        if not isinstance(self.connection.recv(SECONDS), str):
            self.wrong.append("a mistake was answered with actions")

    def _raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def _unending(self, head: bytes, rest: bytes) -> None:
        raw = self._raw()
        raw.sendall(head)
        if rest:
            raw.recv(65536)
            raw.sendall(rest)
        self.unending.append(raw)

    def _broken_off(self) -> None:
        with self._raw() as raw:
            raw.sendall(UPGRADE)
            raw.recv(65536)
            raw.sendall(PART_OF_A_MESSAGE)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not a farewell

    def _gone(self) -> None:
        connection = self.connected()
        connection.send(pack(self.scenes[0]))
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.socket.close()

    def run(self, requests: int, done: Any) -> None:
        """Ask `requests` times; `done` is a shared counter."""
        kinds = list(self.mistakes)
        after_mistake = False
        for number in range(requests):
            if number % ONE_IN == ONE_IN - 1:
                kind = kinds[(self.number + number // ONE_IN) % len(kinds)]
                self.mistakes[kind]()
                self.outcomes[kind] += 1
                after_mistake = True
            else:
                self.good()
                self.outcomes["answered after a mistake"] += after_mistake
                after_mistake = False
            with done.get_lock():
                done.value += 1
        for raw in self.unending:
            if not is_closed(raw):
                self.wrong.append("a connection that never ends was left open")
        self.connection.close()


def is_closed(raw: socket.socket) -> bool:
    """Whether the other side ends a connection, now or soon."""
    with raw, suppress(ConnectionError):
        try:
            while raw.recv(65536):
                pass
        except TimeoutError:
            return False
    return True


def load(port: int, number: int, requests: int, done: Any, answers: Any) -> None:
    """A client process."""
    try:
        client = Client(port, number)
        client.run(requests, done)
        answers.put((client.milliseconds, client.outcomes, client.wrong))
    except Exception as error:
        answers.put(([], Counter(), [f"client {number}: {type(error).__name__}: {error}"]))


# ---------------------------------------------------------------------------------------------------------- the server


class Server:
    """`craft-serve` as a process; its output goes to a file."""

    def __init__(self, checkpoint: str) -> None:
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 -- as long as the server
        limits = ["--seconds_to_send", str(SLOW_SECONDS), "--max_connections", "128"]
        words = ["--pretrained_checkpoint", checkpoint, "--device", "cpu", "--port", "0", *limits]
        command = [sys.executable, "-m", "experiments.robot.serve", *words]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        while not (found := re.search(r"ws://127\.0\.0\.1:(\d+)", self.said())):
            if self.process.poll() is not None:
                raise ValueError(f"--checkpoint {checkpoint}: the server ended: {self.said()}")
            time.sleep(0.2)
        self.port = int(found[1])
        self.greeting = self.said()

    def said(self) -> str:
        """All it wrote."""
        return Path(self.log.name).read_text("utf-8")

    def megabytes(self) -> float:
        """Resident memory now."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]

    def get(self, path: str) -> str:
        """An answer over HTTP."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def end(self) -> list[str]:
        """Stop it; what was wrong with it."""
        wrong = []
        if self.process.poll() is not None:
            wrong.append(f"the server ended with {self.process.returncode}")
        elif self.get("/healthz") != "OK\n":
            wrong.append("the server is not healthy")
        self.process.send_signal(signal.SIGINT)
        if self.process.wait(SECONDS) != 0:
            wrong.append(f"the server ended with {self.process.returncode} when it was told to")
        if more := self.said().removeprefix(self.greeting):
            wrong.append(f"the server wrote {more[:2000]}")
        return wrong


def measure(cfg: LoadConfig) -> dict[str, Any]:
    """The record of one load."""
    server = Server(cfg.checkpoint)
    metadata = json.loads(server.get("/metadata"))
    spawn = multiprocessing.get_context("spawn")
    done, answers = spawn.Value("i", 0), spawn.Queue()
    shares = [cfg.requests // cfg.clients + (number < cfg.requests % cfg.clients) for number in range(cfg.clients)]
    clients = [spawn.Process(target=load, args=(server.port, i, n, done, answers)) for i, n in enumerate(shares)]
    for client in clients:
        client.start()
    memory, began = [], 0.0
    with Progress(cfg.requests, "asking", "requests") as progress:
        while any(client.is_alive() for client in clients) and server.process.poll() is None:
            if done.value and not began:
                began = time.monotonic()
            progress.advance(done.value - progress.done)
            memory.append((done.value, round(server.megabytes(), 1)))
            if answers.qsize() == cfg.clients:
                break
            time.sleep(0.5)
    seconds = time.monotonic() - began
    found = [answers.get(timeout=SECONDS) for _ in clients]
    for client in clients:
        client.join()
    wrong = [text for _, _, texts in found for text in texts] + server.end()
    taken = np.concatenate([np.asarray(times) for times, _, _ in found])
    outcomes = sum((counts for _, counts, _ in found), Counter())
    return {
        "requests": cfg.requests,
        "clients": cfg.clients,
        "seconds": round(seconds, 1),
        "outcomes": dict(sorted(outcomes.items())),
        "wrong": wrong,
        "milliseconds": {f"p{p}": round(float(np.percentile(taken, p)), 1) for p in (50, 95, 99)} if len(taken) else {},
        "longest_ms": round(float(taken.max()), 1) if len(taken) else None,
        "latency_ms": metadata["latency_ms"],
        "latency_full_batch_ms": metadata["latency_full_batch_ms"],
        "megabytes": memory_at(memory, cfg.requests),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def memory_at(samples: list[tuple[int, float]], requests: int) -> dict[str, float]:
    """Median megabytes in tenths of the load: the second (warm), the middle one, the last; and the most of all."""

    def median(first: float, last: float) -> float:
        inside = [size for count, size in samples if first * requests <= count <= last * requests]
        return round(float(np.median(inside)), 1) if inside else float("nan")

    most = max(size for _, size in samples)
    return {"warm": median(0.1, 0.2), "middle": median(0.45, 0.55), "end": median(0.9, 1.0), "most": most}


def page(record: dict[str, Any]) -> str:
    """The section of docs/performance.md."""
    outcomes, times, memory = record["outcomes"], record["milliseconds"], record["megabytes"]
    bad = sum(n for kind, n in outcomes.items() if not kind.startswith("answered"))
    wrong = "Nothing was wrong." if not record["wrong"] else f"**Wrong: {len(record['wrong'])} times.**"
    return "\n".join(
        [
            "# Serving",
            "",
            "This section is written by `python benchmarks/serving_load.py` from `results/serving/load.json`. Do not "
            "edit.",
            "",
            " ".join(__doc__.split("\n\n")[2].split()).partition(" Memory is")[0],
            "",
            f"{record['requests']:,} requests of {record['clients']} clients, {bad} of them such, server and clients "
            f"on {record['cores']} core{'s' * (record['cores'] > 1)} together. {wrong} The next good question after "
            f"such a request was answered {outcomes['answered after a mistake']:,} times.",
            "",
            "| | |",
            "|---|---|",
            f"| requests/s | {record['requests'] / record['seconds']:.1f} |",
            f"| answer, ms: p50, p95, p99 | {times['p50']:.0f}, {times['p95']:.0f}, {times['p99']:.0f} |",
            f"| one alone, ms; a batch of 8, ms | {record['latency_ms']:.0f}; {record['latency_full_batch_ms']:.0f} |",
            f"| memory of the server, MB: warm, middle, end | {memory['warm']:.0f}, {memory['middle']:.0f}, "
            f"{memory['end']:.0f} |",
        ]
    )


def main() -> None:
    """Measure, then write record and section."""
    with bad_input_in_one_line("serving_load.py"):
        cfg = parse(LoadConfig, description=__doc__)
        record = measure(cfg)
    write(Path(cfg.output) / "load.json", json.dumps(record, indent=1) + "\n")
    write_section(Path(cfg.page), "serving", page(record))
    print(json.dumps(record, indent=1))
    if record["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
