"""Evaluate a checkpoint on a LIBERO suite.

    python experiments/robot/libero/run_libero_eval.py --pretrained_checkpoint runs/...--20000_chkpt \
        --task_suite_name libero_spatial --num_trials_per_task 50 --num_workers 4

Writes `<local_log_dir>/EVAL-<suite>-<model_family>-<time>.txt`, `episodes.jsonl`, `results.json` and rollout videos.
Exit code: 0 the result is valid; 1 an episode ended in an error, or the run stopped; 2 the command line is unusable.
"""

from __future__ import annotations

import sys

from prismatic.command_line import UsageError, bad_input_in_one_line


def main() -> int:
    """Parse the command line, evaluate, report the outcome as exit code."""
    from experiments.robot.libero.control_results import control_lines
    from experiments.robot.libero.eval_config import parse_flags
    from experiments.robot.libero.evaluation import evaluate
    from experiments.robot.libero.surroundings import SimulatorUnavailableError

    with bad_input_in_one_line("run_libero_eval.py", (UsageError, SimulatorUnavailableError)):
        results = evaluate(parse_flags())
    if not results["valid"]:
        print(f"error: {results['overall']['errors']} episodes ended in an error: no valid result", file=sys.stderr)
        return 1
    print("success rate, trials and 95 % interval (Wilson)")
    print("\n".join(control_lines(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
