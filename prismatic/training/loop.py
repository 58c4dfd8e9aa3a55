"""The training loop: batches in, checkpoints and metrics out. All periodic work counts optimizer steps."""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from prismatic.evidence.files import write_json
from prismatic.model_files import read_json
from prismatic.progress import Progress, say
from prismatic.training.checkpoint_folder import MANIFEST
from prismatic.training.compilation import compile_policy
from prismatic.training.config import FinetuneConfig
from prismatic.training.ema import WeightAverage
from prismatic.training.faults import batches_of, explained_faults
from prismatic.training.first_batch import write_first_batch
from prismatic.training.frozen_weights import narrow_frozen_weights
from prismatic.training.processes import product_dtype_of
from prismatic.training.resumed_flags import check_resumed_flags, check_same_start
from prismatic.training.retention.craft import CRaFT
from prismatic.training.retention.drift_monitor import DriftMonitor
from prismatic.training.retention.landing import SAMPLES, Landing
from prismatic.training.retention.memory import to_device
from prismatic.training.retention.methods import build_retention, monitored_batches
from prismatic.training.run_folder import FLAGS, clear_run_folder
from prismatic.training.saving import CheckpointSaver, folder_to_resume
from prismatic.training.step import StepContext, optimizer_step
from prismatic.training.stop_signal import StopSignal, ignore_stop_signals
from prismatic.training.throughput import Throughput, throughput_text
from prismatic.training.tracking import MetricsFile, Tracker
from prismatic.training.training_setup import TrainingSetup
from prismatic.training.training_state import TrainingState, restore_training_state
from prismatic.training.validation import ValidationSettings, Validator
from prismatic.training.writers import RunFacts, open_writers, services_of
from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.datasets.sampler import EpochSampler


