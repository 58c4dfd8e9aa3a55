"""A real checkpoint behind the server: its answers, what it says of itself, and the flags of `craft-serve`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import json_numpy
import msgpack
import numpy as np
import pytest
from serving_fixtures import PATIENCE, http_call, limits, openpi_array, read_openpi, robot, serving

import craft_vla
from craft_vla.serving.metadata import describe, retention
from craft_vla.serving.server import TOKEN_VARIABLE, is_loopback, listen, read_token
from experiments.robot.libero.controls import to_simulator_actions
from experiments.robot.serve import ServeConfig, prepare
from prismatic.command_line import parse
from prismatic.evidence.hashes import content_hash

ROOT = Path(__file__).parents[2]
START = str(ROOT / "pretrained_models" / "tiny-libero-object")
KEY = "libero_object_scripted_no_noops"


@pytest.fixture(scope="module")
def policy():
    return craft_vla.load_policy(START, "cpu")


def scene(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    views = {name: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for name in ("image", "wrist_image")}
    return views | {"state": rng.normal(size=8) * 0.1, "prompt": f"pick up the milk {seed}"}


def expected(policy: craft_vla.Policy, seed: int) -> np.ndarray:
    seen = scene(seed)
    views = {name: seen[name] for name in policy.cameras}
    return policy.predict(views, seen["state"], seen["prompt"])


def packed(seed: int) -> bytes:
    values = scene(seed).items()
    return msgpack.packb({k: openpi_array(v) if isinstance(v, np.ndarray) else v for k, v in values})


def test_clients_that_ask_together_get_what_the_policy_says_to_each_alone(policy, monkeypatch):
    sizes, predict_many = [], policy.predict_many
    monkeypatch.setattr(policy, "predict_many", lambda seen: sizes.append(len(seen)) or predict_many(seen))

    def answers(port: int, seed: int) -> list[np.ndarray]:
        with robot(port) as (connection, _):
            found = []
            for _ in range(3):
                connection.send(packed(seed))
                found.append(read_openpi(connection.recv(PATIENCE))["actions"])
            return found

    with serving(policy, metadata={"unnorm_key": KEY}) as port, ThreadPoolExecutor(4) as clients:
        found = list(clients.map(lambda seed: answers(port, seed), range(4)))
    assert max(sizes) > 1 and sum(sizes) == 12
    for seed, chunks in enumerate(found):
        for chunk in chunks:
            np.testing.assert_allclose(chunk, expected(policy, seed), atol=1e-5)


def test_both_protocols_say_what_python_says(policy):
    seen = scene(1)
    sent = {"full_image": seen["image"], "wrist_image": seen["wrist_image"], "state": seen["state"]}
    with serving(policy, metadata={"unnorm_key": KEY}) as port:
        status, answer = http_call(port, "/act", json_numpy.dumps(sent | {"instruction": seen["prompt"]}))
        with robot(port) as (connection, _):
            connection.send(packed(1))
            chunk = read_openpi(connection.recv(PATIENCE))["actions"]
    assert status == 200
    np.testing.assert_array_equal(chunk, expected(policy, 1))
    np.testing.assert_array_equal(np.stack(json_numpy.loads(json.dumps(answer))), chunk)


# ------------------------------------------------------------------------------------------------------------ metadata


def test_metadata_say_what_a_robot_must_know(policy):
    said = describe(policy, limits(max_batch=2), as_simulator=False)
    assert msgpack.unpackb(msgpack.packb(said)) == json.loads(json.dumps(said)) == said
    assert (said["actions"]["size"], said["actions"]["chunk"], said["actions"]["control_hz"]) == (7, 8, 20.0)
    assert said["actions"]["gripper"] == "0 to 1, 1 = open"
    assert said["cameras"] == [{"name": n, "resized_to": [96, 96]} for n in ("image", "wrist_image")]
    assert said["state"]["size"] == 8 and "axis-angle (rad)" in said["state"]["layout"]
    assert said["instruction"]["language"] is None and len(said["instruction"]["trained"]) == 4
    assert said["unnorm_key"] == KEY and said["checkpoint"]["hash"] == content_hash(START)
    assert said["latency_ms"] > 0 and said["latency_full_batch_ms"] > 0 and said["keeps_state"] is False
    assert said["protocol"] == {"name": "craft-vla", "version": 1} and said["retention"] is None
    assert describe(policy, limits(max_batch=1), as_simulator=True)["actions"]["gripper"] == "-1 = open, +1 = close"


def test_a_name_that_a_file_registered_for_training_says_nothing_here(policy, monkeypatch):
    monkeypatch.setitem(policy.metadata, "training", {"data_set_file": "robots.py"})
    said = describe(policy, limits(max_batch=1), as_simulator=False)["actions"]
    assert "standardize" in said["gripper"] and said["control_hz"] is None


@pytest.mark.parametrize("libero", [True, False])
def test_the_recorded_convention_counts_and_not_the_name(policy, monkeypatch, libero):
    monkeypatch.setitem(policy.metadata, "conventions", {KEY: {"libero": libero, "control_hz": 15.0}})
    said = describe(policy, limits(max_batch=1), as_simulator=False)
    assert said["actions"]["control_hz"] == 15.0
    for text in (said["actions"]["gripper"], said["state"]["layout"], said["actions"]["units"]):
        assert ("standardize" in text) is not libero


def test_budget_and_drift_come_from_a_constrained_training():
    record = {"config": {"retention_budget": 0.03, "signal": "actions"}, "achieved_drift": 0.04, "dual": {}}
    assert retention({"craft": record}) == {"budget": 0.03, "achieved_drift": 0.04, "held": "actions"}
    assert retention({"craft": None}) is None and retention({}) is None


# --------------------------------------------------------------------------------------------------------------- flags


def refused(*words: str) -> str:
    with pytest.raises((ValueError, KeyError, OSError)) as error:
        prepare(parse(ServeConfig, list(words)))
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--pretrained_checkpoint is missing"),
        (("--port", "70000"), "--port is 70000, expected at least 0 and at most 65535"),
        (("--gripper", "open"), "--gripper is 'open', expected one of data, simulator"),
        (("--max_batch", "0"), "--max_batch is 0, expected at least 1"),
        (("--requests_per_second", "nan"), "--requests_per_second is nan"),
        (("--pretrained_checkpoint", START, "--host", "0.0.0.0"), "--host 0.0.0.0 lets other machines ask: found no"),
        (("--pretrained_checkpoint", START, "--host", "no such host"), "lets other machines ask"),
        (("--pretrained_checkpoint", START, "--token_file", "no/such"), "no/such"),
        (("--pretrained_checkpoint", START, "--unnorm_key", "other"), "other"),
        (("--pretrained_checkpoint", "no/such"), "no/such"),
    ],
)
def test_flags_that_cannot_be_used_are_named(words, said, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert said in refused(*words)


def test_the_simulators_gripper_is_refused_for_other_data(monkeypatch):
    monkeypatch.setattr("craft_vla.serving.metadata.is_libero", lambda policy: False)
    said = refused("--pretrained_checkpoint", START, "--gripper", "simulator")
    assert f"--gripper simulator: found data '{KEY}'" in said and "use --gripper data" in said


def test_a_port_that_is_taken_is_named():
    with listen("127.0.0.1", 0) as taken:
        number = str(taken.getsockname()[1])
        said = refused("--pretrained_checkpoint", START, "--port", number, "--max_batch", "1")
    assert f"--host 127.0.0.1 --port {number}: " in said and "expected an address of this machine" in said


def test_where_a_token_comes_from(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token("127.0.0.1", "") is None
    monkeypatch.setenv(TOKEN_VARIABLE, "a-token-of-some-length")
    assert read_token("0.0.0.0", "") == "a-token-of-some-length"
    file = tmp_path / "token"
    file.write_text("another-token-of-some-length\n")
    assert read_token("0.0.0.0", str(file)) == "another-token-of-some-length"
    for bad in ("short", "a token of some length", "ein-gültiges-zeichen-fehlt", ""):
        file.write_text(bad)
        with pytest.raises(ValueError, match=r"--token_file .*: found \d+ characters"):
            read_token("127.0.0.1", str(file))


def test_only_this_machine_is_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "localhost", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.com", "", "127.0.0.1.example.com")))


# ------------------------------------------------------------------------------------------ the program, a true client

CLIENT = """
import sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
rng = np.random.default_rng(1)
views = {name: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for name in ("image", "wrist_image")}
client = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
metadata = client.get_server_metadata()
seen = {f"observation/{name}": view for name, view in views.items()}
seen |= {"observation/state": rng.normal(size=8) * 0.1, "prompt": "pick up the milk 1"}
answer = client.infer(seen)
assert answer["server_timing"]["infer_ms"] > 0 and metadata["actions"]["chunk"] == 8
try:
    client.infer({"prompt": "pick up the milk"})
