"""What is run: scales (presets), methods and tables, as data. No command is written here; `commands.py` makes them.

A table asks for *cells*. A cell is one policy (one training run, or a control that needs none) and the evaluations of
it. Tables share cells: the plain run on libero_spatial of Table 1 is also the baseline of Table 4 and the 20-shot point
of Table 3, and is trained once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

JOINT = "_joint"
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


class Role(str, Enum):
    """How a policy comes about."""

    TRAINED = "trained"
    INTERPOLATED = "interpolated"  # between the start model and a trained policy
    START = "start"  # the start checkpoint as it is
    REPLAY = "replay"  # open-loop replay of one demonstration: no policy


@dataclass(frozen=True)
class Method:
    """One row of a table.

    key: name in files and flags. label: name in tables. train: flags of `finetune.py` beyond the preset's. evaluate:
    flags of the evaluation. parent and scale: of an interpolated policy. control: a row that shows what a success rate
    is worth, not a competitor.
    """

    key: str
    label: str
    train: Mapping[str, object] = field(default_factory=dict)
    evaluate: Mapping[str, object] = field(default_factory=dict)
    role: Role = Role.TRAINED
    parent: str = ""
    scale: float = 1.0
    control: bool = False


@dataclass(frozen=True)
class Demonstrations:
    """A data set. task_ids: task numbers, "" for all. held_out: no training reads it."""

    suite: str
    task_ids: str
    dataset: str
    held_out: bool = False

    @property
    def name(self) -> str:
        """`libero_goal_no_noops`, or `held_out/libero_goal_no_noops`."""
        return "held_out/" * self.held_out + self.dataset


@dataclass(frozen=True)
class Preset:
    """One scale of the experiments.

    Attributes:
        suites: suites that are fine-tuned on and evaluated.
        task_ids: suite -> task numbers; "" is all.
        start: checkpoint folder or model geometry (`--config_file_path`).
        dataset_suffix: the demonstrations of a suite are called suite + dataset_suffix.
        max_steps, save_freq: optimizer steps; a policy of several suites takes a multiple of them.
        num_trials, pro_trials, start_trials: episodes per task: on the suite, on LIBERO-PRO's variants of it, on the
            tasks of the start model.
        craft: flags of the method called CRaFT.
        perturbed: evaluation flags that make the perturbed column of the standard one; `suite_suffix` is no flag but is
            appended to the name of the suite.
        budgets, penalties, l2sp_weights: the values tried in the retention protocol.
        shots: demonstrations per task in Table 3; `demos_per_task` of them are all.
        seeds: of every table; also choose the demonstrations of Table 3.
        ablation_suite: the suite of Table 3, Table 4 and the retention protocol.
        start_suite, start_task_ids, start_dataset: what the start model is competent at, and the name of its
            normalisation. Empty: it is no policy, and nothing is asked about it.
        other_start_datasets: suite -> normalisation of the start model for it, where it has learned that suite too.
        metric_flags: flags that give every constraint of the retention protocol the same unit.
        train, evaluate: further flags of every training and evaluation.
        start_perturbed: as `perturbed`, for the start's tasks: how its own demonstrations began.
        collect, start_collect, heldout_collect: flags of `collect_demos`, how they change for the start's tasks, and
            how for held-out demonstrations, which no training uses; None: the demonstrations are downloaded.
        num_gpus: 1 or more: torchrun; 0: plain python.
    """

    name: str
    suites: tuple[str, ...]
    task_ids: Mapping[str, str]
    start: str
    data_root_dir: str
    dataset_suffix: str
    max_steps: int
    save_freq: int
    batch_size: int
    learning_rate: float
    num_trials: int
    pro_trials: int
    start_trials: int
    craft: Mapping[str, object]
    perturbed: Mapping[str, object]
    budgets: tuple[float, ...]
    penalties: tuple[float, ...]
    shots: tuple[int, ...]
    demos_per_task: int
    seeds: tuple[int, ...]
    ablation_suite: str = "libero_spatial"
    start_suite: str = ""
    start_task_ids: str = ""
    start_dataset: str = ""
    other_start_datasets: Mapping[str, str] = field(default_factory=dict)
    l2sp_weights: tuple[float, ...] = (0.01,)
    metric_flags: Mapping[str, object] = field(default_factory=dict)
    train: Mapping[str, object] = field(default_factory=dict)
    evaluate: Mapping[str, object] = field(default_factory=dict)
    start_perturbed: Mapping[str, object] = field(default_factory=dict)
    collect: Mapping[str, object] | None = None
    start_collect: Mapping[str, object] = field(default_factory=dict)
    heldout_collect: Mapping[str, object] = field(default_factory=dict)
    num_gpus: int = 0

    def dataset(self, suite: str) -> str:
        """Name of the demonstrations of a suite."""
        return suite + self.dataset_suffix

    def demonstrations(self, suite: str) -> Demonstrations:
        """What a policy of a suite is trained on."""
        return Demonstrations(suite, self.task_ids[suite], self.dataset(suite))

    def start_units(self, suite: str) -> str:
        """Normalisation with which the start model acts on a suite."""
        return self.other_start_datasets.get(suite, self.start_dataset) or self.dataset(suite)

    def held_out(self) -> tuple[Demonstrations, ...]:
        """Other demonstrations of the start's tasks and of the suite of the retention protocol."""
        start = Demonstrations(self.start_suite, self.start_task_ids, self.start_dataset, held_out=True)
        return start, replace(self.demonstrations(self.ablation_suite), held_out=True)


