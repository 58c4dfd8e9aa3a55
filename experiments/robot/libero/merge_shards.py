"""Join the results of `--shard 1/n` ... `--shard n/n`.

    python -m experiments.robot.libero.merge_shards results/shard_1 results/shard_2 --output results/whole

Reads `episodes.jsonl`, `plan.json` and `results.json` of each folder; needs no simulator and no checkpoint. Writes the
same three files and the published text log. An episode that several folders hold is kept once: a finished one before an
error, else the first. Exit code: 0 complete and valid; 1 episodes are missing or ended in an error; 2 unusable input.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.robot.libero.eval_log import (
    EpisodeRecord,
    EpisodeStatus,
    OrderedTextLog,
    TaskPlan,
    read_episode_lines,
    summarize_run,
)
from experiments.robot.libero.eval_plan import PLAN_FILE, read_plan, write_plan
from experiments.robot.libero.evaluation import measured_facts
from prismatic.command_line import OneLineParser, UsageError, bad_input_in_one_line
from prismatic.evidence.checks import check_fields, read_object
from prismatic.evidence.episodes import CONTENT_FACTS
from prismatic.evidence.files import write_json, write_text
from prismatic.output_folder import check_folder, held

Key = tuple[str, str, str, int, int, int]


class MergeError(ValueError):
    """A folder that cannot be merged with the others; the message names it."""


def record_key(record: EpisodeRecord) -> Key:
    """Identity of an episode across folders: checkpoint hash, suite, perturbation, task, initial state, seed."""
    checkpoint = record.checkpoint_hash or record.checkpoint.rpartition("@")[2]
    return checkpoint, record.suite, record.perturbation, record.task_id, record.init_idx, record.seed


def deduplicate(records: Iterable[EpisodeRecord]) -> tuple[list[EpisodeRecord], int]:
    """One record per key, sorted by task and initial state.

    Returns:
        (records, number of keys with finished records that disagree on status or steps; the first counts).
    """
    kept: dict[Key, EpisodeRecord] = {}
    conflicts: set[Key] = set()
    for record in records:
        key = record_key(record)
        before = kept.get(key)
        if before is None or (before.status is EpisodeStatus.ERROR and record.status is not EpisodeStatus.ERROR):
            kept[key] = record
        elif record.status is not EpisodeStatus.ERROR and (before.status, before.steps) != (
            record.status,
            record.steps,
        ):
            conflicts.add(key)
    return sorted(kept.values(), key=lambda record: record.key), len(conflicts)


def merge(folders: Sequence[Path], output: Path) -> dict[str, Any]:
    """Write the joined files into `output` (which must not hold episodes yet).

    Returns:
        The content of results.json.

    Raises:
        MergeError: a folder without records, or of a run with other settings or another plan.
        UsageError: `output` cannot be written to.
    """
    check_folder(output, "--output")
    with held(output, "--output"):
        return _merge(folders, output)


def _merge(folders: Sequence[Path], output: Path) -> dict[str, Any]:
    if (output / "episodes.jsonl").exists():
        raise MergeError(f"--output {output}: expected a new folder, found episodes.jsonl in it")
    records, plans, heads = _read_all(folders)
    merged, conflicts = deduplicate(records)
    output.mkdir(parents=True, exist_ok=True)
    text = "".join(record.to_json() + "\n" for record in merged)
    write_text(output / "episodes.jsonl", text)
    write_plan(output / PLAN_FILE, plans)
    summary = summarize_run(plans, {record.key: record for record in merged})
    own = {"merged_from": [str(folder) for folder in folders], "conflicts": conflicts}
    results = _head(heads[0]) | summary | measured_facts(merged) | own | {"config": heads[0].get("config")}
    if conflicts:
        results["valid"] = False
    _write_text_log(output, plans, merged, results)
    write_json(output / "results.json", results, ensure_ascii=False)
    return results


def _read_all(folders: Sequence[Path]) -> tuple[list[EpisodeRecord], list[TaskPlan], list[dict[str, Any]]]:
    records, plans, heads = [], [], []
    for folder in folders:
        try:
            found, _ = read_episode_lines(folder / "episodes.jsonl")
            plans.append(read_plan(folder / PLAN_FILE))
            heads.append(_read_head(folder / "results.json"))
        except (OSError, ValueError) as error:
            raise MergeError(f"{folder}: expected the results of an evaluation: {error}") from error
        records += found
        if plans[-1] != plans[0]:
            raise MergeError(f"{folder}: {PLAN_FILE}: expected the same episodes as in {folders[0]}, found others")
        for record in found:
            if record.fingerprint != records[0].fingerprint:
                raise MergeError(
                    f"{folder}: fingerprint: expected {records[0].fingerprint} as in {folders[0]}, found "
                    f"{record.fingerprint}: another checkpoint or other settings"
                )
    if not records:
        raise MergeError(f"{', '.join(map(str, folders))}: expected episodes, found none")
    return records, plans[0], heads


def _read_head(path: Path) -> dict[str, Any]:
    head = read_object(path)
    missing = [name for name in ("run_id", "suite") if name not in head]
    if missing:
        raise ValueError(f"{path}: missing fields {missing}")
    check_fields(head, {"run_id": str, "suite": str, "config": (dict, type(None))}, str(path))
    if not _FILE_NAME.fullmatch(head["run_id"]):  # it names the text log
        raise ValueError(f"{path}: run_id: found {head['run_id'][:60]!r}, expected a name without separators")
    return head


_FILE_NAME = re.compile(r"(?!\.)[^/\\\x00-\x1f]{1,200}")


def _head(results: dict[str, Any]) -> dict[str, Any]:
    """What the shards share."""
    names = ("run_id", "suite", "control", "checkpoint", "fingerprint", "versions", "policy_metadata", "render_mode")
    return {name: results[name] for name in (*names, "env_img_res", *CONTENT_FACTS.values()) if name in results}


def _write_text_log(output: Path, plans: list[TaskPlan], records: list[EpisodeRecord], results: dict[str, Any]) -> None:
    """The published lines, up to the first missing episode."""
    states = (results["config"] or {}).get("initial_states_path", "DEFAULT")
    with open(output / f"{results['run_id']}--merged.txt", "w", encoding="utf-8") as file:
        log = OrderedTextLog(plans, states, lambda line: file.write(line + "\n"))
        log.begin(results["suite"])
        for record in records:
            log.add(record)
        if results["complete"]:
            log.finish()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="results folders of the shards")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    args = parser.parse_args(arguments)
    try:
        results = merge(args.folders, args.output)
    except (MergeError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    overall = results["overall"]
    print(f"{overall['successes']} of {overall['trials']} episodes succeeded; {results['missing']} missing, ", end="")
    print(f"{overall['errors']} errors, {results['conflicts']} conflicts: {args.output / 'results.json'}")
    return 0 if results["valid"] else 1


if __name__ == "__main__":
    with bad_input_in_one_line("merge_shards"):
        sys.exit(main())
