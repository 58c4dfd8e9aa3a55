"""The server from outside: both protocols, who may ask, and clients that are wrong, slow or gone."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time

import json_numpy
import msgpack
import numpy as np
import pytest
from serving_fixtures import (
    METADATA,
    PATIENCE,
    FakePolicy,
    ask,
    http_call,
    limits,
    openpi_array,
    openpi_message,
    read_openpi,
    robot,
    serving,
)
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus

from craft_vla.serving import app
from craft_vla.serving.limits import Pace
from craft_vla.serving.protocols import MAX_FRAGMENTS

TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def policy():
    return FakePolicy()


@pytest.fixture(scope="module")
def port(policy):
    with serving(policy, limits(max_message_mb=1)) as number:
        yield number


@pytest.fixture(autouse=True)
def still_answers(request):
    """Whatever a test did to the server: the next good request is answered."""
    yield
    if "port" in request.fixturenames:
        with robot(request.getfixturevalue("port")) as (connection, _):
            assert ask(connection, 5.0)[0, 0] == 5.0


# --------------------------------------------------------------------------------------------------- openpi's protocol


def test_metadata_come_first_then_an_answer_for_every_message(port):
    with robot(port) as (connection, metadata):
        assert metadata == METADATA
        for number in (1.0, 2.0):
            connection.send(openpi_message(number))
            answer = read_openpi(connection.recv(PATIENCE))
            assert set(answer) == {"actions", "server_timing"}
            np.testing.assert_array_equal(answer["actions"], np.full((8, 7), number))
            assert answer["actions"].dtype == np.float64
            assert set(answer["server_timing"]) == {"infer_ms"} | ({"prev_total_ms"} if number == 2.0 else set())
            assert all(value > 0 for value in answer["server_timing"].values())


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (b"\xc1", "expected one msgpack map"),
        (msgpack.packb({"prompt": "a"}), "camera image, wrist_image is missing"),
        (openpi_message(1000), "expected another"),
        (openpi_message(**{"observation/state": openpi_array(np.zeros(8)) | {b"dtype": "|O"}}), "dtype '|O'"),
        ("text", "found text, expected msgpack"),
        (bytearray(b"\x81\x81\0\0\0\0\xff"), "found text, expected msgpack"),  # a frame: text that is no UTF-8
    ],
)
def test_a_mistake_is_answered_by_one_line_of_text_and_the_connection_stays(port, message, said):
    with robot(port) as (connection, _):
        if isinstance(message, bytearray):  # as it is: the client itself would not send it
            connection.socket.sendall(message)
        else:
            connection.send(message)
        answer = connection.recv(PATIENCE)
        assert isinstance(answer, str) and said in answer and "\n" not in answer
        assert ask(connection, 4.0)[0, 0] == 4.0


def test_a_fault_of_the_policy_is_said_without_names_of_files_and_closes_with_1011(port):
    with robot(port) as (connection, _):
        connection.send(openpi_message(2000))
        answer = connection.recv(PATIENCE)
        assert "RuntimeError" in answer and "/" not in answer and "\n" not in answer
        with pytest.raises(ConnectionClosedError) as closed:
            connection.recv(PATIENCE)
        assert closed.value.rcvd.code == 1011


def test_a_message_beyond_the_limit_is_not_read(port):
    picture = openpi_array(np.zeros((700, 700, 3), np.uint8))
    with robot(port) as (connection, _):
        connection.send(openpi_message(**{"observation/image": picture}))
        with pytest.raises(ConnectionClosedError) as closed:
            connection.recv(PATIENCE)
        assert closed.value.rcvd.code == 1009


def test_compression_is_not_spoken(port):
    from websockets.sync.client import connect

    with connect(f"ws://127.0.0.1:{port}") as connection:  # offers permessage-deflate
        assert connection.protocol.extensions == []


# ---------------------------------------------------------------------------------------------------------------- HTTP


def oft(state: float = 3.0, **changes) -> dict:
    picture = np.zeros((4, 4, 3), np.uint8)
    message = {"full_image": picture, "wrist_image": picture, "state": np.full(8, state), "instruction": "a"}
    return message | changes


def test_act_answers_a_list_of_arrays_and_an_encoded_question_by_an_encoded_answer(port):
    status, answer = http_call(port, "/act", json_numpy.dumps(oft()))
    chunk = json_numpy.loads(json.dumps(answer))
    assert status == 200 and len(chunk) == 8 and all((row == np.full(7, 3.0)).all() for row in chunk)
    status, answer = http_call(port, "/act", json.dumps({"encoded": json_numpy.dumps(oft(6.0))}))
    assert status == 200 and isinstance(answer, str)
    np.testing.assert_array_equal(json_numpy.loads(answer), np.full((8, 7), 6.0))


@pytest.mark.parametrize(
    ("body", "headers", "status", "said"),
    [
        ("{", {}, 400, "expected one JSON object"),
        ("[1]", {}, 400, "found list, expected a map"),
        (json.dumps({"encoded": 3}), {}, 400, "encoded is int"),
        (json.dumps({"encoded": "{"}), {}, 400, "expected one JSON object"),
        (json_numpy.dumps(oft(1000)), {}, 400, "expected another"),
        (json_numpy.dumps(oft(2000)), {}, 500, "RuntimeError"),
        (b" " * (1 << 20) + b"{}", {}, 413, "expected at most"),
        ("{}", {"Content_Type": "text/plain"}, 415, "expected application/json"),
        ("{}", {"Content_Encoding": "gzip"}, 415, "not compressed"),
        ("{}", {"Origin": "http://a.example"}, 403, "not a web page"),
    ],
)
def test_act_says_status_and_reason(port, body, headers, status, said):
    found, answer = http_call(port, "/act", body, **headers)
    assert found == status and set(answer) == {"error"}
    assert said in answer["error"] and "\n" not in answer["error"] and "/home" not in answer["error"]


def test_a_pickle_in_json_numpy_is_not_opened(port):
    packed = {"__numpy__": base64.b64encode(b"cos\nsystem\n").decode(), "dtype": "|O", "shape": [1]}
    status, answer = http_call(port, "/act", json.dumps({"full_image": packed}))
    assert status == 400 and "dtype '|O'" in answer["error"]


def test_metadata_and_health_are_on_the_same_port(port):
    assert http_call(port, "/metadata") == (200, METADATA)
    assert http_call(port, "/healthz") == (200, "OK\n")
    assert http_call(port, "/act")[0] == 405 and http_call(port, "/nothing")[0] == 404


# -------------------------------------------------------------------------------------------------------- who may ask


def test_nobody_asks_without_the_token_and_health_needs_none():
    with serving(FakePolicy(), token=TOKEN) as port:
        for shown in ({}, {"Authorization": f"Api-Key {TOKEN}x"}, {"Authorization": TOKEN}):
            with pytest.raises(InvalidStatus) as refused, robot(port, additional_headers=shown):
                pass
            assert refused.value.response.status_code == 401
            assert b"expected the header Authorization" in refused.value.response.body
            assert http_call(port, "/act", json_numpy.dumps(oft()), **shown)[0] == 401
            assert http_call(port, "/metadata", **shown)[0] == 401
        assert http_call(port, "/healthz")[0] == 200
        for scheme in ("Api-Key", "Bearer"):
            shown = {"Authorization": f"{scheme} {TOKEN}"}
            assert http_call(port, "/metadata", **shown)[0] == 200
            with robot(port, additional_headers=shown) as (connection, _):
                assert ask(connection)[0, 0] == 3.0


def test_a_web_page_may_not_open_the_websocket(port):
    with pytest.raises(InvalidStatus) as refused, robot(port, origin="http://a.example"):
        pass
    assert refused.value.response.status_code == 403


def test_one_client_too_many_is_told_so_and_the_place_is_free_again():
    with serving(FakePolicy(), limits(max_connections=2)) as port:
        with robot(port), robot(port):
            with pytest.raises(InvalidStatus) as refused, robot(port):
                pass
            assert refused.value.response.status_code == 503
            status, answer = http_call(port, "/act", json_numpy.dumps(oft()))
            assert status == 503 and "2 clients are connected" in answer["error"]
        for _ in range(3):
            assert places_end(port)


def places_end(port: int) -> bool:
    """A client that gets a place; the last ones may still be leaving theirs."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            with robot(port) as (connection, _):
                return bool(ask(connection)[0, 0] == 3.0)
        except InvalidStatus:
            continue
    return False


