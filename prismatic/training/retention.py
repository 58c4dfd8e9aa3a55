"""How a run keeps what the start model knew: `--retention_method` and what each method needs.

| method | what it does |
|---|---|
| none | plain fine-tuning |
| craft | the constraint on the bridge features (`craft_utils`) |
| feature_penalty | the same distance with a constant weight and no projection: learning without forgetting |
| l2sp | pulls the weights to the start weights (L2-SP, arXiv 1802.01483) |
| frozen | trains the action head, the proprio projector and the action queries only |

Interpolation with the start weights after training is `vla-scripts/interpolate_weights.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.craft_utils import CRaFTConfig, CRaFTConstraint, CRaFTWeightManager, unwrap
from prismatic.training.craft_utils.anchors import adapter_layers, adapter_parameter_names, quiet_pass
from prismatic.training.craft_utils.features import drift_of_parts, retention_loss
from prismatic.training.step import craft_request
from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.datasets.sampler import EpochSampler


def reaches_features(name: str) -> bool:
    """Whether a parameter of the policy can change the bridge features; head and proprio projector cannot."""
    return name.startswith("vla.")


def build_constraint(model: nn.Module, config: CRaFTConfig, accelerator: Accelerator) -> CRaFTConstraint:
    """The constraint on the prepared model; ValueError for a parallelism it cannot work with."""
    check_parallelism(accelerator)
    request = craft_request(config)

    def compute_features(bare: VLAPolicyModel, batch: dict):
        with accelerator.autocast():
            return bare.anchor_features(batch, request)

    return CRaFTConstraint(model, config, compute_features, reaches_features)


def check_parallelism(accelerator: Accelerator) -> None:
    """ValueError unless the model is whole in every process."""
    if accelerator.distributed_type is DistributedType.FSDP:
        version = getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1)
        raise ValueError(
            f"CRaFT with FSDP{version}: the retention gradient is taken with autograd.grad, which does not see sharded "
            "parameters. Use DDP (torchrun --nproc-per-node N); with --use_lora True the published size fits one GPU"
        )
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        raise ValueError("CRaFT with DeepSpeed is not supported: use DDP (torchrun --nproc-per-node N)")


class L2SPPenalty:
    """Gradient of weight / 2 * ||theta - theta_0||^2 over everything that reaches the features.

    For LoRA the difference is the product: ||scaling B A||^2, whose gradients are weight * scaling^2 * B (A A^T) and
    weight * scaling^2 * (B^T B) A. Added once per optimizer step and the same on every process.

    Args:
        module: the model, possibly wrapped by DDP.
        weight: strength, > 0.
    """

    def __init__(self, module: nn.Module, weight: float) -> None:
        bare, self.weight = unwrap(module), weight
        adapters = adapter_parameter_names(bare)
        self.weights = CRaFTWeightManager(bare, lambda name: reaches_features(name) and name not in adapters)
        named = dict(bare.named_parameters())
        self._pairs = [(named[name], initial) for name, initial in self.weights.state_dict().items()]
        self._layers = [layer for layer in adapter_layers(bare) if isinstance(layer, LoraLayer)]

    @torch.no_grad()
    def add_gradient(self) -> None:
        """In place p.grad += gradient of the penalty."""
        for parameter, initial in self._pairs:
            _add(parameter, self.weight * (parameter - initial))
        for layer in self._layers:
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    factor = self.weight * layer.scaling[name] ** 2
                    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                    flat_a, flat_b = a.flatten(1), b.flatten(1)
                    _add(b, factor * (flat_b @ (flat_a @ flat_a.T)).view_as(b))
                    _add(a, factor * ((flat_b.T @ flat_b) @ flat_a).view_as(a))


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(gradient)


class ProbeData:
    """Unlabelled images and prompts of another data set, for drift where the action loss does not look.

    Args:
        folder: data-set folder, `{root}/{name}`.
        setup: the run's setup: image size, number of images, tokenizer.
        seed: which samples are taken.
    """

    def __init__(self, folder: str, setup, seed: int) -> None:
        path = Path(folder)
        if not path.is_dir():
            raise FileNotFoundError(f"--craft_probe_data {folder}: not a data-set folder")
        settings = DatasetSettings(
            setup.action_spec,
            setup.image_spec,
            setup.num_images,
            image_aug=False,
            blind_images=setup.dataset.settings.blind_images,  # a blind run sees no image, here neither
        )
        self.dataset = VLADataset(path.parent, path.name, settings)
        self._collate = VLACollator(
            setup.processor.tokenizer, setup.processor.image_processor, setup.num_action_queries
        )
        self._seed = seed

    def fixed(self, size: int, batch_size: int, device: torch.device) -> list[dict]:
        """The same `size` samples every time, in batches."""
        sampler = iter(EpochSampler(len(self.dataset), self._seed))
        samples = [self.dataset[next(sampler)] for _ in range(min(size, len(self.dataset)))]
        batches = [self._collate(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]
        return [to_device(batch, device) for batch in batches]

    def stream(self, batch_size: int, accelerator: Accelerator, batches_done: int) -> Iterator[dict]:
        """Endless batches of this process, from the position after `batches_done` batches."""
        rank, world = accelerator.process_index, accelerator.num_processes
        sampler = EpochSampler(len(self.dataset), self._seed, rank, world)
        sampler.start_at(batches_done * batch_size)
        generator = torch.Generator().manual_seed(self._seed)
        loader = DataLoader(
            self.dataset, batch_size=batch_size, sampler=sampler, collate_fn=self._collate, generator=generator
        )
        for batch in loader:
            yield to_device(batch, accelerator.device)


class DriftProbe:
    """Drift of the features on fixed held-out batches, in eval mode. Features under theta_0 are computed once."""

    def __init__(self, craft: CRaFTConstraint, batches: list[dict]) -> None:
        self._craft, self._batches = craft, batches
        self._anchors: list | None = None

    def measure(self) -> dict[str, float]:
        """`CRaFT/Probe/Retention Loss` and the drift of each part, averaged over the probe samples."""
        if self._anchors is None:
            self._anchors = [self._craft.anchor_features(batch) for batch in self._batches]
            self._craft.forget_anchor_time()
        totals: dict[str, float] = {}
        count = sum(len(batch["input_ids"]) for batch in self._batches)
        for batch, anchor in zip(self._batches, self._anchors, strict=True):
            with quiet_pass(self._craft.module):
                features = self._craft.current_features(batch)
                values = {"Retention Loss": retention_loss(features, anchor, self._craft.config)}
                values |= drift_of_parts(features, anchor)
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(batch["input_ids"]) / count
        return {f"CRaFT/Probe/{name}": value for name, value in totals.items()}


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on a device."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
