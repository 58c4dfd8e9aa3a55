"""Page and figure of the controller experiment, from the raw files alone.

    python craft_experiments/05_controller/make_report.py results/controller

Writes controller.md and controller.png beside the folder `runs/`.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craft_experiments.common_utils.drift_runs import (
    DRIFT,
    GROUP,
    HEAD,
    LAMBDA,
    OUT_OF_REACH,
    TAIL,
    read_runs,
    spread,
    tail_mean,
)
from craft_experiments.common_utils.plots import COLOURS, moving_average, new_figure, save_figure
from craft_experiments.common_utils.report_folder import read_folder
from prismatic.command_line import bad_input_in_one_line
from prismatic.evidence.files import write_text
from prismatic.evidence.statistics import mean_and_half_width

SLACK = 1.1
"""A run meets its budget when its drift is at most this multiple of it."""
SEEDS = (0, 1, 2)
PLAN: list[tuple[str, float | None]] = [
    (controller, budget) for controller in ("share", "pi") for budget in (0.01, 0.003, 0.001)
]
PLAN += [(f"fixed {value:g}", None) for value in (0, 1, 3, 10, 30, 100)]
"""Variant and budget of the runs that the answer is to rest on, for every seed."""
LATE = 0.1
"""The shorter of the two ends over which drift is reported."""
WINDOW = 20  # steps of the moving average in the figure
Sweep = dict[float, list[dict]]  # lambda -> its runs


@dataclass(frozen=True)
class Duel:
    """One controller under one budget against the sweep, seed by seed.

    Attributes:
        controller, budget: `pi` or `share`; eps.
        runs: of the controller, in the order of the seeds.
        rivals: per run the fixed multiplier of the same seed that meets the budget at the lowest action loss, or None.
    """

    controller: str
    budget: float
    runs: list[dict]
    rivals: list[dict | None]

    @property
    def met(self) -> list[bool]:
        """(a) per run: the budget is met."""
        return [meets(run, self.budget) for run in self.runs]

    @property
    def differences(self) -> list[float]:
        """Action loss minus that of the rival, for the seeds that have one."""
        return [run["loss"] - rival["loss"] for run, rival in zip(self.runs, self.rivals, strict=True) if rival]

    @property
    def cheap(self) -> bool | None:
        """(b): the mean action loss is no higher than the rivals'; None without a rival."""
        return statistics.fmean(self.differences) <= 0 if self.differences else None

    @property
    def found(self) -> bool:
        """(a) in every run, and (b)."""
        return all(self.met) and bool(self.cheap)


def main() -> None:
    """Read {folder}/runs/*.json, write the page and the figure."""
    folder = read_folder(__doc__, "results/controller")
    runs = read_runs(folder, (LAMBDA,))
    page = report(runs)
    plot(runs, folder / "controller.png")
    write_text(folder / "controller.md", page)
    print(page)


# -------------------------------------------------------------------------------------------------- from runs to facts


def meets(run: dict, budget: float) -> bool:
    """Whether the drift at the end is at most 1.1 eps."""
    return run["achieved"] <= SLACK * budget


def sweep(runs: list[dict]) -> Sweep:
    """The runs with a fixed multiplier, in the order of lambda; 0 only measures."""
    table: Sweep = defaultdict(list)
    for run in runs:
        if run["budget"] is None:
            table[run[LAMBDA][-1]].append(run)
    return dict(sorted(table.items()))


def duels(runs: list[dict]) -> list[Duel]:
    """All pairs of budget, largest first, and controller that have runs. ValueError for runs of different lengths."""
    groups: dict[tuple[float, str], list[dict]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run["seed"]):
        if run["budget"] is not None:
            groups[run["budget"], run["variant"]].append(run)
    for (budget, controller), own in groups.items():
        if len(lengths := {len(run[DRIFT]) for run in own}) > 1:
            raise ValueError(
                f"{controller} at eps {budget:g}: found runs of {sorted(lengths)} steps, expected one length"
            )
    return [
        Duel(controller, budget, own, [rival(runs, budget, run["seed"]) for run in own])
        for (budget, controller), own in sorted(groups.items(), key=lambda item: (-item[0][0], item[0][1]))
    ]