# --------------------------------------------------------------------------------------------------- slow and gone


@pytest.fixture(scope="module")
def hasty():
    """Port of a server that waits for half a second, and 18 connections at most.

    On a busy machine an honest client of these tests may be late by a tenth."""
    with serving(FakePolicy(), limits(seconds_to_send=0.5, max_connections=2)) as number:
        yield number


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
)
POST = b"POST /act HTTP/1.1\r\nHost: a\r\n"
FRAME = b"\x82\xfe\x10\x00abcd"  # the head of a masked binary frame of 4096 bytes
UNENDING = {
    # kind: what is sent at first, and then again and again
    "nothing": (b"", b""),
    "a header": (b"GET / HTTP/1.1\r\nHost: a\r\n", b"X-A: b\r\n"),
    "a body": (
        b"POST /act HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 4000\r\n\r\n",
        b" ",
    ),
    "a body that is refused": (b"POST /act HTTP/1.1\r\nHost: a\r\nContent-Length: 4000\r\n\r\n", b" "),
    "a chunked body": (
        b"POST /act HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"1\r\n \r\n",
    ),
    "a websocket message": (UPGRADE, FRAME, b"x"),
    "the head of a message": (UPGRADE, b"\x82\xfe", b""),
    "a message in fragments": (UPGRADE, b"\x02\x81abcdx", b"\x00\x81abcdx"),
}


