"""Warnings about a measured data set: what was found, and what a policy would expect."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

GRIPPER_VALUES = {"-1", "1"}
MAX_ACTION = 1.0  # the simulator's controller clips there
MAX_NOOP_SHARE = 0.01
# Tools point down, so that LIBERO's rotations are close to pi: on both sides of it, without jumps (shipped data sets:
# 37 % and 48 % above, at most 0.1 rad per step). Folding quaternions to w >= 0 caps the angle at pi and turns the axis.
_NEAR_PI = 0.02
_TRAILING_DIGITS = re.compile(r"\d\s*$")

Finding = tuple[str, str, str]


def find_problems(report: dict) -> list[dict[str, str]]:
    """Warnings [{check, found, expected}] for a report of `measure`; empty when nothing stands out."""
    checks = [*_check_texts(report), *_check_numbers(report), *_check_episodes(report)]
    for camera, content in report["cameras"].items():
        checks.extend(_check_camera(camera, content))
    if report["conventions"] == "libero":
        checks.extend(_check_libero_actions(report))
        checks.extend(_check_rotation(report["rotation"]))
    return [{"check": check, "found": found, "expected": expected} for check, found, expected in checks]


def _check_texts(report: dict) -> Iterator[Finding]:
    for text, count in report["instructions"].items():
        if not text.strip():
            yield "empty instruction", f"{count} episodes with {text!r}", "a text in every episode"
        elif _TRAILING_DIGITS.search(text):
            yield "instruction ends in digits", f"{text!r}", "words only: a task number or file name left in the text?"


def _check_numbers(report: dict) -> Iterator[Finding]:
    for group in ("action", "state"):
        content = report[group]
        if content["not_finite"]:
            first = content["not_finite_at"][0]
            found = f"{content['not_finite']} values, first at (episode, step, dim) {tuple(first)}"
            yield f"{group} not finite", found, "finite numbers"


def _check_episodes(report: dict) -> Iterator[Finding]:
    if not report["episodes"]:
        yield "no episodes", "0 episodes", "at least one"
    if report["short_episodes"]:
        yield (
            "short episodes",
            f"{len(report['short_episodes'])} episodes, first {report['short_episodes'][0]}",
            f"at least one chunk of {report['chunk_len']} steps",
        )
    for group in report["duplicates"]:
        yield "duplicate episodes", f"episodes {group} have equal actions and states", "different episodes"


def _check_camera(camera: str, content: dict) -> Iterator[Finding]:
    if content["undecodable"]:
        episode, step, error = content["undecodable_at"][0]
        found = f"{camera}: {content['undecodable']} images, first at episode {episode}, step {step}: {error}"
        yield "images do not decode", found, "RGB images"
    if len(content["sizes"]) > 1:
        yield "image sizes differ", f"{camera}: {content['sizes']} (width x height: frames)", "one size"
    if content["constant"]:
        found = f"{camera}: {content['constant']} images of one colour, first at (episode, step) "
        yield "constant images", found + str(tuple(content["constant_at"][0])), "pictures"
    if content["frozen_episodes"]:
        found = f"{camera}: all looked-at images are equal in episodes {content['frozen_episodes'][:5]}"
        yield "camera stands still", found, "images that change"


def _check_libero_actions(report: dict) -> Iterator[Finding]:
    strange = {value: count for value, count in report["gripper"].items() if value not in GRIPPER_VALUES}
    if strange:
        yield "gripper values", f"{strange} (value: frames)", "-1 (open) and 1 (close)"
    action = report["action"]
    if action["dimensions"] != 7 or report["state"]["dimensions"] != 8:
        found = f"{action['dimensions']} action and {report['state']['dimensions']} state dimensions"
        yield "dimensions", found, "7 and 8"
        return
    for dim in range(6):
        low, high = action["min"][dim], action["max"][dim]
        if low is not None and max(-low, high) > MAX_ACTION + 1e-6:
            yield (
                "action range",
                f"dimension {dim}: {low:.4g} .. {high:.4g}",
                f"within -{MAX_ACTION:g} .. {MAX_ACTION:g}",
            )
    noops = report["noops"]
    if noops and noops["share"] > MAX_NOOP_SHARE:
        found = f"{noops['count']} steps, {noops['share']:.1%}"
        yield "no-ops", found, f"at most {MAX_NOOP_SHARE:.0%}: policies learn to stand still from them"


def _check_rotation(rotation: dict | None) -> Iterator[Finding]:
    if rotation is None:
        return
    if rotation["norm_max"] > 2 * math.pi + 1e-3:
        found = f"state 3:6 has norms up to {rotation['norm_max']:.4g}"
        yield "rotation is no axis-angle", found, "at most 2 pi"
    folded = math.pi - _NEAR_PI < rotation["norm_max"] <= math.pi + 1e-6
    if rotation["largest_step"] > math.pi or folded:
        found = (
            f"norm of state 3:6 up to {rotation['norm_max']:.4f}, {rotation['share_above_pi']:.1%} above pi, changes "
            f"of up to {rotation['largest_step']:.3g} rad within a step"
        )
        yield (
            "rotation looks folded",
            found,
            "both sides of pi without jumps, as the simulator's unfolded quaternions give",
        )
