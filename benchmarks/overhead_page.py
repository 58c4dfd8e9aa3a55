"""The report of `craft_overhead.py` and its summary in the documentation, made from its results."""

from __future__ import annotations

import statistics

from overhead_flops import floor_flops, parts_key
from overhead_rows import ROWS
from paired_times import paired_ratio, per_step

# Published size, LoRA, by hand from 2 * parameters * tokens, relative to upstream's plain step
# (with logits) that trains the same weights.
DERIVED = {
    "plain_logits": 1.00,
    "plain": 0.94,
    "procedure": 1.95,
    "open": 1.83,
    "closed": 1.39,
    "open_every4": 1.16,
    "frozen_plain_logits": 1.00,
    "frozen_procedure": 1.93,
    "frozen_open": 1.40,
    "frozen_raw_open": 1.16,
    "frozen_raw_closed": 1.04,
    "frozen_open_every4": 1.04,
}


def table(result: dict) -> list[str]:
    """Markdown lines of one result."""
    seconds = {name: per_step(rounds) for name, rounds in result["seconds"].items()}
    lines = [
        "| setting | ms | ratio to plain (95 %) | floor | measured / floor | executed FLOPs / floor | "
        "ratio to plain, vision frozen | floor | measured / floor | peak GiB | of it in the steps |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in (n for n in ROWS if n in seconds):
        row, flops = ROWS[name], result["flops"][name]
        cells = [row.label, f"{1000 * statistics.median(seconds[name]):.0f}", *_against(result, seconds, name, "plain")]
        cells.append(f"{flops['executed'] / flops['floor']:.2f}" if "executed" in flops else "")
        cells += _against(result, seconds, name, "frozen_plain") if row.frozen else ["", "", ""]
        memory = result["memory_gib"].get(name)
        cells += [f"{memory['peak']:.2f}", f"{memory['peak'] - memory['before']:.2f}"] if memory else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def flop_table(result: dict) -> list[str]:
    """Markdown lines of a result without times."""
    lines = ["| setting | floor | executed FLOPs / floor | floor to plain, vision frozen |", "|---|---|---|---|"]
    for name in (n for n in ROWS if n in result["seconds"]):
        own = result["flops"][name]
        bases = ("plain", "frozen_plain") if ROWS[name].frozen else ("plain",)
        floors = [own["floor"] / result["flops"][base]["floor"] if base in result["flops"] else None for base in bases]
        cells = ["" if value is None else f"{value:.2f}" for value in floors] + [""] * (2 - len(bases))
        executed = f"{own['executed'] / own['floor']:.2f}" if "executed" in own else ""
        lines.append(f"| {ROWS[name].label} | {cells[0]} | {executed} | {cells[1]} |")
    return lines


def _against(result: dict, seconds: dict[str, list[float]], name: str, base: str) -> list[str]:
    if base not in seconds:
        return ["", "", ""]
    median, low, high = paired_ratio(seconds[name], seconds[base])
    floor = result["flops"][name]["floor"] / result["flops"][base]["floor"]
    return [f"{median:.2f} ({low:.2f}-{high:.2f})", f"{floor:.2f}", f"{median / floor:.2f}"]


def cheap_settings(result: dict, limit: float) -> list[str]:
    """Constrained rows whose median ratio to the plain step that trains the same weights is at most `limit`."""
    seconds = {name: per_step(rounds) for name, rounds in result["seconds"].items()}
    found = []
    for name, times in seconds.items():
        row = ROWS[name]
        if row.method in ("plain", "logits", "bare") or row.baseline not in seconds:
            continue
        ratio = paired_ratio(times, seconds[row.baseline])[0]
        if ratio <= limit:
            found.append(f"{row.label} ({ratio:.2f})")
    return found


def above_floor(result: dict, tolerance: float = 0.05) -> list[str]:
    """Rows whose measured ratio is more than `tolerance` above their FLOP floor, both to their own plain row."""
    seconds = {name: per_step(rounds) for name, rounds in result["seconds"].items()}
    found = []
    for name in seconds:
        base = ROWS[name].baseline
        if base in seconds:
            floor = result["flops"][name]["floor"] / result["flops"][base]["floor"]
            excess = paired_ratio(seconds[name], seconds[base])[0] / floor
            if excess > 1 + tolerance:
                found.append(f"{ROWS[name].label} ({excess:.2f})")
    return found


def section(result: dict) -> list[str]:
    """Heading, facts, table and the two lists of one result."""
    machine, is_timed = result["machine"], result["rounds"] > 0
    sizes = result["parameters"]
    lines = [
        f"## {_title(result)}" + ", FLOPs only" * (not is_timed),
        "",
        f"{sizes['total'] / 1e6:.1f} M parameters, {sizes['trained'] / 1e6:.1f} M of them trained; "
        f"{result['rounds']} rounds, {machine['threads']} thread(s), torch {machine['torch']}, "
        f"Python {machine['python']}.",
        "",
        *(table(result) if is_timed else flop_table(result)),
        "",
    ]
    if not is_timed:
        return lines
    for limit in (1.25, 1.10):
        settings = cheap_settings(result, limit) or ["none"]
        lines += [f"Settings at no more than {limit:.2f}x the plain step that trains the same weights:", ""]
        lines += [*(f"- {setting}" for setting in settings), ""]
    lines += ["More than 5 % above the floor, against the plain step that trains the same weights:", ""]
    lines += [*(f"- {row}" for row in above_floor(result) or ["none"]), ""]
    beside = beside_bare(result)
    if beside:
        lines += ["Against the plain step and bare passes over as many samples, in the same round:", ""]
        lines += [*(f"- {row}" for row in beside), ""]
    return lines


def beside_bare(result: dict) -> list[str]:
    """Rows of preset `keep` with their ratio to the same passes without CRaFT."""
    seconds = {name: per_step(rounds) for name, rounds in result["seconds"].items()}
    found = []
    for name in (n for n in seconds if ROWS[n].method == "bare"):
        kept = name.replace("bare", "keep")
        if kept in seconds:
            median, low, high = paired_ratio(seconds[kept], seconds[name])
            found.append(f"{ROWS[kept].label}: {median:.2f} ({low:.2f}-{high:.2f})")
    return found


# Logits of the published size: 2 x (512 patches + 50 prompt tokens + 64 queries) x vocabulary x width.
LOGITS_FLOPS = 2 * 626 * 151_936 * 896


def derived_section(results: list[dict]) -> list[str]:
    """The hand-derived ratios at the published size beside the counted ones."""
    full = next((r for r in results if r["size"] == "full" and r["tuning"] == "lora"), None)
    lines = [
        "## The floor derived by hand",
        "",
        "Published size, LoRA, from 2 x parameters x tokens, relative to the upstream plain step, which trains the",
        "same weights and computes logits nobody reads. `counted` is the floor from the FLOPs counted in the run",
        f"above, relative to the plain step's plus {LOGITS_FLOPS / 1e9:.0f} GFLOP for the logits. For `original",
        "procedure` the derived number is what it executes; that was not counted at this size.",
        "",
        "| setting | derived | counted |",
        "|---|---|---|",
    ]
    counted = full["flops"]["parts"] if full else {}
    for name, ratio in DERIVED.items():
        row = ROWS[name]
        parts, cell = counted.get(parts_key(row.frozen, row.raw_only)), ""
        if parts and row.method != "procedure":
            plain = floor_flops(ROWS[row.baseline], parts) + LOGITS_FLOPS * full["batch_size"]
            flops = plain if row.method == "logits" else floor_flops(row, parts)
            cell = f"{flops / plain:.2f}"
        lines.append(f"| {row.label} | {ratio:.2f} | {cell} |")
    return [*lines, ""]


HEAD = """# The cost of every setting

Written by `python benchmarks/craft_overhead.py` from the files in this folder. Do not edit.

Each row is an optimizer step with one random batch and random weights. All rows of a table run in one process, in an
order that is shuffled in each round. A ratio is the median over rounds of the row's time divided by the plain step's
time in the same round, with a bootstrap 95 % interval of the median; with five rounds or fewer the interval is little
more than the range of the rounds. Rows with `craft_every` k time k steps in a row and divide by k.

- `floor`: FLOPs the setting cannot do without (main pass, its backward pass, anchor pass, retention backward pass, each
  only as deep as needed; frozen vision once) divided by those of the plain step. Counted with
  `torch.utils.flop_counter`: matrix products, convolutions and attention. That counter does not know the fused
  attention of CPUs, so the script adds its formulas. Elementwise work, normalisation and the optimizer are not counted.
- `executed FLOPs / floor`: what the step really runs. Above 1 it does more than it must.
- `vision frozen`: `--freeze_vision True`. The towers run once per constrained step. These rows are compared with the
  plain step that trains the vision towers and with the one that does not.
- `C_R only`: preset `budget` and `--craft_anchor_type raw_only`. The anchor pass and the retention backward pass stop
  at the middle layer.
- Preset `keep` holds the actions. On instructions: before the training pass, the policy under theta_0 answers old
  instructions on images of the batch, then the current policy does, with a backward pass of its own; the floor has
  these three at the memory's size. Memory `batch`: the actions of the training pass are held, unless the policy draws
  noise in training; the tiny preset draws none.
- `bare passes`: such three passes over the first samples of the batch, written by hand without anything of CRaFT's.
  A pass over few samples takes longer than its share of the FLOPs: half of a pass over four samples of the tiny size is
  the time of starting each operation. These rows show how much, and what CRaFT adds to it.
- Peak memory is that of a process that runs three rounds of this row only.

Commands:
"""

SUMMARY = """# What CRaFT costs

This section is written by `python benchmarks/craft_overhead.py` from the files in `results/craft_overhead`. Do not
edit. Every setting, with intervals and memory: [the whole report]({details}).

Time of an optimizer step as a ratio to the plain step that trains the same weights, in the same process and round, on
a CPU. In brackets the floor: the same ratio in FLOPs that the setting cannot do without. Nothing here was measured on a
GPU.

- `gate open`: the drift is above the budget, and the two gradients are kept apart. `gate closed`: below it; with
  lambda 0 the drift is only measured, with lambda > 0 one backward pass serves both losses.
- With a share p of open steps a run costs `(1 - p) x` the row with the gate closed and lambda > 0, plus `p x` the row
  with it open. How well `budget` keeps the drift: [results/budget](../results/budget/budget.md).
- `original procedure`: weights copied out and in, two backward passes over cloned gradients, logits nobody reads, a
  Python loop over tensors. It computes what the preset `original` does.
- `bare passes` do the passes of `keep` without anything of CRaFT's: what starting the operations of a small pass costs.
"""
SHOWN = (
    "procedure",
    "original",
    "open",
    "priced",
    "closed",
    "open_every4",
    "keep_quarter",
    "keep_quarter_every2",
    "bare_quarter_every2",
    "frozen_open",
)
"""Rows of the summary."""


def summary(results: list[dict], details: str) -> str:
    """The section of the documentation: chosen rows beside each other. `details` is the link to the whole report."""
    lines = [*SUMMARY.format(details=details).splitlines(), ""]
    titles = [_title(r) for r in results]
    lines += [f"| setting | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name in SHOWN:
        cells = [_summarised(result, name) for result in results]
        if any(cells):
            lines.append(f"| {ROWS[name].label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _summarised(result: dict, name: str) -> str:
    base = ROWS[name].baseline
    if name not in result["seconds"] or base not in result["seconds"]:
        return ""
    floor = result["flops"][name]["floor"] / result["flops"][base]["floor"]
    if not result["rounds"]:
        return f"({floor:.2f})"
    times = (per_step(result["seconds"][row]) for row in (name, base))
    return f"{paired_ratio(*times)[0]:.2f} ({floor:.2f})"


def _title(result: dict) -> str:
    tuning = f"LoRA rank {result['lora_rank']}" if result["lora_rank"] else "full tuning"
    alone = ", 1 thread" if result["machine"]["threads"] == 1 else ""
    return f"{result['size']}, {tuning}, batch {result['batch_size']}{alone}"


def report(results: list[dict]) -> str:
    """Everything that was measured."""
    lines = HEAD.splitlines() + [""]
    lines += [f"    {command_of(r)}" for r in results] + [""]
    for result in results:
        lines += section(result)
    return "\n".join(lines + derived_section(results)).rstrip() + "\n"


def command_of(result: dict) -> str:
    """The command line that repeats a run."""
    command = f"python benchmarks/craft_overhead.py --size {result['size']} --tuning {result['tuning']}"
    command += f" --rounds {result['rounds']} --batch_size {result['batch_size']}"
    command += f" --threads {result['machine']['threads']}"
    command += f" --warmup {result['warmup']}" if "warmup" in result else ""
    if "executed" not in result["flops"]["plain"]:
        command += " --count_executed False"
    if list(result["memory_gib"]) != list(result["seconds"]):
        command += f" --memory_rows {','.join(result['memory_gib']) or 'none'}"
    return command if set(result["seconds"]) == set(ROWS) else f"{command} --rows {','.join(result['seconds'])}"