@pytest.mark.parametrize("kind", UNENDING)
def test_what_never_ends_is_ended(hasty, kind):
    *heads, more = UNENDING[kind]
    with socket.create_connection(("127.0.0.1", hasty), timeout=PATIENCE) as client:
        for head in heads:
            client.sendall(head)
            if head == UPGRADE:
                assert b" 101 " in client.recv(65536)
        client.setblocking(False)
        assert ends(client, more), f"{kind}: the connection stayed"
    with robot(hasty) as (connection, _):
        assert ask(connection)[0, 0] == 3.0


def ends(client: socket.socket, more: bytes) -> bool:
    """Whether the other side closes while a byte comes now and then."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(0.02)
        try:
            client.send(more)
            if client.recv(65536) == b"":
                return True
        except BlockingIOError:
            continue
        except OSError:
            return True
    return False


def large(chunk: np.ndarray) -> np.ndarray:
    """An answer of 32 MB, more than the network holds."""
    return np.resize(chunk, (2000, 2000))


@pytest.mark.parametrize("kind", ["websocket", "act"])
def test_a_client_that_takes_no_answers_is_ended(kind):
    servers = []
    with serving(FakePolicy(), limits(seconds_to_send=2.0), shown=large, servers=servers) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
            if kind == "websocket":
                client.sendall(UPGRADE)
                assert b" 101 " in client.recv(65536)
                message = openpi_message()
                client.sendall(b"\x82\xfe" + len(message).to_bytes(2, "big") + bytes(4) + message)  # masked with 0
            else:
                body = json_numpy.dumps(oft()).encode()
                client.sendall(
                    POST + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
                )
            assert client.recv(1)  # the answer is on its way
            end = time.monotonic() + PATIENCE
            while servers[0].server_state.connections:
                assert time.monotonic() < end
                time.sleep(0.02)
        with robot(port) as (connection, _):
            assert ask(connection)[0, 0] == 3.0  # 32 MB, taken


def test_pauses_between_messages_and_pings_are_no_slowness(hasty):
    with robot(hasty) as (connection, _):
        for _ in range(4):
            time.sleep(0.2)  # longer in all than a message may take
            assert connection.ping().wait(PATIENCE)
            assert ask(connection)[0, 0] == 3.0


def test_a_connection_that_asks_nothing_is_closed_at_last():
    with serving(FakePolicy(), limits(seconds_idle=0.1)) as port, robot(port) as (connection, _):
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(PATIENCE)
        assert closed.value.rcvd.code == 1001 and "nothing was asked" in closed.value.rcvd.reason


def test_a_message_of_countless_fragments_is_ended(port):
    with robot(port) as (connection, _), pytest.raises(ConnectionClosed):
        connection.send(b"ab" for _ in range(MAX_FRAGMENTS + 2))
        connection.recv(PATIENCE)


def test_connections_that_say_nothing_do_not_pile_up(hasty):
    clients = [socket.create_connection(("127.0.0.1", hasty), timeout=PATIENCE) for _ in range(40)]
    try:
        assert all(ends(client, b"") for client in quiet(clients))
    finally:
        for client in clients:
            client.close()
    assert places_end(hasty)


def quiet(clients):
    for client in clients:
        client.setblocking(False)
    return clients


@pytest.mark.parametrize("sent", [None, b"", FRAME, FRAME + b"x" * 5000, b"\xff" * 100])
def test_a_client_that_breaks_off_leaves_nothing_behind(port, sent):
    for _ in range(3):
        client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        client.sendall(UPGRADE[:50] if sent is None else UPGRADE)
        if sent is not None:
            assert b" 101 " in client.recv(65536)
            client.sendall(sent)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset
        client.close()


def test_a_client_that_leaves_before_its_answer_spoils_no_other(port, policy):
    policy.arrived.clear()
    policy.go.clear()
    try:
        with robot(port) as (connection, _):
            connection.send(openpi_message(1.0))
            assert policy.arrived.wait(PATIENCE)
            connection.socket.close()
    finally:
        policy.go.set()


# ----------------------------------------------------------------------------------------------------------- health


def healthy(port: int, expected: int) -> str:
    """What `/healthz` says as soon as it has this status."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        status, text = http_call(port, "/healthz")
        if status == expected:
            return text
        time.sleep(0.02)
    pytest.fail(f"/healthz never had the status {expected}")


