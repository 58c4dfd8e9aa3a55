"""LoRA: which layers get adapters, the merged weights, and the proof that merging changed nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.model_files import CheckpointError, check_numbers, read_json, reading
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.checkpoint_files import load_tensors
from prismatic.training.frozen_weights import exact_frozen_weights

ADAPTER_PREFIX = "base_model.model."
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LARGEST_RANK = 4096
# Fields that change what adapters compute or name code, and the values under which they do neither.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
}


def load_adapter(bare: OpenVLAForActionPrediction, folder: Path) -> PeftModel:
    """`bare` with the adapters in `folder` (adapter_config.json, adapter_model.safetensors), in place.

    The description is read as data: base model, classes and modules that it names are not followed. Raises
    MissingFileError and CheckpointError, naming the file.
    """
    state, config = load_tensors(folder / ADAPTER_WEIGHTS), _read_adapter_config(folder / ADAPTER_CONFIG)
    with reading(folder):
        adapted = PeftModel(bare, config)
        result: Any = set_peft_model_state_dict(adapted, state)  # its annotation has no fields
        missing = result.missing_keys
    missing = [name for name in missing if ".lora_" in name]
    if missing:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: no weights of the adapters {sorted(missing)[:3]}")
    return adapted


def _read_adapter_config(file: Path) -> LoraConfig:
    values = read_json(file)
    for name, allowed in _PLAIN.items():
        if values.get(name) not in allowed:
            raise CheckpointError(f"{file}: {name} is {str(values.get(name))[:80]!r}, expected {allowed[0]!r}")
    rank, targets = values.get("r"), values.get("target_modules")
    if type(rank) is not int or not 1 <= rank <= _LARGEST_RANK:
        raise CheckpointError(f"{file}: r is {str(rank)[:80]!r}, expected a rank of 1 to {_LARGEST_RANK}")
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise CheckpointError(f"{file}: target_modules is {str(targets)[:80]!r}, expected a list of names")
    numbers = {name: values.get(name, 0) for name in ("lora_alpha", "lora_dropout")}
    check_numbers(numbers, str(file), 1e6)
    with reading(file):
        return LoraConfig(
            r=rank, target_modules=targets, use_rslora=bool(values.get("use_rslora")), inference_mode=True, **numbers
        )


def lora_targets(vla: OpenVLAForActionPrediction, skip_vision: bool = False) -> list[str]:
    """Names of all linear and convolution layers that the forward pass runs; `skip_vision` leaves the towers out.

    The language-model head, the attention pools and the last block of each vision tower are never executed: adapters
    there would get no gradient.
    """
    left_out = tuple(vla.unreached_module_names()) + (("vision_backbone.",) if skip_vision else ())
    return [name for name, _ in _adaptable(vla) if not name.startswith(left_out)]


def unused_targets(vla: OpenVLAForActionPrediction) -> list[str]:
    """The layers that published adapters cover beyond `lora_targets`."""
    unreached = tuple(vla.unreached_module_names())
    return [name for name, _ in _adaptable(vla) if name.startswith(unreached)]


def _adaptable(vla: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in vla.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and "lora_" not in n]


def with_unused_targets(state: dict[str, Tensor], vla: OpenVLAForActionPrediction, rank: int) -> dict[str, Tensor]:
    """Adapter file content plus what published files also hold: adapters of `unused_targets`, a copy of the LM head.

    Zero adapters change nothing; they let strict readers of the published layout find every key.
    """
    state = dict(state)
    for name in unused_targets(vla):
        layer = vla.get_submodule(name)
        assert isinstance(layer, nn.Linear)  # the patch embeddings are reached
        key = f"{ADAPTER_PREFIX}{name}"
        state[f"{key}.lora_A.weight"] = torch.zeros(rank, layer.in_features)
        state[f"{key}.lora_B.weight"] = torch.zeros(layer.out_features, rank)
    head = vla.get_output_embeddings().get_parameter("weight").detach().clone()
    state[f"{ADAPTER_PREFIX}language_model.lm_head.base_layer.weight"] = head
    return state


def merged_state_dict(base: nn.Module) -> dict[str, Tensor]:
    """State dict of a model with LoRA layers as if they were merged: W + scaling B A under the plain names.

    `base` is the model inside the PEFT wrapper; it is not changed. Tensors without an adapter are not copied.
    """
    # Any: every kind of layer has `get_delta_weight`, their common class does not.
    layers: dict[str, Any] = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    merged = {}
    for key, tensor in base.state_dict().items():
        if ".lora_" in key:
            continue
        owner, _, leaf = key.rpartition(".")
        name = owner.removesuffix(".base_layer")
        if leaf == "weight" and name in layers:
            for adapter in layers[name].active_adapters:
                tensor = tensor + layers[name].get_delta_weight(adapter).to(tensor)
        merged[f"{name}.{leaf}" if name in layers else key] = tensor.detach()
    return merged


def verify_merge(adapted: VLAPolicyModel, merged: VLAPolicyModel, tolerance: float) -> float:
    """Largest difference of the normalised actions on a fixed batch of two; both models end as they began.

    Raises ValueError above `tolerance` or when an output is not finite.
    """
    first, second = _fixed_outputs(adapted), _fixed_outputs(merged)
    difference = float((first - second).abs().max())
    if not difference <= tolerance:
        raise ValueError(
            f"LoRA merge: the merged model's actions differ from the adapted model's by up to {difference:.3g}, "
            f"allowed are {tolerance:.3g}"
        )
    return difference


@torch.no_grad()
def _fixed_outputs(model: VLAPolicyModel) -> Tensor:
    """Normalised actions (2, K, A) fp32 on the CPU for a batch that depends on the model's sizes only."""
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in fixed_batch(model).items()}
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with exact_frozen_weights(model):
            actions: Tensor = model(batch).actions.float().cpu()
            return actions
    finally:
        for module in training:
            module.training = True


def fixed_batch(model: VLAPolicyModel, rows: int = 2, prompt_length: int = 24) -> dict[str, Tensor]:
    """A batch of noise images, random prompt ids and random states; the global generators are not used."""
    generator = torch.Generator().manual_seed(0)
    vision, config = model.vla.vision_backbone, model.vla.config
    size, channels = vision.featurizer.spec.image_size, 3 * len(vision.towers) * model.num_images
    slots = model.num_action_queries
    mask = torch.zeros(rows, prompt_length + slots, dtype=torch.bool)
    mask[:, prompt_length:] = True
    batch = {
        "input_ids": torch.randint(config.text_config.vocab_size, mask.shape, generator=generator),
        "attention_mask": torch.ones_like(mask),
        "action_mask": mask,
        "pixel_values": torch.randn(rows, channels, size, size, generator=generator),
    }
    if model.proprio_projector is not None:
        proprio = torch.rand(rows, model.proprio_projector.proprio_dim, generator=generator)
        batch["proprio"] = 2 * proprio - 1
    return batch
