"""The parts of `gpu_check.py`: each yields its checks as it makes them, from real runs of the product."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate.state import AcceleratorState
from inference import prediction, random_policy
from memory_table import BATCH, ROWS, published
from torch import Tensor, nn

from prismatic.models.vla_policy import CraftRequest, VLAPolicyModel
from prismatic.training.config import FinetuneConfig
from prismatic.training.loop import Trainer, seed_everything
from prismatic.training.lora import fixed_batch
from prismatic.training.memory.report import GIB, peak_at
from prismatic.training.memory.start_shape import empty_model
from prismatic.training.memory.trace import Trace, materialise, narrow, retention_of, step_batch, trace_step
from prismatic.training.processes import build_accelerator
from prismatic.training.retention.memory import to_device
from prismatic.training.setup import apply_tuning, build_setup
from prismatic.training.step import StepContext, optimizer_step

ROOT = Path(__file__).resolve().parents[1]
START = str(ROOT / "pretrained_models" / "tiny-libero-object")
DATA_ROOT = ROOT / "datasets" / "rlds"
NEW, OLD = "libero_spatial_scripted_no_noops", str(DATA_ROOT / "libero_object_scripted_no_noops")
KEEP = {"use_craft": True, "craft_preset": "keep", "craft_retention_budget": 0.001, "craft_every": 1}
LORA = {"use_lora": True, "lora_rank": 8}
METHODS = {
    "plain": {},
    "CRaFT `original`": {"use_craft": True, "craft_retention_budget": 1e-6},
    "CRaFT `budget`": {"use_craft": True, "craft_preset": "budget", "craft_retention_budget": 1e-6},
    "CRaFT `keep`": KEEP,
    "CRaFT `keep`, old observations": KEEP | {"craft_memory": "instructions,data", "craft_memory_data": OLD},
    "feature penalty": {"retention_method": "feature_penalty"},
    "L2-SP": {"retention_method": "l2sp"},
    "replay": {"replay_data": OLD},
    "distilled replay": {"replay_data": OLD, "replay_labels": "start"},
}
WAYS = {
    "LoRA": LORA,
    "CRaFT `original`, LoRA": LORA | METHODS["CRaFT `original`"],
    "vision frozen, CRaFT `keep`": {"freeze_vision": True} | KEEP,
    "accumulation, EMA, validation": {
        "grad_accumulation_steps": 2,
        "ema_decay": 0.9,
        "use_val_set": True,
        "val_freq": 1,
        "val_batches": 1,
    },
    "gradient checkpointing, CRaFT `keep`": {"gradient_checkpointing": True} | KEEP,
    "compiled": {"compile": True},
    "compiled, CRaFT `budget`": {"compile": True} | METHODS["CRaFT `budget`"],
}
# Largest relative difference of the same thing on two devices in float32. The first loss shows the forward pass; the
# later ones also what AdamW makes of the rounding of small gradients.
FORWARD, LATER = 1e-3, 2e-2
BF16 = 0.05
"""Allowed difference of a loss curve in bf16, relative to its mean."""
BETWEEN = 0.05
"""Allowed error of the predicted peak memory."""


@dataclass(frozen=True)
class PartConfig:
    """What a part runs on, and at which size."""

    device: torch.device
    size: str


@dataclass(frozen=True)
class Check:
    """One finding. `passed` is None when nothing was judged: it is a measurement, or says why there is none."""

    what: str
    found: str
    expected: str = ""
    passed: bool | None = None


Checks = Iterator[Check]


def run_part(name: str, cfg: PartConfig, output: Path) -> None:
    """Run a part and append each check to `output` as one line of JSON."""
    torch.set_num_threads(2 if cfg.device.type == "cpu" else max(2, torch.get_num_threads()))
    with output.open("a", encoding="utf-8") as file:
        for check in PARTS[name](cfg):
            file.write(json.dumps(asdict(check)) + "\n")
            file.flush()


# ---------------------------------------------------------------------------------------------------------- training


def trained(cfg: PartConfig, folder: str, name: str, **flags) -> Trainer:
    """A finished run of a few steps of the shipped start on shipped demonstrations."""
    trainer = prepared(cfg, folder, name, **flags)
    trainer.fit()
    return trainer


def prepared(cfg: PartConfig, folder: str, name: str, **flags) -> Trainer:
    """A run before its first step."""
    given = {"config_file_path": START, "data_root_dir": str(DATA_ROOT), "dataset_name": NEW, "n_shot_episodes": 2}
    given |= {"run_root_dir": folder, "run_id_override": "".join(c for c in name if c.isalnum()), "batch_size": 4}
    given |= {"max_steps": 3, "craft_log_freq": 1, "device": cfg.device.type, "image_aug": False}
    run = FinetuneConfig(**(given | flags))
    seed_everything(run.seed)
    AcceleratorState._reset_state(reset_partial_state=True)  # it would keep the precision of the run before
    return Trainer(run, build_setup(run), build_accelerator(run))


def losses(trainer: Trainer) -> list[float]:
    """The action loss of every step, from the run's file of metrics."""
    lines = (trainer.setup.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = {line["step"]: line["VLA Train/Loss"] for line in map(json.loads, lines) if "VLA Train/Loss" in line}
    return [found[step] for step in sorted(found)]


def misplaced(trainer: Trainer, device: torch.device, precision: torch.dtype | None) -> list[str]:
    """What is on another device or in another dtype than it should be: weights, buffers, optimizer, snapshot."""
    model = trainer.bare_model
    wrong = [f"{n} on {t.device}" for n, t in _tensors(trainer) if t.device.type != device.type]
    for name, p in model.named_parameters():
        frozen_product = not p.requires_grad and p.ndim > 1 and isinstance(_owner(model, name), PRODUCTS)
        expected = precision if precision is not None and frozen_product else torch.float32
        if p.dtype is not expected:
            wrong.append(f"{name} in {p.dtype}")
    return wrong


PRODUCTS = (nn.Linear, nn.Conv2d, nn.Embedding)


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _tensors(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    yield from trainer.bare_model.named_parameters()
    yield from trainer.bare_model.named_buffers()
    for state in trainer.optimizer.state.values():
        yield from ((f"optimizer's {n}", t) for n, t in state.items() if isinstance(t, Tensor) and t.ndim)


def paths(cfg: PartConfig) -> Checks:
    """Three steps of each kind of run of the shipped start, in the precision that is the default there; then resume,
    merge and evaluation. Everything must be finite, on the device and in its dtype.
    """
    runs = METHODS | WAYS
    if cfg.device.type == "cuda":
        runs |= {"fp16": {"mixed_precision": "fp16"}, "float32": {"mixed_precision": "no"}}
    else:
        runs |= {"bf16": {"mixed_precision": "bf16"} | LORA}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in runs.items():
            yield _tried(name, lambda name=name, flags=flags: _path(cfg, folder, name, flags))
        yield _tried("resume", lambda: _resumed(cfg, folder))
        yield from _merged_and_evaluated(cfg, folder)


def _tried(name: str, check: Callable[[], Check]) -> Check:
    """A fault of one path is its outcome, so that the others are still seen."""
    try:
        return check()
    except Exception as error:  # whatever a device does
        return Check(name, f"{type(error).__name__}: {str(error)[:300]}", "a finished run", False)


def _path(cfg: PartConfig, folder: str, name: str, flags: dict) -> Check:
    if flags.get("compile") and cfg.device.type == "cpu":
        flags = flags | {"compile_backend": "aot_eager"}  # a CPU may have no compiler
    trainer = trained(cfg, folder, name, **flags)
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)
    wrong, curve = misplaced(trainer, cfg.device, precision), losses(trainer)
    found = f"{len(curve)} losses, last {curve[-1]:.4f}; misplaced: {', '.join(wrong[:3]) or 'nothing'}"
    good = not wrong and len(curve) == 3 and all(map(math.isfinite, curve))
    return Check(name, found, "3 finite losses, nothing misplaced", good)


def _resumed(cfg: PartConfig, folder: str) -> Check:
    flags = LORA | KEEP | {"save_freq": 2, "max_steps": 4}
    straight = losses(trained(cfg, folder, "straight", **flags))
    prepared(cfg, folder, "halved", **flags | {"max_steps": 4})
    trained(cfg, folder, "halved", **flags | {"max_steps": 2})
    again = losses(trained(cfg, folder, "halved", **flags | {"resume": True}))
    gap = max(abs(a - b) / a for a, b in zip(straight, again, strict=True))
    return Check("resume", f"largest relative difference of a loss {gap:.1e}", "at most 1e-4", gap <= 1e-4)


def _merged_and_evaluated(cfg: PartConfig, folder: str) -> Checks:
    from experiments.robot.policy import VLAPolicy

    flags = LORA | {"merge_lora_during_training": True, "lora_dropout": 0.0}
    trainer = trained(cfg, folder, "merged", **flags)
    checkpoint = trainer.setup.run_dir.with_name(f"{trainer.cfg.run_id}--{trainer.step}_chkpt")
    manifest = json.loads((checkpoint / "craft_checkpoint.json").read_text(encoding="utf-8"))
    gap, allowed = manifest["merge"]["max_difference"], manifest["merge"]["tolerance"]
    yield Check("merge", f"largest difference of an action {gap:.1e}", f"at most {allowed:g}", gap <= allowed)
    rng = np.random.default_rng(0)
    image, state = rng.integers(0, 255, (96, 96, 3), dtype=np.uint8), rng.normal(size=8)
    here, there = (
        VLAPolicy.from_checkpoint(checkpoint, device, unnorm_key=NEW).predict(image, image, state, "pick up the bowl")
        for device in (cfg.device.type, "cpu")
    )
    gap = float(np.abs(here - there).max())
    yield Check("evaluation", f"largest difference of an action from the CPU's {gap:.1e}", "at most 1e-3", gap <= 1e-3)


# -------------------------------------------------------------------------------------------------------- agreement


def agreement(cfg: PartConfig) -> Checks:
    """The same three steps on CPU and device in float32, from the same weights and samples; then features and actions
    of one batch. Differences are relative to the largest value.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cpu = PartConfig(torch.device("cpu"), cfg.size)
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in METHODS.items():
            flags = flags | {"mixed_precision": "no"}
            yield _tried(name, lambda name=name, flags=flags: _same_curve(cfg, cpu, folder, name, flags))
        trainer = prepared(cpu, folder, "outputs", mixed_precision="no")
    yield from _same_outputs("tiny", trainer.bare_model, cfg.device)
    if cfg.size == "full":
        yield from _same_outputs("full", random_policy("full"), cfg.device)


def _same_curve(cfg: PartConfig, cpu: PartConfig, folder: str, name: str, flags: dict) -> Check:
    curves = [losses(trained(where, folder, f"{name}{i}", **flags)) for i, where in enumerate((cpu, cfg))]
    gaps = [abs(a - b) / abs(a) for a, b in zip(*curves, strict=True)]
    found = f"relative differences of the loss {', '.join(f'{gap:.1e}' for gap in gaps)}"
    good = gaps[0] <= FORWARD and max(gaps) <= LATER
    return Check(name, found, f"first {FORWARD:g}, later {LATER:g}", good)


def _same_outputs(size: str, model: VLAPolicyModel, device: torch.device) -> Checks:
    model.eval()
    there = _outputs(model, torch.device("cpu"))
    here = _outputs(model.to(device), device)
    for name, a, b in zip(("C_R", "C_AQ", "actions"), there, here, strict=True):
        gap = float((a - b).abs().max() / a.abs().max())
        found = f"largest relative difference {gap:.1e}"
        yield Check(f"{name}, {size}", found, f"at most {FORWARD:g}", gap <= FORWARD)


@torch.no_grad()
def _outputs(model: VLAPolicyModel, device: torch.device) -> list[Tensor]:
    output = model(to_device(fixed_batch(model), device), CraftRequest())
    return [t.float().cpu() for t in (output.raw_latent_features, output.action_query_features, output.actions)]


# -------------------------------------------------------------------------------------------------------- precision


def precision(cfg: PartConfig) -> Checks:
    """Twenty steps of the shipped start on the same samples, in bf16 and in float32; and one forward pass."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("plain", "CRaFT `original`", "CRaFT `keep`"):
            flags = METHODS[name] | LORA | {"max_steps": 20}
            exact, low = (
                losses(trained(cfg, folder, name + kind, **flags, mixed_precision=kind)) for kind in ("no", "bf16")
            )
            gap = float(np.mean(np.abs(np.subtract(exact, low))) / np.mean(exact))
            found = f"mean difference of the loss {gap:.1%} of the mean loss {np.mean(exact):.4f}"
            yield Check(name, found, f"at most {BF16:.0%}", gap <= BF16)


# ----------------------------------------------------------------------------------------------------------- memory


def memory(cfg: PartConfig) -> Checks:
    """Time of a step and peak memory with random weights, LoRA 32, two images, bf16, from batch 1 to what fits. The
    prediction is that of `memory_table.py`: tensors alone, so that it is compared with what was allocated.
    """
    for name in ("plain", "CRaFT `original`", "CRaFT `budget`", "CRaFT `keep`, no old data"):
        yield from _measured_steps(cfg, name, ROWS[name])
    yield from _measured_steps(cfg, "plain, gradient checkpointing", ROWS["plain, gradient checkpointing"])


def _measured_steps(cfg: PartConfig, name: str, flags: dict) -> Checks:
    small = cfg.size != "full"
    tight = {"craft_retention_budget": 1e-6} if flags.get("use_craft") else {}  # so that the constraint acts
    run = published(flags | tight | ({"config_file_path": "tiny", "image_aug": False} if small else {}))
    run.device = cfg.device.type
    if cfg.device.type == "cpu":
        run.mixed_precision = "bf16"
    trace = _predicted(name, run, small)
    for batch in (1, 2, 4) if small else (1, 2, 4, 8, 16, 32):
        run.batch_size = batch
        try:
            seconds, peak = _steps(cfg.device, run)
        except torch.cuda.OutOfMemoryError:
            yield Check(f"{name}, batch {batch}", "does not fit", f"{peak_at(trace, BATCH, batch) / GIB:.2f} GiB")
            return
        predicted = peak_at(trace, BATCH, batch)
        found, good = f"{1000 * seconds:.0f} ms a step; peak not measured on a CPU", None
        if peak is not None:
            found = f"{1000 * seconds:.0f} ms a step, peak {peak / GIB:.2f} GiB"
            # Where single layers decide, a small batch is an extrapolation; the published one is judged.
            good = abs(predicted - peak) <= BETWEEN * peak if batch in (BATCH, 2 * BATCH) and not small else None
        yield Check(f"{name}, batch {batch}", found, f"{predicted / GIB:.2f} GiB", good)


def _predicted(name: str, run: FinetuneConfig, small: bool) -> Trace:
    file = ROOT / "results" / "memory" / "predicted.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() and not small else {}
    if name in record:
        return Trace(**record[name])
    run.batch_size = BATCH
    return trace_step(run, _empty(run))


def _empty(run: FinetuneConfig) -> VLAPolicyModel:
    model = empty_model(run)
    apply_tuning(model, run)
    return model


def _steps(device: torch.device, run: FinetuneConfig) -> tuple[float, int | None]:
    """Median seconds of a step, and the peak of tensors in bytes where the device counts it."""
    model = _empty(run)
    narrow(run, model)
    with torch.device(device):
        materialise(model)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
        for buffer in model.buffers():
            buffer.zero_()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def autocast() -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16)

    context = StepContext(model, optimizer, retention_of(run, model, autocast), autocast=autocast)
    batch = to_device(step_batch(run, model, prompt_tokens=64), device)
    cuda = device.type == "cuda"
    seconds = []
    for step in range(6 if cuda else 2):
        if step == 2 and cuda:  # the optimizer has its state, the method its buffers
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        optimizer_step(context, [batch], step)  # reads its metrics back, so it ends when the device has ended
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    del context, optimizer, model, batch
    if cuda:
        torch.cuda.empty_cache()
    return float(np.median(seconds[2 if cuda else 1 :])), peak


