"""Serving a checkpoint to vla-eval: what is read from an observation, and a round trip with the real package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.robot.libero.controls import to_simulator_actions
from experiments.robot.policy import VLAPolicy
from experiments.robot.serve_vla_eval import policy_inputs, server_class

CHECKPOINT = Path(__file__).parents[2] / "pretrained_models" / "tiny-libero-object"


def observation() -> dict:
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for name in ("agentview", "wrist")}
    state = np.array([0.0, 0.1, 0.2, 3.2, 0.1, 0.0, 0.03, -0.03])
    return {"images": images, "states": state, "task_description": "pick up the milk and place it in the basket"}


def test_observation_is_read_in_the_order_of_the_cameras():
    obs = observation()
    image, wrist, state, instruction = policy_inputs(obs, 2)
    assert image is obs["images"]["agentview"] and wrist is obs["images"]["wrist"]
    assert (state == obs["states"]).all() and instruction == obs["task_description"]
    assert policy_inputs(obs, 1)[1] is image


def test_missing_camera_and_state_are_named():
    obs = observation()
    del obs["images"]["wrist"]
    with pytest.raises(ValueError, match=r"expected 2 cameras, found \['agentview'\]"):
        policy_inputs(obs, 2)
    with pytest.raises(ValueError, match=r"states: expected .* found \(7,\)"):
        policy_inputs(observation() | {"states": np.zeros(7)}, 2)


@pytest.mark.slow
def test_a_client_gets_the_actions_of_the_policy_one_by_one():
    pytest.importorskip("vla_eval")
    import anyio
    from vla_eval.connection import Connection
    from vla_eval.model_servers.serve import serve_async

    server = server_class()(str(CHECKPOINT))
    obs, received = observation(), []

    async def run() -> None:
        async with anyio.create_task_group() as group:
            port = await group.start(serve_async, server, "127.0.0.1", 0)
            async with Connection(f"ws://127.0.0.1:{port}") as client:
                await client.start_episode({"task": {"name": obs["task_description"]}})
                for _ in range(9):  # the ninth comes from a second query
                    received.append(np.asarray((await client.act(obs))["actions"]))
                await client.end_episode({"success": False})
            group.cancel_scope.cancel()

    anyio.run(run)
    expected = to_simulator_actions(VLAPolicy.from_checkpoint(CHECKPOINT).predict(*policy_inputs(obs, 2)))
    assert [action.shape for action in received] == [(7,)] * 9
    np.testing.assert_allclose(received[:8], expected, atol=1e-6)
    np.testing.assert_allclose(received[8], expected[0], atol=1e-6)


@pytest.mark.slow
def test_declared_interface_fits_the_libero_benchmark():
    pytest.importorskip("vla_eval")
    from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark
    from vla_eval.specs import check_specs

    server = server_class()(str(CHECKPOINT))
    benchmark = LIBEROBenchmark(suite="libero_object", **server.get_observation_params())
    specs = server.get_action_spec(), benchmark.get_action_spec()
    assert check_specs(*specs, server.get_observation_spec(), benchmark.get_observation_spec()) == []