class Trainer:
    """Fine-tunes a policy. `fit()` runs to `max_steps`; everything else is one step of it.

    Args:
        cfg: the flags.
        setup: model, processor, data set and action specification of the run.
        accelerator: device, processes and mixed precision.
    """

    def __init__(self, cfg: FinetuneConfig, setup: TrainingSetup, accelerator: Accelerator) -> None:
        self.cfg, self.setup, self.accelerator = cfg, setup, accelerator
        self.bare_model = setup.model
        if cfg.compile:
            compile_policy(setup.model, cfg)
        if (dtype := product_dtype_of(accelerator)) is not None:
            narrow_frozen_weights(setup.model, dtype)
        self.model = accelerator.prepare(setup.model)
        # After `prepare`: DDP has broadcast rank 0's weights, so the snapshot is the same on every rank.
        self.retention = build_retention(cfg, self.model, setup, accelerator, self._collator())
        self.monitor = self._build_monitor()
        reduce_mean = self._reduce_mean if accelerator.num_processes > 1 else None
        self.landing = Landing(self._craft, reduce_mean) if cfg.craft_land else None
        self.ema = None if cfg.ema_decay is None else WeightAverage(self.bare_model, cfg.ema_decay)
        self.validator = self._build_validator()
        self.throughput = Throughput(self._samples_per_step, accelerator.device)
        self.optimizer = self._build_optimizer()
        self.scaler = self._build_scaler()
        self.sampler = self._first_samples()
        self.step = 0
        self._resumed_at = 0, 0  # step and samples seen until then
        self._constraint_metrics: dict[str, float] = {}
        seed_everything(cfg.seed + accelerator.process_index)
        self.saver = CheckpointSaver(cfg, setup, accelerator, say)
        self._resume()
        if accelerator.is_main_process:
            clear_run_folder(cfg)  # after all that can refuse the run
        self.tracker = self._build_tracker() if accelerator.is_main_process else None

    def fit(self) -> None:
        """Train from the current step to `max_steps`, logging and saving on the way and at the end.

        SIGTERM and SIGUSR1 end it after the step in progress, with a checkpoint.
        """
        self._announce()
        self.model.train()
        batches = self.batches()
        try:
            with (
                StopSignal(self.accelerator) as stop,
                explained_faults(self.cfg, self.accelerator.num_processes),
                self.saver,
                closing(batches),  # ends the data workers
                Progress(self.cfg.max_steps, "fine-tuning", "steps", done=self.step) as progress,
            ):
                while self.step < self.cfg.max_steps:
                    metrics = self._train_one_step(batches)
                    self._land()
                    self._log(metrics | self._validate())
                    stopping = stop.agreed()
                    self._save_when_due(stopping)
                    progress.advance()
                    if stopping:
                        break
                self._say_verdict()
        finally:
            if self.tracker is not None:
                self.tracker.close()

    def _train_one_step(self, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
        learning_rate = self.cfg.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with self.throughput.step():
            with self.throughput.waiting_for_data():
                micro_batches = list(islice(batches, self.cfg.grad_accumulation_steps))
            if self.step == 0:
                self._show(micro_batches[0])
            metrics = optimizer_step(self.step_context(), micro_batches, self.step)
            if self.ema is not None:
                self.ema.update()
        measured = {k: v for k, v in metrics.items() if k.startswith("CRaFT/")}
        self._warn_out_of_reach(metrics)
        if measured:
            # Steps between two constrained ones report the last measurement and where it was made.
            self._constraint_metrics = measured | {"CRaFT/Measured Step": self.step + 1}
        self.step += 1
        return self._constraint_metrics | metrics | {"VLA Train/Learning Rate": learning_rate}

    def _show(self, batch: dict[str, Any]) -> None:
        """Write the first batch beside the metrics; a run that is continued has done so."""
        if self.tracker is None:
            return
        cameras = self.setup.dataset.cameras.get(batch["dataset_names"][0], ())
        try:
            write_first_batch(self.setup.run_dir, batch, self.setup.processor.image_processor, cameras)
        except Exception as error:  # whatever fails there, the training is what counts
            self.tracker.message(f"WARNING: the first batch is not shown ({type(error).__name__}: {error})")

    def _warn_out_of_reach(self, metrics: dict[str, float]) -> None:
        """One line when the budget proves to be out of reach."""
        name = "CRaFT/Out Of Reach"
        if metrics.get(name) and not self._constraint_metrics.get(name) and self.tracker is not None:
            self.tracker.message(f"Warning: {self._craft.out_of_reach_warning()}")

    def _validate(self) -> dict[str, float]:
        """Action error on the held-out episodes, of the weights that a checkpoint would hold; {} between two times."""
        if self.validator is None or not self._is_validated(self.step):
            return {}
        reduce_sum = self._reduce_sum if self.accelerator.num_processes > 1 else None
        with self._state().policy_weights():
            return self.validator.measure(self.bare_model, self.accelerator.autocast, reduce_sum)

    def step_context(self) -> StepContext:
        """The objects of one optimizer step."""
        return StepContext(
            model=self.model,
            optimizer=self.optimizer,
            retention=None if self.retention is None else self.retention.at(self.step),
            scaler=self.scaler,
            measure_updates=self._is_logged(self.step + 1),
            max_grad_norm=self.cfg.max_grad_norm,
            no_sync=lambda: self.accelerator.no_sync(self.model),
            autocast=self.accelerator.autocast,
            reduce_mean=self._reduce_mean if self.accelerator.num_processes > 1 else None,
        )

    def _save_when_due(self, stopping: bool) -> None:
        self.saver.check()
        if stopping and self.tracker is not None:
            self.tracker.message(f"Asked to stop: saving step {self.step}; --resume auto continues from it")
        if stopping or self.step % self.cfg.save_freq == 0 or self.step == self.cfg.max_steps:
            self.save()

    def save(self) -> None:
        """Write the checkpoint of the current step (main process), or start to with `--async_save True`."""
        self.accelerator.wait_for_everyone()
        if self.tracker is not None:
            self.tracker.sync()  # a checkpoint never outlives the metrics of its steps
        self.saver.save(self._state())

    @property
    def samples_seen(self) -> int:
        """Samples used so far by all processes; batch size and processes may have changed at resume."""
        step, samples = self._resumed_at
        return samples + (self.step - step) * self._samples_per_step

    @property
    def _samples_per_step(self) -> int:
        samples: int = self.cfg.batch_size * self.cfg.grad_accumulation_steps * self.accelerator.num_processes
        return samples

    def _state(self) -> TrainingState:
        return TrainingState(
            self.step,
            self.samples_seen,
            self.optimizer,
            retention=self.retention,
            ema=self.ema,
            landing=self.landing,
            scaler=self.scaler,
            constraint_metrics=self._constraint_metrics,
            sampler=self.sampler.state_dict(self.samples_seen),
        )

    def _resume(self) -> None:
        folder = folder_to_resume(self.cfg, self.accelerator, say)
        if folder is None:
            return
        manifest, base = read_json(folder / MANIFEST), self.setup.base
        heard = say if self.accelerator.is_main_process else lambda _: None
        check_resumed_flags(self.cfg, manifest.get("training", {}), folder, heard)
        check_same_start(self.cfg, manifest.get("start"), None if base is None else base.sha256, folder)
        state, rank, world = self._state(), self.accelerator.process_index, self.accelerator.num_processes
        self.step = restore_training_state(folder, self.setup, state, rank)
        self._resumed_at = state.step, state.samples_seen
        self._constraint_metrics = state.constraint_metrics
        self.sampler.load_state_dict(state.sampler or self.sampler.state_dict(state.samples_seen))
        assert state.generators is not None  # filled in by `restore_training_state`
        if len(state.generators) != world and self.accelerator.is_main_process:
            say(
                f"{folder.name} was saved by {len(state.generators)} processes, this run has {world}: generators of "
                "new ranks start from the seed"
            )

    def _build_monitor(self) -> DriftMonitor | None:
        if self.cfg.craft_probe_data is None:
            return None
        return DriftMonitor(self._craft, monitored_batches(self.cfg, self.setup, self._collator(), self.accelerator))

    def _land(self) -> None:
        """After the last step: go back to the budget, on fixed samples of the memories."""
        if self.landing is None or self.step != self.cfg.max_steps:
            return
        per_batch = sum(m.size or self.cfg.batch_size for m in self._craft.memories)
        count = math.ceil(SAMPLES / (per_batch * self.accelerator.num_processes))
        with closing(self._batches(self._first_samples())) as batches:
            scale = self.landing.land(self._craft.memory_batches(batches, count))
        if self.tracker is not None:
            self.tracker.message(
                f"CRaFT: landed at {scale:.3f} of the way from the start weights, drift {self.landing.drift:.3g}"
            )

    @property
    def _craft(self) -> CRaFT:
        """The method of a run whose flags ask for what only the constraint has."""
        assert isinstance(self.retention, CRaFT)
        return self.retention

    def _say_verdict(self) -> None:
        verdict = None if self.retention is None else self.retention.verdict()
        if self.tracker is not None and verdict is not None:
            self.tracker.message(verdict)

    def _first_samples(self) -> EpochSampler:
        """This process's share of the order of samples, from its beginning."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        data = self.setup.dataset
        return EpochSampler(data.group_sizes, self.cfg.seed, rank, world, data.weights)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.bare_model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.cfg.learning_rate, weight_decay=self.cfg.weight_decay, fused=True)

    def _build_scaler(self) -> torch.amp.GradScaler | None:
        if self.accelerator.mixed_precision != "fp16":
            return None
        scaler = torch.amp.GradScaler(self.accelerator.device.type)
        scaler.scale(torch.zeros(1, device=self.accelerator.device))  # makes its state, which a step reads
        return scaler

    def _build_tracker(self) -> Tracker:
        cfg, folder = self.cfg, self.setup.run_dir
        facts = RunFacts(folder, cfg.run_id, self.step, cfg.wandb_project, cfg.wandb_entity, cfg.to_dict(), "ft+")
        services = open_writers(services_of(cfg), facts)
        return Tracker([MetricsFile(folder, self.step), *services])

    def batches(self) -> Generator[dict[str, Any], None, None]:
        """Endless batches on the training device, from the sampler's position."""
        return self._batches(self.sampler)

    def _batches(self, sampler: EpochSampler) -> Generator[dict[str, Any], None, None]:
        loader = DataLoader(
            self.setup.dataset,
            batch_size=self.cfg.batch_size,
            sampler=sampler,
            num_workers=self.cfg.num_data_workers,
            collate_fn=self._collator(),
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=ignore_stop_signals,
            # Its own generator: the loader draws a seed when it starts, which would shift the model's noise at resume.
            generator=torch.Generator().manual_seed(self.cfg.seed),
        )
        for batch in batches_of(loader):
            yield to_device(batch, self.accelerator.device)

    def _collator(self) -> VLACollator:
        return VLACollator.of_policy(self.setup.processor, self.setup.model)

    def _build_validator(self) -> Validator | None:
        cfg, accelerator = self.cfg, self.accelerator
        if self.setup.val_dataset is None:
            return None
        settings = ValidationSettings(
            batch_size=cfg.batch_size,
            num_batches=cfg.val_batches,
            seed=cfg.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=cfg.num_data_workers,
        )
        return Validator(self.setup.val_dataset, self._collator(), settings, accelerator.device)

    def _reduce_sum(self, tensor: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return total

    def _reduce_mean(self, tensor: Tensor) -> Tensor:
        mean: Tensor = self.accelerator.reduce(tensor, reduction="mean")
        return mean

    def _is_logged(self, steps_done: int) -> bool:
        if self.validator is not None and self._is_validated(steps_done):
            return True
        return steps_done % self.cfg.log_freq == 0 or steps_done in (1, self.cfg.max_steps)

    def _is_validated(self, steps_done: int) -> bool:
        return steps_done % self.cfg.val_freq == 0 or steps_done == self.cfg.max_steps

    def _log(self, metrics: dict[str, float]) -> None:
        if not self._is_logged(self.step) or self.tracker is None:
            return
        if self.monitor is not None:
            with self._state().policy_weights():
                metrics = metrics | self.monitor.measure()
        metrics = {**metrics, "samples_seen": self.samples_seen, **self.throughput.measure()}
        self.tracker.log(self.step, metrics)
        line = f"step {self.step:>6}  loss {metrics['VLA Train/Loss']:.4f}  {throughput_text(metrics)}"
        if "VLA Val/Loss" in metrics:
            line += f"  val loss {metrics['VLA Val/Loss']:.4f}"
        if "CRaFT/Lambda" in metrics:
            line += f"  L_ret {metrics['CRaFT/Retention Loss']:.3e}  lambda {metrics['CRaFT/Lambda']:.3f}"
        if "CRaFT/Conflict Ratio" in metrics:
            line += (
                f"  conflict {metrics['CRaFT/Conflict Ratio']:.2f}  cos {metrics['CRaFT/Gradient Cosine']:+.2f}"
                f"  shed {metrics['CRaFT/Shed Energy']:.1%}"
            )
        self.tracker.message(line)

    def _announce(self) -> None:
        if self.tracker is None:
            return
        write_json(self.setup.run_dir / FLAGS, self.cfg.to_dict())
        write_json(self.setup.run_dir / "data_manifest.json", self.setup.dataset.manifest())
        trainable = sum(p.numel() for p in self.bare_model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.bare_model.parameters())
        self.tracker.message(
            f"Run {self.cfg.run_id}: {trainable:,} of {total:,} parameters trainable ({self.cfg.tuning_mode.value}), "
            f"{len(self.setup.dataset):,} samples, from step {self.step} to {self.cfg.max_steps}"
        )
        if self.cfg.replay_data is not None:
            self.tracker.message(
                f"Replay: {self.cfg.replay_fraction:g} of the samples from {self.cfg.replay_data}, "
                f"labels of {'the start policy' if self.cfg.replay_labels == 'start' else 'the data'}"
            )
        for line in [] if self.retention is None else self.retention.banner():
            self.tracker.message(line)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)
