"""Why there is no success rate."""

from __future__ import annotations

from enum import Enum


class FailureCode(str, Enum):
    """Why a suite has no success rate; written in place of the number."""

    TRAINING_FAILED = "TRAINING_FAILED"
    NO_CHECKPOINT = "NO_CHECKPOINT"
    EVAL_FAILED = "EVAL_FAILED"
    PARSE_FAILED = "PARSE_FAILED"