def rival(runs: list[dict], budget: float, seed: int) -> dict | None:
    """The run with a fixed multiplier that meets the budget at the lowest action loss; None when none meets it."""
    able = [run for run in runs if run["budget"] is None and run["seed"] == seed and meets(run, budget)]
    return min(able, key=lambda run: run["loss"], default=None)


# ------------------------------------------------------------------------------------------------------------ the page


def report(runs: list[dict]) -> str:
    """The page."""
    found = duels(runs)
    seeds = sorted({run["seed"] for run in runs})
    lines = [
        "# One run with the controller, or a sweep of fixed multipliers?",
        "",
        "Written by `python craft_experiments/05_controller/make_report.py results/controller` from the files in",
        "`runs/`; the runs themselves by `python craft_experiments/05_controller/run_controller.py`.",
        "",
        *gaps(runs),
        *verdict(found),
        "## How it is judged",
        "",
        "Drift is the relative squared drift of the bridge features on the training batch, measured before each step.",
        f"Drift and action loss at the end are means over the last {TAIL:.0%} of the steps. Seeds: "
        f"{', '.join(map(str, seeds))}.",
        "",
        f"- (a) The drift at the end is at most {SLACK:g} eps.",
        "- (b) The action loss at the end is no higher than that of the best fixed lambda: for each seed the one with",
        f"  the lowest action loss among those whose drift is at most {SLACK:g} eps. It is chosen by the loss that it",
        "  is then compared by, which favours the sweep. Differences are paired over seeds: their mean, ± half the",
        "  width of its 95 % t interval.",
        "",
        "One run finds what the sweep finds when (a) holds in every run, and (b) in the mean over the seeds.",
        "",
        *duel_table(runs, found),
        "",
        "Cells are median (smallest to largest) over the seeds. Largest lambda: of the whole run; a record holds means",
        f"of {GROUP} steps after the first {HEAD}.",
        "",
        "![drift over steps, and action loss against drift](controller.png)",
        "",
        *sweep_table(runs),
        "",
    ]
    return "\n".join(lines)


def gaps(runs: list[dict]) -> list[str]:
    """What has not been run: a lambda that was not run reads like one that does not meet the budget."""
    there = {(run["seed"], run["variant"], run["budget"]) for run in runs}
    said = []
    for seed in SEEDS:
        missing = [setting for setting in PLAN if (seed, *setting) not in there]
        if len(missing) == len(PLAN):
            said.append(f"seed {seed} has not been run")
        elif missing:
            said.append(f"seed {seed} lacks {', '.join(setting_name(*setting) for setting in missing)}")
    return [f"**Not finished: {'; '.join(said)}.**", ""] if said else []


def setting_name(variant: str, budget: float | None) -> str:
    """Words for a variant and its budget."""
    return variant if budget is None else f"{variant} at eps {budget:g}"


def verdict(found: list[Duel]) -> list[str]:
    """The answer for each controller, and what it did under each budget."""
    lines: list[str] = []
    for controller in sorted({duel.controller for duel in found}):
        own = [duel for duel in found if duel.controller == controller]
        lines += [f"**{headline(controller, own)}**", "", *[f"- eps {d.budget:g}: {sentence(d)}" for d in own], ""]
    return lines or ["No controller has been run.", ""]


def headline(controller: str, own: list[Duel]) -> str:
    """What can be claimed of one controller."""
    reachable = [duel for duel in own if duel.differences]
    found = [duel for duel in reachable if duel.found]
    if not reachable:
        return (
            f"`{controller}`: no fixed lambda that was run meets any budget, so that there is nothing to compare with."
        )
    if not found:
        return f"One run with `{controller}` finds what the sweep finds at none of the budgets {listed(reachable)}."
    missed = [duel for duel in reachable if not duel.found]
    every = f"every budget that a fixed lambda meets: {listed(found)}"
    where = f"eps {listed(found)}, but not at {listed(missed)}" if missed else every
    return f"One run with `{controller}` finds what the sweep finds at {where}."