# -------------------------------------------------------------------------------------------------------- processes


def processes(cfg: PartConfig) -> Checks:
    """Two processes with half the batch each against one with the whole, on two cards with NCCL (on CPUs with gloo)."""
    cards = torch.cuda.device_count()
    if cfg.device.type == "cuda" and cards < 2:
        yield Check("two processes", f"needs two GPUs, this machine has {cards}")
        return
    for name in ("plain", "CRaFT `budget`"):
        with tempfile.TemporaryDirectory() as folder:
            one, two = (_launched(cfg, folder, METHODS[name], count) for count in (1, 2))
        gap = max(abs(a - b) / a for a, b in zip(one, two, strict=True))
        found = f"largest relative difference of a loss {gap:.1e}"
        yield Check(f"two processes, {name}", found, f"at most {LATER:g}", gap <= LATER)


def _launched(cfg: PartConfig, folder: str, flags: dict, count: int) -> list[float]:
    name = f"processes{count}"
    given = flags | {"config_file_path": START, "data_root_dir": str(DATA_ROOT), "dataset_name": NEW, "max_steps": 3}
    given |= {"batch_size": 4 // count, "mixed_precision": "no", "device": cfg.device.type, "craft_log_freq": 1}
    given |= {"run_root_dir": folder, "run_id_override": name, "image_aug": False, "save_training_state": False}
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    words += [str(ROOT / "vla-scripts" / "finetune.py"), *(w for k, v in given.items() for w in (f"--{k}", str(v)))]
    # One process on a machine with several cards must not take them all.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{count} process(es): {done.stderr.strip()[-300:]}")
    return losses(SimpleNamespace(setup=SimpleNamespace(run_dir=Path(folder) / name)))


# ---------------------------------------------------------------------------------------------- latency and rendering


def latency(cfg: PartConfig) -> Checks:
    """Milliseconds from pixels to a chunk of actions, batch 1, as `predict_action` makes it."""
    model = random_policy(cfg.size).to(cfg.device).eval()
    low = cfg.device.type == "cuda"
    with torch.autocast(cfg.device.type, torch.bfloat16) if low else nullcontext():
        plain, median = _timed(lambda: prediction(model))
        yield Check("plain", median)
        model.vla.compile(backend="inductor" if low else "aot_eager")
        compiled, median = _timed(lambda: prediction(model))
    yield Check("compiled", median)
    gap, scale = np.abs(plain - compiled).max(), np.abs(plain).max()
    allowed = 0.05 if low else FORWARD
    found = f"largest difference of an action {gap:.1e}, largest action {scale:.2f}"
    yield Check("compiled against plain", found, f"at most {allowed:g} of the largest", bool(gap <= allowed * scale))


def _timed(call: Callable[[], np.ndarray]) -> tuple[np.ndarray, str]:
    result, seconds = call(), []
    for _ in islice(iter(int, 1), 20):
        started = time.perf_counter()
        call()
        seconds.append(1000 * (time.perf_counter() - started))
    return result, f"median {np.median(seconds):.1f} ms, slowest of 20 {max(seconds):.1f} ms"


def rendering(cfg: PartConfig) -> Checks:
    """One LIBERO scene with EGL (on a CPU with OSMesa), against the stored mean colours."""
    os.environ["MUJOCO_GL"] = "egl" if cfg.device.type == "cuda" else "osmesa"
    try:
        from experiments.robot.doctor import render_reference
        from experiments.robot.libero import simulator
        from experiments.robot.libero.surroundings import SimulatorUnavailableError
    except ImportError as error:
        yield Check("colours", f"the simulator is not installed: {error}")
        return
    try:
        simulator.require(render=True)
    except SimulatorUnavailableError as error:
        yield Check("colours", str(error))
        return
    mode = render_reference.RenderMode.PUBLISHED
    stored = render_reference.load_reference()["modes"][mode.value]["libero_spatial"]
    found = render_reference.mean_colours("libero_spatial", mode)
    difference, camera = render_reference.largest_difference(found, stored)
    allowed = render_reference.TOLERANCE[os.environ["MUJOCO_GL"]]
    good = bool(abs(difference) <= allowed)
    yield Check("colours", f"{difference:+.2f} grey levels ({camera})", f"at most {allowed:g}", good)


PARTS: dict[str, Callable[[PartConfig], Checks]] = {
    part.__name__: part for part in (paths, agreement, precision, memory, processes, latency, rendering)
}
