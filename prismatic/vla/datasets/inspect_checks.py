"""Warnings about a measured data set: what was found, and what a policy would expect.

Contradictions to the conventions that the data set is registered with are not opened for training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from prismatic.vla.datasets.inspect_measures import interpret, measure_content
from prismatic.vla.datasets.registry import DataSetConfig
from prismatic.vla.datasets.source import DataSetError, EpisodeSource

CONTRADICTIONS = (
    "gripper convention",
    "gripper sign",
    "action convention",
    "rotation is no axis-angle",
    "rotation is a quaternion",
)
MAX_ACTION = 1.0  # the simulator's controller clips there
MAX_BEYOND = 0.1  # share of the frames beyond it: more is another unit
SMALL_ACTION = 0.02  # no demonstration moves that little; deltas in metres and radians do
MAX_OUTSIDE = 0.01  # share of gripper commands beyond both
MAX_NOOP_SHARE = 0.01
# Tools point down, so that LIBERO's rotations are close to pi: on both sides of it, without jumps (shipped data sets:
# 37 % and 48 % above, at most 0.1 rad per step). Folding quaternions to w >= 0 caps the angle at pi and turns the axis.
_NEAR_PI = 0.02
_TRAILING_DIGITS = re.compile(r"\d\s*$")

_TRAINING_IMAGES = 24  # decoded per camera
_CONTENT_VERSION = 1  # of what is kept with the index
_ELSEWHERE = ("empty instruction", "no episodes", "short episodes", "state not finite", "action not finite")
Finding = tuple[str, str, str]


def find_problems(report: dict) -> list[dict[str, Any]]:
    """Warnings [{check, found, expected, contradiction}] for a report of `measure`; empty when nothing stands out."""
    checks = [*_check_texts(report), *_check_numbers(report), *_check_episodes(report)]
    for camera, content in report["cameras"].items():
        checks.extend(_check_camera(camera, content))
    if report["conventions"] == "libero":
        if report["gripper_use"] is not None:
            checks.extend(_check_gripper(report))
            checks.extend(_check_libero_actions(report))
        checks.extend(_check_rotation(report["rotation"]))
    rates = report["recorded_hz"], report["control_hz"]
    if None not in rates and abs(rates[0] - rates[1]) > 0.01 * rates[1]:
        checks.append(("control rate", f"{rates[0]:g} Hz in the files", f"{rates[1]:g} Hz, as registered"))
    return [
        {"check": check, "found": found, "expected": expected, "contradiction": check in CONTRADICTIONS}
        for check, found, expected in checks
    ]


def check_for_training(source: EpisodeSource, config: DataSetConfig, data_set: str) -> list[str]:
    """Lines about what stands out in a data set that is opened for training; its images are looked at once.

    Raises DataSetError for what contradicts the conventions of `config`, with what to do.
    """
    kind = "observations" if source.keys.action is None else "measures"
    content = source.cached(f"{kind}-{_CONTENT_VERSION}", lambda: measure_content(source, _TRAINING_IMAGES))
    report = interpret(content, source, config) | {"data_set": data_set}
    lines: dict[bool, list[str]] = {True: [], False: []}
    for entry in find_problems(report):
        if entry["check"] not in _ELSEWHERE:
            line = f"{entry['check']}: found {entry['found']}; expected {entry['expected']}"
            lines[entry["contradiction"]].append(line)
    if lines[True]:
        raise DataSetError(
            f"{data_set}: the data contradict the conventions they are registered with: {'; '.join(lines[True])}. "
            "If they are right, register them with their own in a --data_set_file (docs/datasets.md, Conventions)"
        )
    return lines[False]


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
    unreadable = list(report.get("unreadable", {}).values())
    if unreadable:
        yield "unreadable episodes", f"{len(unreadable)}, first: {unreadable[0]}", "none (--skip_bad_episodes True)"
    for line in report.get("notes", []):
        yield "contradiction in the files", line, "files that agree; not needed to read them"
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
    if content["grey"] > content["constant"] and content["grey"] == content["decoded"]:
        yield "grey images", f"{camera}: all {content['grey']} images have three equal channels", "colours"
    if content["frozen_episodes"]:
        found = f"{camera}: all looked-at images are equal in episodes {content['frozen_episodes'][:5]}"
        yield "camera stands still", found, "images that change"


def _check_gripper(report: dict) -> Iterator[Finding]:
    use, data_set = report["gripper_use"], report["data_set"]
    opens, closes = use["opens"], use["closes"]
    expected = f"{opens:g} (open) and {closes:g} (close)"
    values = f"values from {use['low']:g} to {use['high']:g}" if use["low"] is not None else "no values"
    both = use["opening"] > 0 and use["closing"] > 0
    if use["outside"] > MAX_OUTSIDE or not (both or use["constant"]):
        yield "gripper convention", f"{values}{_motion(use)}", f"{expected}{_way_out(use, data_set)}"
    elif use["reversed"]:
        yield "gripper sign", f"{values}{_motion(use)}", f"{expected}{_way_out(use, data_set)}"
    elif use["others"] or use["outside"]:
        strange = {v: n for v, n in report["gripper"].items() if v not in (f"{opens:g}", f"{closes:g}")}
        yield "gripper values", f"{strange} (value: frames), {values}", expected
    elif use["constant"]:
        yield "gripper values", f"{use['low']:g} in every frame", expected


def _motion(use: dict) -> str:
    if use["opens_when_high"] is None:
        return ""
    return f", and the fingers are open under the {'higher' if use['opens_when_high'] else 'lower'} ones"


def _way_out(use: dict, data_set: str) -> str:
    """The registration under which these values would be right, as far as they tell."""
    low, high = use["low"], use["high"]
    if low is None or low == high:
        return ""
    one_opens = use["opens_when_high"] is not False
    opens, closes = (high, low) if one_opens else (low, high)
    text = f"; for these values: register_data_set({data_set!r}, libero_config(opens={opens:g}, closes={closes:g}))"
    return text if use["opens_when_high"] is not None else f"{text}, or opens and closes exchanged"


def _check_libero_actions(report: dict) -> Iterator[Finding]:
    action = report["action"]
    if action["dimensions"] != 7 or report["state"]["dimensions"] != 8:
        found = f"{action['dimensions']} action and {report['state']['dimensions']} state dimensions"
        yield "dimensions", found, "7 and 8"
        return
    limits = f"within -{MAX_ACTION:g} .. {MAX_ACTION:g}"
    largest = 0.0
    for dim in range(6):
        low, high = action["min"][dim], action["max"][dim]
        if low is None:
            continue
        largest = max(largest, -low, high)
        found = f"dimension {dim}: {low:.4g} .. {high:.4g}"
        if action["beyond_1"][dim] > MAX_BEYOND:
            expected = f"{limits}, commands of LIBERO's controller (neither poses nor degrees)"
            yield "action convention", f"{found}, {action['beyond_1'][dim]:.0%} of the frames beyond", expected
        elif max(-low, high) > MAX_ACTION + 1e-6:
            yield "action range", found, limits
    if 0 < largest < SMALL_ACTION:
        yield "action range", f"nothing beyond {largest:.3g}: metres and radians?", f"commands of up to {MAX_ACTION:g}"
    noops = report["noops"]
    if noops and noops["share"] > MAX_NOOP_SHARE:
        found = f"{noops['count']} steps, {noops['share']:.1%}"
        yield "no-ops", found, f"at most {MAX_NOOP_SHARE:.0%}: policies learn to stand still from them"


def _check_rotation(rotation: dict | None) -> Iterator[Finding]:
    if rotation is None:
        return
    if rotation["norm_max"] > 2 * math.pi + 1e-3:
        found = f"state 3:6 has norms up to {rotation['norm_max']:.4g}"
        yield "rotation is no axis-angle", found, "at most 2 pi (radians)"
    if rotation["quaternion"]:
        yield "rotation is a quaternion", "state 3:7 has norm 1 in every frame", "axis-angle (3) and gripper joints (2)"
        return
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