QWEN = Preset(
    name="qwen25-0_5b",
    suites=SUITES,
    task_ids=dict.fromkeys(SUITES, ""),
    start="pretrained_models/configs",
    data_root_dir="data/libero",
    dataset_suffix="_no_noops",
    max_steps=20_000,
    save_freq=5_000,
    batch_size=8,
    learning_rate=5e-4,
    num_trials=50,
    pro_trials=50,
    start_trials=50,
    craft={
        "craft_retention_weight": 1.0,
        "craft_retention_budget": 0.1,
        "craft_dual_lr": 0.01,
        "craft_enable_projection": True,
    },
    perturbed={"suite_suffix": "_swap"},
    budgets=(0.01, 0.05, 0.2),
    penalties=(0.1, 1.0, 10.0),
    shots=(5, 10, 20, 50),
    demos_per_task=50,
    seeds=(0,),
    train={"use_lora": True, "lora_rank": 32},
    evaluate={"center_crop": True, "num_workers": 1, "save_videos": "failures"},
    num_gpus=1,
)

TINY = Preset(
    name="tiny",
    suites=SUITES,
    task_ids={"libero_spatial": "0,1", "libero_object": "2,5", "libero_goal": "1,8", "libero_10": "0"},
    start="pretrained_models/tiny-libero-displaced",
    start_suite="libero_object",
    start_task_ids="0,3,7",
    start_dataset="libero_object_start_no_noops",
    other_start_datasets={"libero_spatial": "libero_spatial_start_no_noops"},
    start_perturbed={"init_noise_mm": 50},
    data_root_dir="data",
    dataset_suffix="_displaced_no_noops",
    max_steps=800,
    save_freq=400,
    batch_size=8,
    learning_rate=5e-4,
    num_trials=4,
    pro_trials=2,
    start_trials=2,
    # The original rates and budget are inert at this scale (results/budget); drift is therefore stated relatively.
    craft={"craft_preset": "budget", "craft_retention_budget": 0.01},
    perturbed={"init_noise_mm": 35},
    budgets=(0.003, 0.01, 0.03),
    penalties=(1.0, 10.0),
    shots=(1, 5, 10, 20),
    demos_per_task=20,
    seeds=(0, 1, 2),
    metric_flags={"craft_retention_metric": "rel_mse"},
    train={
        "lr_schedule": "cosine",
        "lr_warmup_steps": 0.05,
        "max_grad_norm": 1.0,
        "image_aug": False,
        "proprio_dropout": 0.5,  # else the policy reads the robot state and does not look (results/pilot_target)
        "craft_log_freq": 10,
    },
    evaluate={"num_workers": 0, "save_videos": "none", "render_mode": "lazy"},
    collect={
        "initial_states": "standard:20-49",
        "init_noise_mm": 40,
        "reset_mode": "soft",
        "noise_std": 0.15,
        "noise_fraction": 0.5,
        "image_size": 96,
        "jpeg_quality": 75,
        "seed": 0,
    },
    start_collect={"init_noise_mm": 50},
    heldout_collect={"episodes_per_task": 6, "noise_std": 0.0, "seed": 1000},
)

