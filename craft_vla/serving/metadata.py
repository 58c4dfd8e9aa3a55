"""What a server tells its clients about the policy."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from craft_vla.policy import Observation, Policy
from craft_vla.serving.limits import Limits
from prismatic.evidence.hashes import content_hash
from prismatic.training.recorded_convention import recorded_convention

PROTOCOL_VERSION = 1
"""Of these metadata. It grows when a client that reads them must change."""
GREY = 128
_MANY_SENTENCES = 100
_LIBERO_ACTIONS = "position deltas and axis-angle deltas as LIBERO's controller takes them, then the gripper"
_LIBERO_STATE = "end-effector position (m), axis-angle (rad), gripper joint positions (m)"
_DATA_GRIPPER = "0 to 1, 1 = open"
_SIMULATOR_GRIPPER = "-1 = open, +1 = close"
_OWN = "of the training data, as their standardize returned them"


def is_libero(policy: Policy) -> bool:
    """Whether the policy's actions are in LIBERO's convention, which says what the gripper's numbers mean."""
    return bool((recorded_convention(policy.metadata, policy.unnorm_key) or {}).get("libero"))


def describe(policy: Policy, limits: Limits, as_simulator: bool) -> dict[str, Any]:
    """The metadata, of text, numbers, lists and maps alone.

    as_simulator: actions are sent in the simulator's convention. Reads the checkpoint's files and asks the policy a few
    times, to know its latency.
    """
    manifest, spec = policy.metadata, policy.action_spec
    convention = recorded_convention(manifest, policy.unnorm_key) or {}
    libero, size = is_libero(policy), policy.image_spec.size
    gripper = (_SIMULATOR_GRIPPER if as_simulator else _DATA_GRIPPER) if libero else _OWN
    alone, together = latency_ms(policy, 1), latency_ms(policy, limits.max_batch)
    return {
        "protocol": {"name": "craft-vla", "version": PROTOCOL_VERSION},
        "actions": {
            "size": spec.action_dim,
            "chunk": spec.chunk_len,
            "units": _LIBERO_ACTIONS if libero else _OWN,
            "gripper": gripper,
            "control_hz": convention.get("control_hz"),
        },
        "cameras": [{"name": name, "resized_to": [size, size]} for name in policy.cameras],
        "state": {
            "size": spec.proprio_dim if policy.uses_state else 0,
            "layout": _LIBERO_STATE if libero else _OWN,
        },
        "instruction": {
            "language": manifest.get("instruction_language"),
            "trained": ((manifest.get("instructions") or {}).get(policy.unnorm_key) or [])[:_MANY_SENTENCES],
        },
        "unnorm_key": policy.unnorm_key,
        "checkpoint": {
            "hash": content_hash(manifest["path"], "training_state"),
            "step": manifest.get("step"),
            "origin": manifest.get("origin"),
        },
        "retention": retention(manifest),
        "latency_ms": alone,
        "latency_full_batch_ms": together,
        "keeps_state": False,
        "limits": {"message_bytes": limits.message_bytes, "requests_per_second": limits.requests_per_second},
    }


def retention(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Budget and achieved drift of a constrained training; None for others."""
    record = manifest.get("craft")
    if not isinstance(record, dict) or "achieved_drift" not in record:
        return None
    settings = record.get("config") or {}
    return {
        "budget": settings.get("retention_budget"),
        "achieved_drift": record["achieved_drift"],
        "held": settings.get("signal"),
    }


def latency_ms(policy: Policy, batch: int, rounds: int = 5) -> float:
    """Milliseconds from observations to actions for a batch: the median of some, after one that is not counted."""
    size = policy.image_spec.size
    images = {name: np.full((size, size, 3), GREY, np.uint8) for name in policy.cameras}
    asked = [Observation(images, np.zeros(policy.action_spec.proprio_dim), "pick up the bowl")] * batch
    taken = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        policy.predict_many(asked)
        taken.append(1000 * (time.perf_counter() - began))
    return round(float(np.median(taken[1:])), 2)
