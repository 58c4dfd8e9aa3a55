"""Rates of control runs beside the policy's own: what a success rate is worth is read from both together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.robot.libero.eval_config import EvalConfig, EvalInputError
from prismatic.command_line import split_places
from prismatic.evidence.checks import check_fields, read_object
from prismatic.evidence.episodes import DECISIVE_FIELDS, facts_protocol

_EPISODES = ("seed", "initial_state_offset")
"""Flags by which other analyses pair episodes; a rate alone shows no pairs."""


def protocol(results: dict[str, Any]) -> dict[str, Any]:
    """What a results.json says about how its episodes were run; what it does not say is left out.

    What decides in comparisons of policies, the image size, and which episodes they were. Flags of the policy are no
    part of it: a replay has none.
    """
    config, versions = results.get("config") or {}, results.get("versions") or {}
    said = dict(facts_protocol(results)) | {f"versions.{name}": version for name, version in versions.items()}
    said |= {name: results.get(name) for name in ("render_mode", "language_source")}
    said = {name: value for name, value in said.items() if name in DECISIVE_FIELDS or name == "env_img_res"}
    said |= {name: config.get(name) for name in _EPISODES}
    return {name: value for name, value in said.items() if value is not None}


def read_control_results(cfg: EvalConfig, checkpoint: str) -> list[dict[str, Any]]:
    """The runs named by `--control_results`, for results.json.

    Args:
        cfg: command line of the run they belong to; uses control_results and task_suite_name.
        checkpoint: identity of that run's policy, `path@hash`. Replay uses no policy and needs no match.

    Returns:
        Per run: control ("replay", "grey_images", ..., or "init_noise" for the policy itself on displaced objects),
        init_noise_mm, suite, trials, success_rate, wilson_95, valid, tasks
        ([task id, trials] each), protocol, results (folder).

    Raises:
        EvalInputError: a folder without a readable results.json, of another suite or another checkpoint, or of a run
            that is no control.
    """
    folders = split_places(cfg.control_results)
    return [_read(folder, cfg, checkpoint) for folder in folders]


def _read(folder: str, cfg: EvalConfig, checkpoint: str) -> dict[str, Any]:
    file = Path(folder) / "results.json"
    try:
        found = read_object(file)
        check_fields(found, {"suite": str, "control": str, "checkpoint": str, "overall": dict}, str(file))
        check_fields(found["overall"], {"trials": int, "success_rate": (int, float, type(None))}, str(file))
        check_fields(found["overall"], {"wilson_95": (list, type(None))}, str(file))
        name, suite, overall = found["control"], found["suite"], found["overall"]
        noise = float(found.get("config", {}).get("init_noise_mm", 0.0))
        facts = {key: overall[key] for key in ("trials", "success_rate", "wilson_95")}
        owner, tasks = found["checkpoint"], _trials(found)
        valid, said = bool(found["valid"]), protocol(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise EvalInputError(f"--control_results {folder}: expected a readable results.json: {reason}") from error
    if suite != cfg.task_suite_name:
        raise EvalInputError(f"--control_results {folder}: suite: expected {cfg.task_suite_name}, found {suite}")
    if name == "none" and noise == cfg.init_noise_mm:
        raise EvalInputError(
            f"--control_results {folder}: expected a run with --control or --init_noise_mm, found a run without"
        )
    if name != "replay" and owner.rpartition("@")[2] != checkpoint.rpartition("@")[2]:
        raise EvalInputError(f"--control_results {folder}: checkpoint: expected {checkpoint}, found {owner}")
    label = "init_noise" if name == "none" else name
    head = {"control": label, "init_noise_mm": noise, "suite": suite}
    return head | facts | {"valid": valid, "tasks": tasks, "protocol": said, "results": str(folder)}


def _trials(results: dict[str, Any]) -> list[list[int]]:
    return sorted([task["task_id"], task["trials"]] for task in results["per_task"])


def control_lines(results: dict[str, Any]) -> list[str]:
    """The policy's own rate and, below it, those of its controls, as lines of text.

    Args:
        results: content of results.json; uses control, overall and controls.
    """
    own, how = _trials(results), protocol(results)
    name = "policy" if results["control"] == "none" else results["control"]
    lines = [_line(name, results["overall"])]
    for control in results["controls"]:
        label, shown = control["control"], control["control"]
        if control["init_noise_mm"]:
            shown += f" ({control['init_noise_mm']:g} mm)"
        notes = [] if control["valid"] else ["not a valid run"]
        notes += [] if control["tasks"] == own else ["other tasks or numbers of trials"]
        for field, value in control.get("protocol", {}).items():
            meant = field == "init_noise_mm" and label == "init_noise"
            if field in how and how[field] != value and not meant:
                notes.append(f"{field} {value}, the policy's {how[field]}")
        lines.append(_line(shown, control) + (f"  ({', '.join(notes)})" if notes else ""))
    if not results["controls"]:
        lines.append("controls: none given (--control_results); the rate alone does not show that the policy looks")
    return lines


def _line(label: str, counts: dict[str, Any]) -> str:
    if counts["success_rate"] is None:
        return f"{label}: no trials"
    low, high = counts["wilson_95"]
    return f"{label}: {counts['success_rate']:.4f} of {counts['trials']} ({low:.4f} - {high:.4f})"
