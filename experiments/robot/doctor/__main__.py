"""Check an installation, a checkpoint and its data before believing a success rate.

    python -m experiments.robot.doctor [--checkpoint DIR] [--data DIR] [--quick] [--json FILE]

Prints one line per check. Exit code 1 when a check failed, 2 when an argument cannot be used.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from experiments.robot.doctor.findings import Check, Finding, exit_code
from experiments.robot.libero.modes import RenderMode
from experiments.robot.libero.suite_names import BASE_SUITES, nearest_suite, split_suite
from prismatic.command_line import OneLineParser, bad_input_in_one_line, in_range
from prismatic.evidence.files import write_json
from prismatic.model_files import BASE_CHECKPOINT, ROBOT_PLATFORM
from prismatic.output_folder import check_file
from prismatic.progress import Progress, say
from prismatic.vla.datasets.format_table import PLACE

SHIPPED_DATA = Path(__file__).parents[3] / "datasets" / "rlds" / "libero_object_scripted_no_noops"
"""Scripted demonstrations of a source checkout; an installed package has none."""


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = OneLineParser(prog="python -m experiments.robot.doctor", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--checkpoint", help="checkpoint folder; without it, statistics, crop, images and attention are not checked")
    add("--data", help=f"folder of the training's data set (default: the shipped demonstrations, if any); {PLACE}")
    add("--suite", help="suite to be evaluated (default: that of the data)")
    add("--unnorm_key", help="key of the normalisation statistics (default: by the suite's name)")
    add("--num_images_in_input", type=in_range(int, at_least=1), help="images per sample of a published checkpoint")
    add("--data_set_file", help="Python file that registers data sets of your own (docs/datasets.md)")
    add("--robot_platform", help=ROBOT_PLATFORM)
    add("--base_checkpoint", help=BASE_CHECKPOINT)
    add("--render_mode", choices=[m.value for m in RenderMode], help="of the colour check (default: that of --data)")
    add("--quick", action="store_true", help="nothing that renders: no colours, no image comparison, no replay")
    add("--json", help="also write the findings to this file")
    return parser


def collect_checks(args: argparse.Namespace) -> list[Check]:
    """The checks that the arguments ask for, cheap ones first. Raises FileNotFoundError, ValueError, KeyError."""
    from experiments.robot.doctor.conventions import convention_checks
    from experiments.robot.doctor.data_checks import data_checks, replay_check
    from experiments.robot.doctor.demonstrations import open_data_set, recorded_starts
    from experiments.robot.doctor.installation import surroundings_checks, version_checks
    from experiments.robot.doctor.simulator_checks import physics_checks, render_checks
    from prismatic.vla.datasets.registry import load_data_set_file

    if args.data_set_file is not None:
        load_data_set_file(args.data_set_file)
    shipped = open_data_set(SHIPPED_DATA) if SHIPPED_DATA.is_dir() else None
    data = open_data_set(args.data) if args.data else shipped
    checks = version_checks() + surroundings_checks() + convention_checks()
    if args.checkpoint:
        checks += _checkpoint_checks(args, data)
    checks += physics_checks()
    recorded = data.metadata.get("render_mode") if args.data and data is not None else None
    mode = RenderMode(args.render_mode or recorded or RenderMode.PUBLISHED.value)
    if data is not None:
        found = data_checks(data)
        checks += found[:2] if args.quick else found
    if not args.quick:
        checks += render_checks(mode)
        replayable = next((d for d in (data, shipped) if d is not None and len(recorded_starts(d)) > 1), None)
        if replayable is not None:
            checks.append(replay_check(replayable))
    return checks


def _checkpoint_checks(args: argparse.Namespace, data: Any) -> list[Check]:
    from experiments.robot.doctor.checkpoint_checks import Wanted, checkpoint_checks
    from prismatic.training.checkpoints import load_checkpoint

    loaded = load_checkpoint(args.checkpoint, args.num_images_in_input, args.base_checkpoint, args.robot_platform)
    suite = args.suite or (data.suite if args.data else None)
    known = data is not None and bool(args.data)  # the shipped demonstrations are not what it was trained on
    wanted = Wanted(suite, args.unnorm_key, data.name if known else None, data.statistics() if known else None)
    return checkpoint_checks(loaded, wanted)


def _check_arguments(args: argparse.Namespace) -> None:
    if args.suite is not None and split_suite(args.suite)[0] is None:
        raise ValueError(f"--suite: unknown LIBERO suite {args.suite!r}{nearest_suite(args.suite, BASE_SUITES)}")
    if args.json is not None:
        if not os.path.isdir(os.path.dirname(args.json) or "."):
            raise ValueError(f"--json {args.json}: expected the name of a file in an existing folder")
        check_file(args.json, "--json")


def write_findings(file: str, findings: list[Finding]) -> None:
    """JSON: {"healthy": bool, "findings": [{name, status, found, expected, cost}]}."""
    content = {"healthy": exit_code(findings) == 0, "findings": [finding.to_dict() for finding in findings]}
    write_json(file, content, ensure_ascii=False)


def main(argv: list[str] | None = None) -> int:
    """Run the checks and print each as it ends."""
    args = build_parser().parse_args(argv)
    with bad_input_in_one_line("doctor"):
        _check_arguments(args)
        checks = collect_checks(args)
    findings = []
    with Progress(len(checks), "checking", "checks", note=checks[0].name) as progress:
        for check, following in zip(checks, [*checks[1:], None], strict=True):
            findings.append(check.run())
            say(findings[-1].line())
            progress.advance(note="" if following is None else following.name)
    counts = {
        name: sum(finding.status.value == name for finding in findings) for name in ("ok", "warn", "fail", "skip")
    }
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    if args.json:
        write_findings(args.json, findings)
    return exit_code(findings)


if __name__ == "__main__":
    sys.exit(main())