PRESETS = {preset.name: preset for preset in (TINY, QWEN)}


class Kind(str, Enum):
    """What an evaluation asks."""

    STANDARD = "standard"  # the suite's own initial states
    PERTURBED = "perturbed"  # the preset's perturbation
    SWAP = "swap"  # LIBERO-PRO: positions exchanged
    OBJECT = "object"  # LIBERO-PRO: the object looks different
    START_TASKS = "start_tasks"  # the tasks the start model was trained on, as it was trained on them
    START_TASKS_START_HEAD = "start_tasks_start_head"  # the same, read by the action head of the start model


PRO_SUFFIX = {Kind.SWAP: "_swap", Kind.OBJECT: "_object"}
"""What is appended to the name of a suite."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a policy."""

    kind: Kind
    suite: str

    @property
    def name(self) -> str:
        """Unique within a cell, safe in file names."""
        return f"{self.kind.value}@{self.suite}"


@dataclass(frozen=True)
class Cell:
    """One policy: a method, trained (or not) on demonstrations of `suites`, at most `shots` per task, with `seed`."""

    method: Method
    suites: tuple[str, ...]
    seed: int
    shots: int | None = None

    @property
    def name(self) -> str:
        """Unique over all tables, safe in file names."""
        suites = "+".join(suite.removeprefix("libero_") for suite in self.suites)
        shots = "" if self.shots is None else f"--{self.shots}shot"
        return f"{self.method.key}--{suites}{shots}--seed{self.seed}"


@dataclass(frozen=True)
class Request:
    """What a table wants of a cell."""

    cell: Cell
    evaluations: tuple[Evaluation, ...]
    measured: tuple[Demonstrations, ...] = ()  # drift, CKA, probes and action error on held-out demonstrations


@dataclass(frozen=True)
class Table:
    """A table of a preset: its requests, and the order of its rows."""

    name: str
    title: str
    methods: tuple[Method, ...]
    requests: tuple[Request, ...] = field(default=())


def methods_of(preset: Preset) -> dict[str, Method]:
    """Every method by key, with the preset's values filled in."""
    found = [Method("plain", "plain fine-tuning"), *_constrained(preset), *_other_methods(preset), *_controls(preset)]
    known = {method.key: method for method in found}
    for key in ("plain", "craft"):
        method = known[key]
        known[key + JOINT] = replace(method, key=key + JOINT, label=method.label + ", one policy for all suites")
    return known