def listed(some: list[Duel]) -> str:
    """Budgets as words."""
    return ", ".join(f"{duel.budget:g}" for duel in some)


def sentence(duel: Duel) -> str:
    """What one controller did under one budget."""
    count = len(duel.runs)
    words = f"budget met in {sum(duel.met)} of {count} runs"
    if duel.differences:
        words += f"; action loss against the best fixed lambda {difference(duel)}: {resolution(duel)}"
    missing = duel.rivals.count(None)
    if missing:
        words += f"; no fixed lambda that was run meets it in {missing} of {count} seeds (out of reach)"
    said = warnings(duel)
    return words + (f"; the run said so in {sum(said)} of {count}" if missing and said else "") + "."


def warnings(duel: Duel) -> list[bool]:
    """Per run whether it said that its budget is out of reach; empty for a controller that never says it."""
    said = [[flag for flag in run.get(OUT_OF_REACH, ()) if flag is not None] for run in duel.runs]
    return [any(flags) for flags in said] if all(said) else []


def difference(duel: Duel) -> str:
    """Mean difference and half width of its interval."""
    mean, half = mean_and_half_width(duel.differences)
    pairs = len(duel.differences)
    return f"{mean:+.4f} ± {half:.4f} ({pairs} pairs)" if half is not None else f"{mean:+.4f} (1 pair, no interval)"


def resolution(duel: Duel) -> str:
    """What the difference shows."""
    mean, half = mean_and_half_width(duel.differences)
    word = "no higher" if mean <= 0 else "higher"
    if half is None or abs(mean) <= half:
        return f"{word} in the mean, not told apart from equal"
    return "lower" if mean < 0 else word


