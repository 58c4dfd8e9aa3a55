"""The load test: it sees a server that is wrong, and its page says what was measured."""

import multiprocessing
import socket

import numpy as np
import pytest
import serving_load
from serving_fixtures import FakePolicy, limits, serving


class Steady(FakePolicy):
    def check(self, observation) -> None:
        if not np.isfinite(observation.state).all():
            raise ValueError("not finite, expected finite")


class Forgetful(Steady):
    """Says something else every time."""

    def predict_many(self, observations):
        return [chunk + len(self.batches) for chunk in super().predict_many(observations)]


def outcome(policy, requests: int = 160) -> serving_load.Client:
    with serving(policy, limits(seconds_to_send=0.5)) as port:
        client = serving_load.Client(port, 0)
        client.run(requests, multiprocessing.Value("i", 0))
    return client


def test_every_kind_of_mistake_is_made_and_a_good_server_is_not_accused():
    client = outcome(Steady())
    assert client.wrong == []
    assert set(client.outcomes) == {"answered", "answered after a mistake", *client.mistakes}
    assert client.outcomes["answered"] == 152 == len(client.milliseconds)


def test_other_answers_than_before_are_seen():
    assert set(outcome(Forgetful(), 19).wrong) == {"another answer than before"}


def test_a_mistake_that_is_answered_is_seen(monkeypatch):
    policy = Steady()
    monkeypatch.setattr(policy, "check", lambda observation: None)
    monkeypatch.setattr(policy, "predict_many", lambda seen: [np.zeros((8, 7)) for _ in seen])
    assert set(outcome(policy).wrong) == {"a mistake was answered with actions"}


def test_a_connection_that_stays_open_is_seen(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as place:
        raw = socket.create_connection(place.getsockname(), timeout=0.05)
        other, _ = place.accept()
        with other:
            assert not serving_load.is_closed(raw)
        raw = socket.create_connection(place.getsockname(), timeout=5)
        place.accept()[0].close()
        assert serving_load.is_closed(raw)


def test_memory_is_compared_between_warm_and_end():
    samples = [(0, 900.0), (15, 100.0), (50, 110.0), (95, 120.0), (100, 130.0)]
    assert serving_load.memory_at(samples, 100) == {"warm": 100.0, "middle": 110.0, "end": 125.0, "most": 900.0}


@pytest.mark.parametrize("wrong", [[], ["the server ended"]])
def test_the_page_says_what_was_measured(wrong):
    outcomes = {"answered": 95, "answered after a mistake": 5, "no camera": 5}
    record = {
        "requests": 100,
        "clients": 2,
        "seconds": 10.0,
        "outcomes": outcomes,
        "wrong": wrong,
        "milliseconds": {"p50": 10.4, "p95": 20.0, "p99": 30.0},
        "latency_ms": 5.0,
        "latency_full_batch_ms": 9.0,
        "megabytes": {"warm": 400.0, "middle": 401.0, "end": 402.0, "most": 410.0},
        "cores": 1,
    }
    text = serving_load.page(record)
    assert "100 requests of 2 clients, 5 of them such" in text and "on 1 core together" in text
    assert "| requests/s | 10.0 |" in text and "| 10, 20, 30 |" in text and "| 400, 401, 402 |" in text
    assert ("Nothing was wrong." in text) == (not wrong) and ("**Wrong: 1 times.**" in text) == bool(wrong)