def _constrained(preset: Preset) -> list[Method]:
    """CRaFT, its ablations and its budgets. A budget that is CRaFT's own is no second method."""
    craft = {"use_craft": True, **preset.craft}
    fixed = {"craft_enable_dual": False}
    eps = preset.craft["craft_retention_budget"]
    original = {"use_craft": True, **preset.metric_flags, "craft_preset": "original", "craft_retention_budget": eps}
    budget = {"use_craft": True, "craft_preset": "budget"}
    variants = [
        ("craft", f"CRaFT, budget {eps:g}", craft),
        ("craft_no_projection", "CRaFT without projection", craft | {"craft_enable_projection": False}),
        ("craft_no_dual", "CRaFT without dual, λ = 0.1", craft | fixed | {"craft_fixed_lambda": 0.1}),
        ("craft_aq_only", "CRaFT, C_AQ only", craft | {"craft_anchor_type": "aq_only"}),
        ("craft_raw_only", "CRaFT, C_R only", craft | {"craft_anchor_type": "raw_only"}),
        ("craft_global", "CRaFT, one projection of all tensors", craft | {"craft_projection_granularity": "global"}),
        # The gate would open only above the budget; without a multiplier nothing keeps the drift there.
        (
            "projection_only",
            "projection only, λ = 0",
            craft | fixed | {"craft_fixed_lambda": 0.0, "craft_projection_when": "always"},
        ),
        ("craft_original", "CRaFT, original rule", original),
        *(
            (f"craft_budget_{e:g}", f"CRaFT, budget {e:g}", budget | {"craft_retention_budget": e})
            for e in preset.budgets
        ),
    ]
    if "craft_preset" not in preset.craft:  # CRaFT follows the original rule already
        variants = [variant for variant in variants if variant[0] != "craft_original"]
    return [Method(k, label, flags) for k, label, flags in variants if k == "craft" or flags != craft]


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
    ]


def _controls(preset: Preset) -> list[Method]:
    """Rows that show what a success rate is worth: without a policy, without images, without fine-tuning."""
    blind = Method("blind", "trained without images", {"blind_images": True}, {"control": "grey_images"}, control=True)
    replay = Method("replay", "replay of a demonstration", role=Role.REPLAY, control=True)
    start = Method("start", "start checkpoint", role=Role.START, control=True)
    return [blind, replay, start] if preset.start_suite else [blind, replay]


def table(name: str, preset: Preset, methods: tuple[str, ...] = ()) -> Table:
    """A table by name, with all its methods or the named ones (controls stay).

    Raises:
        ValueError: no such table, or a method that is none of its rows; names the expected ones.
    """
    if name not in TABLES:
        raise ValueError(f"table: found {name!r}, expected one of {', '.join(TABLES)}")
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
    return [key for key, method in known.items() if method.control]


def _seeds(preset: Preset, method: Method) -> tuple[int, ...]:
    """Controls take the first seed: start checkpoint and replay have none, and a blind policy is no competitor."""
    return preset.seeds[:1] if method.control else preset.seeds


def _both(suite: str) -> tuple[Evaluation, ...]:
    return Evaluation(Kind.STANDARD, suite), Evaluation(Kind.PERTURBED, suite)


def _rows_1(preset: Preset, known: Mapping[str, Method]) -> list[str]:
    return ["plain", "craft", *_control_rows(known)]


def _requests_1(preset: Preset, method: Method) -> list[Request]:
    cells = [Cell(method, (suite,), seed) for seed in _seeds(preset, method) for suite in preset.suites]
    return [Request(cell, _both(cell.suites[0])) for cell in cells]


def _joint_suites(preset: Preset) -> tuple[str, ...]:
    """Suites of the multi-task policy: the short ones, whose episodes have the same length."""
    return tuple(suite for suite in preset.suites if suite != "libero_10")


def _rows_2(preset: Preset, known: Mapping[str, Method]) -> list[str]:
    return ["plain", "plain" + JOINT, "craft", "craft" + JOINT, *_control_rows(known)]


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
    return ["craft", *ablations, other_rule, "plain", *_control_rows(known)]


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
    return [*(key for key in fixed if key in known), *several, *_control_rows(known)]


def _requests_retention(preset: Preset, method: Method) -> list[Request]:
    """The target suite, the start's tasks (read by the policy's own head and by the start's), and the features."""
    suite, before = preset.ablation_suite, ()
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
}
