"""Which rows there are and which table shows them. No command is written here; the files of `jobs/` make them.

A table asks for *cells*. A cell is one policy (one training run, or a control that needs none) and the evaluations of
it. Tables share cells: the plain run on libero_spatial of Table 1 is also the baseline of Table 4 and the 20-shot point
of Table 3, and is trained once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from craft_experiments.cells import PRO_SUFFIX, Cell, Evaluation, Kind, Method, Request, Role
from craft_experiments.keep_cells import BENCH, keep_requests, keep_rows
from craft_experiments.preset import Demonstrations, Preset

JOINT = "_joint"


@dataclass(frozen=True)
class Table:
    """A table of a preset: its requests, and the order of its rows."""

    name: str
    title: str
    methods: tuple[Method, ...]
    requests: tuple[Request, ...] = field(default=())


def methods_of(preset: Preset) -> dict[str, Method]:
    """Every method by key, with the preset's values filled in."""
    found = [
        Method("plain", "plain fine-tuning"),
        *_constrained(preset),
        *_recommended(preset),
        *_other_methods(preset),
        *_controls(preset),
    ]
    known = {method.key: method for method in found}
    for key in ("plain", "craft", *_recommended_keys(preset)[1:]):
        method = known[key]
        known[key + JOINT] = replace(method, key=key + JOINT, label=method.label + ", one policy for all suites")
    return known | _of_sequences(preset, known)


def after_key(trained: str, start: str) -> str:
    """Key of the row that trains as `trained` does, from where the policy of `start` has come in the bench `keep`."""
    return f"{trained}_after_{start}"


def _of_sequences(preset: Preset, known: Mapping[str, Method]) -> dict[str, Method]:
    """Rows that the bench `keep` needs beside the others: interpolation after a second task, and learning again."""
    if preset.bench is None or not preset.keep:
        return {}
    plain, found = known["plain"], []
    for method in known.values():
        if method.role is Role.INTERPOLATED:
            found.append(replace(plain, key=after_key(method.parent, method.key), parent=method.key))
    steps = preset.bench.recovery_steps
    again = {"max_steps": steps[-1], "save_freq": steps[0], "lr_schedule": "constant"}
    for key in preset.bench.recovered:
        label = f"{known[key].label}, then the old tasks again"
        found.append(Method(after_key("old", key), label, again, parent=key))
    return {method.key: method for method in found}


def _constrained(preset: Preset) -> list[Method]:
    """CRaFT, its ablations and its budgets. A budget that is CRaFT's own is no second method."""
    name = "CRaFT on features" if preset.keep else "CRaFT"  # where nothing else is called so
    craft = {"use_craft": True, **preset.craft}
    fixed = {"craft_enable_dual": False}
    eps = preset.craft["craft_retention_budget"]
    original = {"use_craft": True, **preset.metric_flags, "craft_preset": "original", "craft_retention_budget": eps}
    budget = {"use_craft": True, "craft_preset": "budget"}
    variants = [
        ("craft", f"{name}, budget {eps:g}", craft),
        ("craft_no_projection", f"{name} without projection", craft | {"craft_enable_projection": False}),
        ("craft_no_dual", f"{name} without dual, λ = 0.1", craft | fixed | {"craft_fixed_lambda": 0.1}),
        ("craft_aq_only", f"{name}, C_AQ only", craft | {"craft_anchor_type": "aq_only"}),
        ("craft_raw_only", f"{name}, C_R only", craft | {"craft_anchor_type": "raw_only"}),
        ("craft_global", f"{name}, one projection of all tensors", craft | {"craft_projection_granularity": "global"}),
        # The gate would open only above the budget; without a multiplier nothing keeps the drift there.
        (
            "projection_only",
            "projection only, λ = 0",
            craft | fixed | {"craft_fixed_lambda": 0.0, "craft_projection_when": "always"},
        ),
        ("craft_original", f"{name}, original rule", original),
        *(
            (f"craft_budget_{e:g}", f"{name}, budget {e:g}", budget | {"craft_retention_budget": e})
            for e in preset.budgets
        ),
    ]
    if "craft_preset" not in preset.craft:  # CRaFT follows the original rule already
        variants = [variant for variant in variants if variant[0] != "craft_original"]
    return [Method(k, label, flags) for k, label, flags in variants if k == "craft" or flags != craft]