except RuntimeError as error:
    assert "camera image, wrist_image is missing" in str(error), error
else:
    raise AssertionError("a message without cameras was answered")
client.reset()
np.testing.assert_array_equal(client.infer(seen)["actions"], answer["actions"])
np.save(sys.argv[2], answer["actions"])
"""


@pytest.fixture
def program(tmp_path):
    """(port, process) of `craft-serve` in the simulator's convention."""
    log = tmp_path / "log"
    words = ["--pretrained_checkpoint", START, "--port", "0", "--gripper", "simulator", "--max_batch", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        command = [sys.executable, "-m", "experiments.robot.serve", *words, "--device", "cpu"]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + PATIENCE
        while not (found := re.search(r"ws://127.0.0.1:(\d+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield int(found[1]), process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_program_answers_an_unmodified_openpi_client_and_ends_when_told(program, policy, tmp_path):
    """Needs a Python with `openpi-client` in the environment variable OPENPI_PYTHON; else a client of our own asks."""
    port, process = program
    if python := os.environ.get("OPENPI_PYTHON"):
        done = subprocess.run(
            [python, "-c", CLIENT, str(port), str(tmp_path / "a.npy")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        chunk = np.load(tmp_path / "a.npy")
    else:
        with robot(port) as (connection, _):
            connection.send(packed(1))
            chunk = read_openpi(connection.recv(PATIENCE))["actions"]
    np.testing.assert_array_equal(chunk, to_simulator_actions(expected(policy, 1)))
    assert set(np.unique(chunk[:, -1])) <= {-1.0, 1.0}
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0
