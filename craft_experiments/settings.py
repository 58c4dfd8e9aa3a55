"""Command line of the table drivers: flags that replace a preset's values, and where files go."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

from craft_experiments.keep_cells import BENCH
from craft_experiments.preset import Preset
from craft_experiments.presets import PRESETS
from prismatic.command_line import check_values, flag

_ABOVE = Path(__file__).resolve().parents[1]
ROOT = _ABOVE if (_ABOVE / "pyproject.toml").is_file() else Path.cwd()
"""The checkout, from which programs are started; where only the package is installed, the folder one is in."""
FOLDERS = {
    "table1": "01_main_results",
    "table2": "02_stability_efficiency",
    "table3": "02_stability_efficiency",
    "table4": "03_ablations",
    "retention": "06_retention",
    "keep": "07_keep",
}
_EVALUATE_FLAGS = ("center_crop", "num_workers", "save_videos", "render_mode")


@dataclass
class RunConfig:
    """Flags of `python -m craft_experiments`. None or empty: as the preset says. Lists: blanks or commas between."""

    preset: str = flag("tiny", "which column applies")
    methods: str = flag("", "rows; empty: all of the table")
    controls: bool = flag(True, "with the control rows")
    suites: str = flag("", "LIBERO suites")
    seeds: str = flag("", "training seeds")
    shots: str = flag("", "demonstrations per task, Table 3")
    task_ids: str = flag("", "task numbers to evaluate, for every suite")
    num_trials: int | None = flag(None, "episodes per task", at_least=1)
    config_file_path: str = flag("", "start: checkpoint folder or preset name")
    vlm_path: str = flag("", "`--vlm_path`, native Prismatic weights")
    data_root_dir: str = flag("", "folder of the data sets")
    dataset_suffix: str | None = flag(None, "data set = suite + suffix")
    collect_demos: bool | None = flag(None, "collect scripted demonstrations when the data set is missing")
    num_demos: int | None = flag(None, "demonstrations per task", at_least=1)
    batch_size: int | None = flag(None, "per GPU", at_least=1)
    learning_rate: float | None = flag(None, "of AdamW", more_than=0, at_most=1)
    max_steps: int | None = flag(None, "optimizer steps", at_least=1)
    save_freq: int | None = flag(None, "optimizer steps between checkpoints", at_least=1)
    use_lora: bool | None = flag(None, "LoRA needs a checkpoint folder as start, not a preset name")
    lora_rank: int | None = flag(None, "rank of the adapters", at_least=1, at_most=4096)
    retention_weight: float | None = flag(None, "initial λ", at_least=0)
    retention_budget: float | None = flag(None, "ε", more_than=0, infinite=True)
    dual_lr: float | None = flag(None, "η_λ", at_least=0)
    enable_projection: bool | None = flag(None, "conflict-aware projection")
    num_images: int = flag(2, "cameras", at_least=1)
    center_crop: bool | None = flag(None, "of evaluation images")
    render_mode: str = flag("", "`published` or `lazy`; not passed: the checkpoint's")
    save_videos: str = flag("", "`none`, `failures`, `first`, `all`")
    num_workers: int | None = flag(None, "simulator processes of one evaluation", at_least=0, at_most=1024)
    num_gpus: int | None = flag(None, "1 or more: `torchrun`; 0: plain `python`", at_least=0, at_most=1024)
    extra_train_args: str = flag("", "further flags of `finetune.py`, separated by blanks")
    extra_eval_args: str = flag("", "further flags of `run_libero_eval.py`")
    python: str = flag("", "interpreter of the driver and the programs; empty: `python`")
    torchrun: str = flag("torchrun", "command")
    work_dir: str = flag("runs/tables", "checkpoints and records")
    records_dir: str = flag("", "empty: in `RUN_ROOT_DIR`")
    results_dir: str = flag("", "empty: the folder of the table")
    slots: int = flag(1, "jobs at the same time", at_least=1, at_most=1024)
    dry_run: bool = flag(False, "print each command and run none")


@dataclass(frozen=True)
class Settings:
    """A preset with the flags applied, and the flags that belong to no preset."""

    preset: Preset
    methods: tuple[str, ...]
    controls: bool
    num_images: int
    vlm_path: str
    extra_train: tuple[str, ...]
    extra_eval: tuple[str, ...]
    python: str
    torchrun: str
    work_dir: Path
    records_dir: Path
    results_dir: Path
    slots: int
    dry_run: bool

    @property
    def runs_dir(self) -> Path:
        """`--run_root_dir` of every training."""
        return self.work_dir / "runs"

    @property
    def logs_dir(self) -> Path:
        """Everything the programs print, and the logs of the evaluations. Cells of two presets have the same names."""
        return self.results_dir / "eval_logs" / self.preset.name


def words(text: str) -> tuple[str, ...]:
    """`"a b,c"` -> ("a", "b", "c")."""
    return tuple(text.replace(",", " ").split())


def integers(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers >= 0; ValueError names the flag."""
    found = words(text)
    if not all(word.isdigit() for word in found):
        raise ValueError(f"--{name}: expected whole numbers, found {text!r}")
    return tuple(int(word) for word in found)