def _recommended(preset: Preset) -> list[Method]:
    """The constraint on actions without old data and with observations of it, and replay of the same demonstrations."""
    if not preset.keep:
        return []
    keep = {"use_craft": True, **preset.keep}
    replay, distilled = {"replay_fraction": 0.2}, {"replay_fraction": 0.2, "replay_labels": "start"}
    found = [Method("keep_none", "keep, no old data", keep)]
    for n in preset.memory_sizes:
        of = f"{n} demonstration{'' if n == 1 else 's'} per old task"
        for key, label, flags, memory_flag in (
            ("keep_data", "keep, observations", keep, "craft_memory_data"),
            ("replay", "replay", replay, "replay_data"),
            ("distilled", "distilled replay", distilled, "replay_data"),
        ):
            found.append(Method(f"{key}_{n}", f"{label} of {of}", flags, memory=n, memory_flag=memory_flag))
    return found


def _recommended_keys(preset: Preset) -> list[str]:
    """Rows of Tables 1 to 4 beside plain fine-tuning and CRaFT on features: the recommended preset, and replay."""
    most = max(preset.memory_sizes)
    return ["keep_none", f"keep_data_{most}", f"replay_{most}"] if preset.keep else []


def _other_methods(preset: Preset) -> list[Method]:
    """What a user could do instead of CRaFT."""
    penalty = {"retention_method": "feature_penalty", **preset.metric_flags}
    return [
        Method("frozen", "frozen VLM", {"retention_method": "frozen"}),
        *(
            Method(f"l2sp_{w:g}", f"L2-SP, weight {w:g}", {"retention_method": "l2sp", "l2sp_weight": w})
            for w in preset.l2sp_weights
        ),
        *(
            Method(f"penalty_{v:g}", f"fixed penalty, λ = {v:g}", penalty | {"craft_fixed_lambda": v})
            for v in preset.penalties
        ),
        *(
            Method(f"interpolate_{a:g}", f"interpolation, α = {a:g}", role=Role.INTERPOLATED, parent="plain", scale=a)
            for a in (0.25, 0.5, 0.75)
        ),
        *([_LLM_ALONE] if preset.bench is not None else []),
    ]


_LLM_ALONE = Method(
    "interpolate_llm_0.5",
    "interpolation of the language model alone, α = 0.5",
    role=Role.INTERPOLATED,
    parent="plain",
    scale=0.5,
    parts="llm",
)


def _controls(preset: Preset) -> list[Method]:
    """Rows that show what a success rate is worth: without a policy, without images, without fine-tuning."""
    blind = Method("blind", "trained without images", {"blind_images": True}, {"control": "grey_images"}, control=True)
    replay = Method("replay", "playback of a demonstration", role=Role.REPLAY, control=True)
    start = Method("start", "start checkpoint", role=Role.START, control=True)
    grey = Method("start_grey", "start checkpoint, grey images", evaluate=blind.evaluate, role=Role.START, control=True)
    found = [blind, replay, *([start] if preset.start_suite else [])]
    return [*found, grey] if preset.bench is not None else found


def table(name: str, preset: Preset, methods: tuple[str, ...] = ()) -> Table:
    """A table by name, with all its methods or the named ones (controls stay).

    Raises:
        ValueError: no such table, or a method that is none of its rows; names the expected ones.
    """
    if name not in TABLES:
        raise ValueError(f"table: found {name!r}, expected one of {', '.join(TABLES)}")
    if name == BENCH and preset.bench is None:
        raise ValueError(f"--preset: found {preset.name!r}, which has no bench {BENCH}, expected another one")
    title, rows_of, requests_of = TABLES[name]
    known = methods_of(preset)
    rows = [known[key] for key in rows_of(preset, known)]
    wrong = set(methods) - {row.key for row in rows}
    if wrong:
        raise ValueError(f"methods of {name}: found {sorted(wrong)}, expected some of {[row.key for row in rows]}")
    rows = [row for row in rows if not methods or row.key in methods or row.control]
    requests = [request for row in rows for request in requests_of(preset, row)]
    return Table(name, title, tuple(rows), tuple(requests))


def _control_rows(known: Mapping[str, Method]) -> list[str]:
    return [key for key, method in known.items() if method.control and key != "start_grey"]


def _seeds(preset: Preset, method: Method) -> tuple[int, ...]:
    """Controls take the first seed: start checkpoint and replay have none, and a blind policy is no competitor."""
    return preset.seeds[:1] if method.control else preset.seeds


def _both(suite: str) -> tuple[Evaluation, ...]:
    return Evaluation(Kind.STANDARD, suite), Evaluation(Kind.PERTURBED, suite)


def _rows_1(preset: Preset, known: Mapping[str, Method]) -> list[str]:
    return ["plain", "craft", *_recommended_keys(preset), *_control_rows(known)]


def _requests_1(preset: Preset, method: Method) -> list[Request]:
    cells = [Cell(method, (suite,), seed) for seed in _seeds(preset, method) for suite in preset.suites]
    return [Request(cell, _both(cell.suites[0]) + _old(preset)) for cell in cells]


