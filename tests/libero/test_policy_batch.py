"""Several observations in one forward pass of the small released policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.robot.policy import Request, VLAPolicy

CHECKPOINT = Path(__file__).parents[2] / "pretrained_models" / "tiny-libero-object"


@pytest.fixture(scope="module")
def policy() -> VLAPolicy:
    return VLAPolicy.from_checkpoint(CHECKPOINT, unnorm_key="libero_object_scripted_no_noops")


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    made = []
    for thing in ("milk", "alphabet soup", "milk", "cream cheese"):
        image, wrist = rng.integers(0, 256, (2, 12, 12, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
        made.append((image, wrist, rng.normal(0, 0.1, 8), f"pick up the {thing} and place it in the basket"))
    return made


def test_a_batch_gives_each_its_own_actions(policy, requests):
    alone = [policy.predict(*request) for request in requests]
    together = policy.predict_batch(requests)
    assert len(together) == 4 and together[0].shape == (8, 7) and together[0].dtype == np.float64
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    assert min(np.abs(alone[i] - alone[j]).max() for i in range(4) for j in range(i)) > 1e-3


def test_alone_the_answer_does_not_depend_on_what_came_before(policy, requests):
    first = policy.predict(*requests[0])
    policy.predict_batch(requests)
    np.testing.assert_array_equal(policy.predict(*requests[0]), first)
    np.testing.assert_array_equal(policy.predict_batch(requests[:1])[0], first)
    assert policy.predict_batch([]) == []