def resolve(cfg: RunConfig, table: str) -> Settings:
    """Flags and preset together.

    Raises:
        ValueError: an unknown preset, suite or table, or a number out of range; names the flag.
    """
    check_values(cfg)
    if cfg.preset not in PRESETS:
        raise ValueError(f"--preset: found {cfg.preset!r}, expected one of {', '.join(PRESETS)}")
    if table not in FOLDERS:
        raise ValueError(f"table: found {table!r}, expected one of {', '.join(FOLDERS)}")
    preset = _with_flags(preset_of(cfg.preset, table), cfg)
    work = Path(cfg.work_dir) / preset.name
    return Settings(
        preset=preset,
        methods=words(cfg.methods),
        controls=cfg.controls,
        num_images=cfg.num_images,
        vlm_path=cfg.vlm_path,
        extra_train=_split("extra_train_args", cfg.extra_train_args),
        extra_eval=_split("extra_eval_args", cfg.extra_eval_args),
        python=cfg.python or sys.executable,
        torchrun=cfg.torchrun,
        work_dir=work,
        records_dir=Path(cfg.records_dir) if cfg.records_dir else work / "records",
        results_dir=Path(cfg.results_dir) if cfg.results_dir else Path("craft_experiments") / FOLDERS[table],
        slots=cfg.slots,
        dry_run=cfg.dry_run,
    )


def preset_of(name: str, table: str) -> Preset:
    """The preset of that name, as the bench `keep` changes it where `table` is that bench."""
    preset = PRESETS[name]
    return replace(preset, **preset.bench.changes) if table == BENCH and preset.bench is not None else preset


def _split(name: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"--{name}: found {text!r}, expected words as a shell has them: {error}") from None


def _with_flags(preset: Preset, cfg: RunConfig) -> Preset:
    suites = words(cfg.suites) or preset.suites
    unknown = set(suites) - set(preset.task_ids)
    if unknown:
        raise ValueError(f"--suites: found {sorted(unknown)}, expected some of {', '.join(preset.task_ids)}")
    same_name = {field.name for field in fields(Preset)} & {field.name for field in fields(RunConfig)}
    same_name -= {"suites", "seeds", "shots", "task_ids"}
    changes = {name: getattr(cfg, name) for name in same_name if getattr(cfg, name) not in (None, "")}
    if cfg.num_trials:
        changes |= {"pro_trials": cfg.num_trials, "start_trials": cfg.num_trials}
    if cfg.config_file_path:
        changes["start"] = cfg.config_file_path
    if cfg.task_ids:
        changes["task_ids"] = dict.fromkeys(preset.task_ids, ",".join(words(cfg.task_ids)))
    if cfg.num_demos:
        changes["demos_per_task"] = cfg.num_demos
    if cfg.dataset_suffix is not None:
        changes["dataset_suffix"] = cfg.dataset_suffix  # may be empty
    if cfg.collect_demos is not None:
        changes["collect"] = (preset.collect or {}) if cfg.collect_demos else None
    if preset.ablation_suite not in suites:
        changes["ablation_suite"] = suites[0]
    return replace(
        preset,
        suites=suites,
        seeds=integers("seeds", cfg.seeds) or preset.seeds,
        shots=integers("shots", cfg.shots) or preset.shots,
        craft=_craft_flags(preset, cfg),
        train=_given(preset.train, cfg, {"use_lora": "use_lora", "lora_rank": "lora_rank"}),
        evaluate=_given(preset.evaluate, cfg, {name: name for name in _EVALUATE_FLAGS}),
        **changes,
    )


def _craft_flags(preset: Preset, cfg: RunConfig) -> dict:
    names = ("retention_weight", "retention_budget", "dual_lr", "enable_projection")
    return _given(preset.craft, cfg, {name: f"craft_{name}" for name in names})


def _given(base, cfg: RunConfig, names: dict[str, str]) -> dict:
    """`base` with the flags of `cfg` that were given."""
    found = {flag: getattr(cfg, name) for name, flag in names.items()}
    return dict(base) | {flag: value for flag, value in found.items() if value not in (None, "")}
