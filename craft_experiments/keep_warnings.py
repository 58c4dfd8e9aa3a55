"""What has to be said first on the page of the bench `keep`: a start or a new task that makes a hypothesis say less."""

from __future__ import annotations

from statistics import fmean

from craft_experiments.keep_cells import sequence_cell
from craft_experiments.keep_data import KeepData, Outcomes, rate
from craft_experiments.paired_seeds import ALPHA
from prismatic.evidence.pairing import PairedCounts, paired

SOLVED = 0.8
"""The start is to solve this share of its own episodes."""
LEARNED = 0.2
"""Below this success of plain fine-tuning a comparison of new tasks says nothing."""


def start_lines(data: KeepData) -> list[str]:
    """Whether the start solves its own tasks, and whether it looks; nothing when it does both."""
    solved = [rate(found) or 0.0 for seed in data.preset.seeds if (found := _old(data, "start", seed))]
    lines = []
    if solved and fmean(solved) < SOLVED:
        lines += [
            f"**The start solves {100 * fmean(solved):.0f} % of its own episodes**, less than {100 * SOLVED:.0f} %: "
            '"old tasks" are tasks that it knows in part.',
            "",
        ]
    seed = data.preset.seeds[0]
    seeing, grey = (_old(data, key, seed) for key in ("start", "start_grey"))
    if seeing and grey:
        counts = sum(map(PairedCounts.of, paired(seeing, grey, lambda key: key[0]).values()), PairedCounts())
        if counts.only_a <= counts.only_b or counts.p_value >= ALPHA:
            lines += [
                f"**The start hardly looks**: with grey images it solves {sum(grey.values())} of {len(grey)} episodes, "
                f"not clearly less than with its cameras' images (McNemar p = {counts.p_value:.3f}).",
                "",
            ]
    return lines


def new_task_lines(data: KeepData) -> list[str]:
    """Whether plain fine-tuning learns the new tasks; nothing when it does."""
    rates = data.values.get("plain", {}).get("new", {}).values()
    if not rates or fmean(rates) >= LEARNED:
        return []
    return [
        f"**Plain fine-tuning solves {100 * fmean(rates):.0f} % of the new tasks**, less than {100 * LEARNED:.0f} %: "
        "the halves of H4 and H5 about new tasks say nothing.",
        "",
    ]


def _old(data: KeepData, key: str, seed: int) -> Outcomes | None:
    return data.old_outcomes(sequence_cell(data.preset, data.method(key), seed, 0))