def duel_table(runs: list[dict], found: list[Duel]) -> list[str]:
    """Per budget the controllers, then the best fixed multipliers."""
    lines = [
        "| eps | run | drift, last quarter | drift, last tenth | largest lambda | action loss | (a) | (b) "
        "| said out of reach |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for budget in dict.fromkeys(duel.budget for duel in found):
        own = [duel for duel in found if duel.budget == budget]
        lines += [f"| {budget:g} | {duel.controller} | {' | '.join(duel_cells(duel))} |" for duel in own]
        lines.append(f"| {budget:g} | {' | '.join(fixed_cells(runs, budget))} |  |  |")
    return lines


def duel_cells(duel: Duel) -> list[str]:
    """Cells of one controller, from the drift on."""
    said, count = warnings(duel), len(duel.runs)
    cheap = {True: "yes", False: "no", None: "no fixed lambda to compare with"}[duel.cheap]
    return [
        *measured_cells(duel.runs),
        f"{sum(duel.met)} of {count}",
        f"{cheap}, {difference(duel)}" if duel.differences else cheap,
        f"{sum(said)} of {count}" if said else "cannot say it",
    ]


def fixed_cells(runs: list[dict], budget: float) -> list[str]:
    """Name and cells of the best fixed multiplier of each seed; of the lowest drifts where no seed has one."""
    seeds: dict[int, list[dict]] = defaultdict(list)
    for run in runs:
        if run["budget"] is None:
            seeds[run["seed"]].append(run)
    best = [found for seed in seeds if (found := rival(runs, budget, seed))]
    lowest = [min(own, key=lambda run: run["achieved"]) for own in seeds.values()]
    name = "best fixed" if best else "none of the fixed; their lowest drift"
    return [name, *measured_cells(best or lowest), f"{len(best)} of {len(seeds)}"]


def measured_cells(runs: list[dict]) -> list[str]:
    """Drift over the two ends, largest lambda, action loss."""
    return [
        spread([run["achieved"] for run in runs]),
        spread([tail_mean(run[DRIFT], LATE) for run in runs]),
        spread([max(run[LAMBDA]) for run in runs]),
        spread([run["loss"] for run in runs], 4),
    ]


def sweep_table(runs: list[dict]) -> list[str]:
    """Every fixed multiplier, and the budgets it meets."""
    budgets = sorted({run["budget"] for run in runs if run["budget"] is not None}, reverse=True)
    lines = [
        "## The sweep",
        "",
        "Fixed lambda, no projection; lambda 0 is the plain run. Last columns: seeds in which the budget is met.",
        "",
        "| lambda | runs | drift, last quarter | action loss |" + "".join(f" eps {b:g} |" for b in budgets),
        "|---|---|---|---|" + "---|" * len(budgets),
    ]
    for value, own in sweep(runs).items():
        met = "".join(f" {sum(meets(run, budget) for run in own)} |" for budget in budgets)
        drift, loss = spread([run["achieved"] for run in own]), spread([run["loss"] for run in own], 4)
        lines.append(f"| {value:g} | {len(own)} | {drift} | {loss} |{met}")
    return lines


# ---------------------------------------------------------------------------------------------------------- the figure


def plot(runs: list[dict], path: Path) -> None:
    """Drift over steps for each controller and budget; action loss against drift, with the frontier of the sweep."""
    figure = new_figure(10.5, 4.2)
    left, right = figure.subplots(1, 2)
    found = duels(runs)
    budgets = list(dict.fromkeys(duel.budget for duel in found))
    colours = {budget: COLOURS[i % len(COLOURS)] for i, budget in enumerate(budgets)}
    for budget, colour in colours.items():
        left.axhline(budget, color=colour, linestyle="--", linewidth=0.8)
        right.axvline(budget, color=colour, linestyle="--", linewidth=0.8)
    for duel in found:
        draw_duel(left, right, duel, colours[duel.budget])
    draw_frontier(right, sweep(runs))
    left.set(yscale="log", xlabel="optimizer step", ylabel="relative drift (dashed: budget)")
    right.set(xscale="log", xlabel="relative drift at the end (dashed: budget)", ylabel="action loss at the end")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def draw_duel(left: Any, right: Any, duel: Duel, colour: str) -> None:
    """A line on the left, the mean over the seeds; a point per run on the right."""
    is_pi = duel.controller == "pi"
    label = f"{duel.controller}, eps {duel.budget:g}"
    steps = [statistics.fmean(values) for values in zip(*[run[DRIFT] for run in duel.runs], strict=True)]
    line = moving_average(steps, WINDOW)
    # The first step measures a drift of 0, for which a logarithmic axis has no place.
    left.plot(range(1, len(line)), line[1:], color=colour, linestyle=":" if is_pi else "-", linewidth=1.2, label=label)
    xs, ys = [run["achieved"] for run in duel.runs], [run["loss"] for run in duel.runs]
    right.plot(xs, ys, "^" if is_pi else "o", color=colour, markersize=5, alpha=0.8, label=label)


def draw_frontier(axis: Any, table: Sweep) -> None:
    """Mean over the seeds per multiplier, joined in the order of lambda, and every run as a small point."""
    if not table:
        return
    points = {
        value: [statistics.fmean(run[name] for run in own) for name in ("achieved", "loss")]
        for value, own in table.items()
    }
    axis.plot(*zip(*points.values(), strict=True), "-x", color="0.3", linewidth=1, markersize=5, label="fixed lambda")
    for value, point in points.items():
        axis.annotate(f"{value:g}", point, xytext=(3, 4), textcoords="offset points", fontsize=7, color="0.3")
    every = [run for own in table.values() for run in own]
    axis.plot([r["achieved"] for r in every], [r["loss"] for r in every], ".", color="0.3", alpha=0.4, markersize=3)


if __name__ == "__main__":
    with bad_input_in_one_line("make_report.py"):
        main()