def test_a_policy_that_hangs_is_told_until_it_goes_on():
    policy = FakePolicy()
    with serving(policy, limits(seconds_to_answer=1.0)) as port, robot(port) as (connection, _):
        assert healthy(port, 200) == "OK\n"
        policy.go.clear()
        try:
            connection.send(openpi_message(1.0))
            assert "one batch for " in healthy(port, 503)
            assert "no answer within 1 s" in connection.recv(PATIENCE)
        finally:
            policy.go.set()
        assert healthy(port, 200) == "OK\n"
        assert ask(connection, 2.0)[0, 0] == 2.0


class Ended(BaseException):
    """What no code expects."""


def test_a_worker_that_has_ended_is_told():
    class Mortal(FakePolicy):
        def predict_many(self, observations):
            raise Ended

    with serving(Mortal(), limits(seconds_to_answer=1.0)) as port, robot(port) as (connection, _):
        assert healthy(port, 200) == "OK\n"
        connection.send(openpi_message(1.0))
        assert "has ended" in healthy(port, 503)


def test_while_a_large_body_is_decoded_others_are_answered(port, monkeypatch):
    begun, go, decode = threading.Event(), threading.Event(), app.from_json

    def slowly(text):
        if len(text) > app.LARGE_BYTES:
            begun.set()
            assert go.wait(PATIENCE)
        return decode(text)

    monkeypatch.setattr(app, "from_json", slowly)
    picture = np.zeros((256, 256, 3), np.uint8)
    body = json_numpy.dumps(
        {"full_image": picture, "wrist_image": picture, "state": np.full(8, 4.0), "instruction": "x"}
    )
    answers = []
    client = threading.Thread(target=lambda: answers.append(http_call(port, "/act", body)))
    client.start()
    try:
        assert begun.wait(PATIENCE)
        with robot(port) as (connection, _):
            assert ask(connection, 7.0)[0, 0] == 7.0 and not answers
    finally:
        go.set()
        client.join(PATIENCE)
    status, chunk = answers[0]
    assert status == 200 and json_numpy.loads(json.dumps(chunk))[0][0] == 4.0


# ------------------------------------------------------------------------------------------------------------- pace


def test_a_second_of_requests_at_once_and_then_the_pace():
    pace = Pace(4.0)
    assert [pace.seconds_to_wait(100.0) for _ in range(6)] == [0, 0, 0, 0, 0.25, 0.5]
    assert pace.seconds_to_wait(101.0) == 0 and pace.seconds_to_wait(101.0) == 0.0
    assert [Pace(0.5).seconds_to_wait(0.0)] == [0]


def test_a_client_that_asks_too_often_waits():
    with serving(FakePolicy(), limits(requests_per_second=20.0)) as port, robot(port) as (connection, _):
        began = time.monotonic()
        for _ in range(30):
            ask(connection)
        assert time.monotonic() - began > 0.4  # 10 of 30 requests wait a twentieth of a second each
