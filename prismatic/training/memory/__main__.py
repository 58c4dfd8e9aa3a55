"""Predict the memory of a run from the flags of `finetune.py`, without data and without its weights.

    python -m prismatic.training.memory --config qwen25-0_5b --use_lora True --batch_size 8

`--config` is short for `--config_file_path`.
"""

from __future__ import annotations

import re
import sys

from prismatic.command_line import bad_input_in_one_line
from prismatic.training.command_line import parse_flags


def main() -> None:
    """Parse, trace, print."""
    with bad_input_in_one_line("prismatic.training.memory"):
        cfg = parse_flags([re.sub("^--config(?==|$)", "--config_file_path", word) for word in sys.argv[1:]])
        # They load torch, which help and mistakes can do without.
        from prismatic.training.memory.report import lines
        from prismatic.training.memory.start_shape import empty_model
        from prismatic.training.memory.trace import precision_of, trace_step
        from prismatic.training.setup import apply_tuning

        model = empty_model(cfg)
        apply_tuning(model, cfg)
        print(chr(10).join(lines(trace_step(cfg, model), cfg.batch_size, precision_of(cfg))))


if __name__ == "__main__":
    main()
