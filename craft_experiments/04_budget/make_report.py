"""Table and figure of the budget experiment, from the raw files alone.

    python craft_experiments/04_budget/make_report.py results/budget

Writes budget.md, budget.png and traces.png beside the folder `runs/`.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

from craft_experiments.common_utils.drift_runs import DRIFT, LAMBDA, TAIL, read_runs, spread, tail_mean
from craft_experiments.common_utils.plots import COLOURS, new_figure, save_figure
from craft_experiments.common_utils.report_folder import read_folder
from prismatic.command_line import bad_input_in_one_line
from prismatic.evidence.files import write_text

GATE = "CRaFT/Gate Open"


def main() -> None:
    """Read {folder}/runs/*.json, write the page and the figures."""
    folder = read_folder(__doc__, "results/budget")
    runs = load_runs(folder)
    page = report(runs)
    plot_budget(runs, folder / "budget.png")
    plot_traces(runs, folder / "traces.png")
    write_text(folder / "budget.md", page)
    print(page)


def load_runs(folder: Path) -> list[dict]:
    """Records of all runs in name order (see `read_runs`), with `open`, the share of steps with an open gate, added.

    Raises also ValueError when none of them had a budget.
    """
    runs = [run | {"open": statistics.fmean(run[GATE])} for run in read_runs(folder, (LAMBDA, GATE))]
    if all(run["budget"] is None for run in runs):
        raise ValueError(f"{folder / 'runs'}: found no run with a budget")
    return runs


def by_variant(runs: list[dict]) -> dict[str, dict[float, list[dict]]]:
    """variant -> budget -> runs, without the runs that only measure."""
    table: dict[str, dict[float, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["budget"] is not None:
            table[run["variant"]][run["budget"]].append(run)
    return table


def deviation(run: dict) -> float:
    """|achieved - eps| / eps."""
    return abs(run["achieved"] - run["budget"]) / run["budget"]


def report(runs: list[dict]) -> str:
    """The page."""
    free = [run for run in runs if run["budget"] is None]
    lines = [
        "# Drift that was asked for, drift that came out",
        "",
        "Written by `python craft_experiments/04_budget/make_report.py results/budget` from the files in `runs/`; the",
        "runs themselves by `python craft_experiments/04_budget/run_budget.py`.",
        "",
        "The start checkpoint, competent on libero_object, is fine-tuned on demonstrations of a libero_spatial task.",
        "L_ret is the relative squared drift of the bridge features, averaged over the last "
        f"{TAIL:.0%} of the measured steps.",
        f"Without a constraint it is {spread([r['achieved'] for r in free])} ({len(free)} seeds), action loss "
        f"{spread([r['loss'] for r in free])}.",
        "",
    ]
    for variant, budgets in sorted(by_variant(runs).items()):
        lines += variant_table(variant, budgets)
    lines += ["![achieved drift against budget](budget.png)", "", "![traces](traces.png)", ""]
    return "\n".join(lines)


def variant_table(variant: str, budgets: dict[float, list[dict]]) -> list[str]:
    """Lines of one variant's table."""
    everything = [run for runs in budgets.values() for run in runs]
    worst = max(statistics.median(deviation(run) for run in runs) for runs in budgets.values())
    lines = [
        f"## {variant}",
        "",
        f"Deviation |L_ret - eps| / eps: median over all {len(everything)} runs "
        f"{statistics.median(deviation(run) for run in everything):.1%}, largest median of a budget {worst:.1%}.",
        "",
        "| eps | runs | achieved, median (min to max) | deviation, median | above eps | action loss "
        "| lambda at the end | gate open |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for budget, runs in sorted(budgets.items()):
        cells = [
            str(len(runs)),
            spread([run["achieved"] for run in runs]),
            f"{statistics.median(deviation(run) for run in runs):.1%}",
            f"{sum(run['achieved'] > budget for run in runs)} of {len(runs)}",
            spread([run["loss"] for run in runs]),
            spread([tail_mean(run[LAMBDA]) for run in runs]),
            f"{statistics.fmean(run['open'] for run in runs):.0%}",
        ]
        lines.append(f"| {budget:g} | {' | '.join(cells)} |")
    return [*lines, ""]


def plot_budget(runs: list[dict], path: Path) -> None:
    """Achieved drift against budget, one point per run, with the line on which they should lie."""
    figure = new_figure(5.2, 4.4)
    axis = figure.subplots()
    table = by_variant(runs)
    budgets = sorted({budget for variant in table.values() for budget in variant})
    axis.plot(budgets, budgets, color="0.3", linestyle="--", linewidth=1, label="achieved = budget")
    axis.fill_between(budgets, [0.85 * b for b in budgets], [1.15 * b for b in budgets], color="0.9", label="±15 %")
    for position, (variant, points) in enumerate(sorted(table.items())):
        shift = 1 + 0.05 * (position - (len(table) - 1) / 2)  # side by side, so that no point hides another
        xs, ys = zip(*[(b * shift, run["achieved"]) for b, cell in points.items() for run in cell], strict=True)
        axis.plot(xs, ys, "osD^"[position % 4], color=COLOURS[position], alpha=0.75, markersize=5, label=variant)
    axis.set(xscale="log", yscale="log", xlabel="budget eps", ylabel="relative drift at the end")
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_traces(runs: list[dict], path: Path) -> None:
    """L_ret and lambda over steps for one seed and the middle budget of every variant."""
    seed = min(run["seed"] for run in runs)
    budgets = sorted({run["budget"] for run in runs if run["budget"] is not None})
    budget = budgets[len(budgets) // 2]
    figure = new_figure(9.0, 3.4)
    left, right = figure.subplots(1, 2)
    shown = sorted((r for r in runs if r["seed"] == seed and r["budget"] == budget), key=lambda r: r["variant"])
    for position, run in enumerate(shown):
        for axis, name in ((left, DRIFT), (right, LAMBDA)):
            axis.plot(run["measured_steps"], run[name], color=COLOURS[position], linewidth=1, label=run["variant"])
    left.axhline(budget, color="0.3", linestyle="--", linewidth=1)
    left.set(yscale="log", ylabel=f"relative drift (budget {budget:g})", xlabel="optimizer step")
    right.set(yscale="symlog", ylabel="lambda", xlabel="optimizer step", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    with bad_input_in_one_line("make_report.py"):
        main()