def _old(preset: Preset) -> tuple[Evaluation, ...]:
    """What is kept of the start's tasks, where a row is there that is to keep it."""
    return (Evaluation(Kind.START_TASKS, preset.start_suite),) if preset.keep and preset.start_suite else ()


def _joint_suites(preset: Preset) -> tuple[str, ...]:
    """Suites of the multi-task policy: the short ones, whose episodes have the same length."""
    return tuple(suite for suite in preset.suites if suite != "libero_10")


def _rows_2(preset: Preset, known: Mapping[str, Method]) -> list[str]:
    kept = _recommended_keys(preset)[1:]
    return ["plain", "plain" + JOINT, "craft", "craft" + JOINT, *(key + JOINT for key in kept), *_control_rows(known)]


def _requests_2(preset: Preset, method: Method) -> list[Request]:
    """One policy on all suites, and one per suite, with LIBERO-PRO's perturbations of both."""
    suites = _joint_suites(preset)
    chosen = [suites] if method.key.endswith(JOINT) else [(suite,) for suite in suites]
    # Where the preset's perturbation is one of LIBERO-PRO's, it is not asked for twice.
    pro = [kind for kind in PRO_SUFFIX if PRO_SUFFIX[kind] != preset.perturbed.get("suite_suffix")]
    kinds = (Kind.STANDARD, Kind.PERTURBED, *([] if method.control else pro))
    return [
        Request(Cell(method, group, seed), tuple(Evaluation(kind, suite) for suite in group for kind in kinds))
        for seed in _seeds(preset, method)
        for group in chosen
    ]


def _requests_3(preset: Preset, method: Method) -> list[Request]:
    """Nested subsets of the demonstrations; all of them is the cell of Table 1."""
    suite, requests = preset.ablation_suite, []
    for seed in _seeds(preset, method):
        for shots in preset.shots if not method.control else (preset.demos_per_task,):
            limit = None if shots >= preset.demos_per_task else shots
            requests.append(Request(Cell(method, (suite,), seed, limit), _both(suite)))
    return requests


def _rows_4(preset: Preset, known: Mapping[str, Method]) -> list[str]:
    ablations = ["craft_no_projection", "craft_no_dual", "craft_aq_only", "craft_raw_only", "craft_global"]
    other_rule = "craft_original" if "craft_original" in known else next(k for k in known if "craft_budget_" in k)
    return ["craft", *ablations, other_rule, *_recommended_keys(preset), "plain", *_control_rows(known)]


def _requests_4(preset: Preset, method: Method) -> list[Request]:
    suite = preset.ablation_suite
    return [
        Request(Cell(method, (suite,), seed), _both(suite), _measured(preset, method))
        for seed in _seeds(preset, method)
    ]


def _measured(preset: Preset, method: Method) -> tuple[Demonstrations, ...]:
    """Features are compared with those of the start model, where there is one, for every policy that looks."""
    return preset.held_out() if preset.start_suite and not method.control else ()


def _rows_retention(preset: Preset, known: Mapping[str, Method]) -> list[str]:
    several = [k for k in known if k.startswith(("craft_budget_", "penalty_", "l2sp_", "interpolate_"))]
    fixed = ["plain", "frozen", "projection_only", "craft_no_projection", "craft_original", "craft"]
    several = [key for key in several if key != _LLM_ALONE.key]
    return [*(key for key in fixed if key in known), *_recommended_keys(preset), *several, *_control_rows(known)]


def _requests_retention(preset: Preset, method: Method) -> list[Request]:
    """The target suite, the start's tasks (read by the policy's own head and by the start's), and the features."""
    suite = preset.ablation_suite
    before: tuple[Evaluation, ...] = ()
    if preset.start_suite:
        before = (Evaluation(Kind.START_TASKS, preset.start_suite),)
        if not method.control:
            before += (Evaluation(Kind.START_TASKS_START_HEAD, preset.start_suite),)
    measure = _measured(preset, method)
    found = [Request(Cell(method, (suite,), seed), _both(suite) + before, measure) for seed in _seeds(preset, method)]
    if method.role is Role.START:
        # What was lost is counted against the start checkpoint from the same displaced starts, which differ by seed.
        found += [Request(Cell(method, (suite,), seed), before) for seed in preset.seeds[1:]]
    return found


TABLES = {
    "table1": ("Table 1: Main results on LIBERO", _rows_1, _requests_1),
    "table2": ("Table 2: One policy on several suites", _rows_2, _requests_2),
    "table3": ("Table 3: Few demonstrations", _rows_1, _requests_3),
    "table4": ("Table 4: Ablations", _rows_4, _requests_4),
    "retention": ("Retention: what fine-tuning keeps of the start model", _rows_retention, _requests_retention),
    BENCH: ("Keep: two new tasks, and what is kept of the old ones", keep_rows, keep_requests),
}
