"""How a run keeps what the start model could do: from flags to a method of the optimizer step.

| method | what it does |
|---|---|
| none | plain fine-tuning |
| craft | the constraint on what the policy says or does (`craft.py`) |
| feature_penalty | the same distance with a constant weight and no projection: learning without forgetting |
| l2sp | pulls the weights to the start weights (`l2sp.py`) |
| frozen | trains the action head, the proprio projector and the action queries only |

Beside each: `--replay_data` mixes old samples into the batches. Beside none: `--replay_text` goes on training the
language model on text (`text.py`). Interpolation with the start weights after training is
`vla-scripts/interpolate_weights.py`.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from prismatic.training.config import FinetuneConfig, RetentionMethod
from prismatic.training.retention.craft import CRaFT
from prismatic.training.retention.l2sp import L2SP
from prismatic.training.retention.memory import MEMORY_KINDS, Memory, MemoryInputs, to_device
from prismatic.training.retention.observed import observations
from prismatic.training.retention.protocol import Retention
from prismatic.training.retention.replay import DistilledReplay
from prismatic.training.retention.signals import SIGNALS
from prismatic.training.retention.text import TextReplay
from prismatic.training.training_setup import TrainingSetup
from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.datasets.sampler import EpochSampler

_NEW_HEADS = ("random", "llm", "native", "vlm")


def build_retention(
    cfg: FinetuneConfig, model: nn.Module, setup: TrainingSetup, accelerator: Accelerator, collate: VLACollator
) -> Retention | None:
    """The method of a run on the prepared model, None for plain fine-tuning. Nothing is written.

    Raises ValueError or FileNotFoundError for flags, files or a parallelism it cannot work with.
    """
    if cfg.retention is RetentionMethod.L2SP:
        return L2SP(model, cfg.l2sp_weight)
    if cfg.replay_data is not None and cfg.replay_labels == "start":
        _check_skill("--replay_labels start", cfg, setup, "replay the labels of the data (--replay_labels data)")
        return DistilledReplay(model, accelerator.autocast)
    if cfg.replay_text is not None:
        tokens = TextReplay.read(cfg.replay_text, setup.processor.tokenizer)
        key = cfg.seed, accelerator.process_index
        return TextReplay(model, tokens, cfg.replay_text_weight, accelerator.autocast, key)
    if not cfg.retention.measures_drift:
        return None
    check_parallelism(accelerator)
    config = cfg.craft_config()
    if SIGNALS[config.signal].needs_skill:
        _check_skill(f"--craft_signal {config.signal.value}", cfg, setup, "hold the features (--craft_signal features)")
    assert cfg.craft_every is not None  # resolved with the preset
    return CRaFT(model, config, build_memories(cfg, setup, accelerator, collate), accelerator, cfg.craft_every)


def _check_skill(flag: str, cfg: FinetuneConfig, setup: TrainingSetup, instead: str) -> None:
    if setup.origin in _NEW_HEADS:
        raise ValueError(
            f"{flag}: the start {cfg.config_file_path} has a new action head, which has no skill to keep; start from "
            f"a trained policy, or {instead}"
        )


def build_memories(
    cfg: FinetuneConfig, setup: TrainingSetup, accelerator: Accelerator, collate: VLACollator
) -> list[Memory]:
    """The memories that `--craft_memory` names, in its order, without those that say that they are not needed."""
    inputs = MemoryInputs(cfg, setup, collate, accelerator.process_index, accelerator.num_processes)
    built: dict[str, Memory] = {}
    for name, kind in MEMORY_KINDS.items():  # `instructions` look at `data`, whatever the flag's order
        if name in cfg.memories and (memory := kind.build(inputs, list(built.values()))) is not None:
            built[name] = memory
    return [built[name] for name in cfg.memories if name in built]


def monitored_batches(
    cfg: FinetuneConfig, setup: TrainingSetup, collate: VLACollator, accelerator: Accelerator
) -> list[dict[str, Any]]:
    """The `--craft_probe_size` samples of `--craft_probe_data` on which the drift is watched, always the same."""
    assert cfg.craft_probe_data is not None
    dataset = observations("--craft_probe_data", cfg.craft_probe_data, setup, cfg, image_aug=False)
    sampler = iter(EpochSampler(len(dataset), cfg.seed))
    samples = [dataset[next(sampler)] for _ in range(min(cfg.craft_probe_size, len(dataset)))]
    batches = [collate(samples[i : i + cfg.batch_size]) for i in range(0, len(samples), cfg.batch_size)]
    return [to_device(batch, accelerator.device) for batch in batches]


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
