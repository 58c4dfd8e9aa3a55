"""From flags to the objects of a run: start model, trainable weights, data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from prismatic.command_line import split_places
from prismatic.craft.reference import adapter_layers
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.model_files import CheckpointError, has_weights
from prismatic.models.native import check_native_config, load_native_weights
from prismatic.models.packaged_language import load_language_model_
from prismatic.models.presets import (
    PRESETS,
    build_config,
    build_new_parts,
    build_policy_parts,
    build_processor,
    get_preset,
    image_spec_of,
    packaged_file,
)
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.progress import say
from prismatic.training.base_model import BaseModel
from prismatic.training.checkpoint_files import load_processor, read_config
from prismatic.training.checkpoint_folder import MANIFEST
from prismatic.training.checkpoints import load_checkpoint
from prismatic.training.config import FinetuneConfig, TuningMode
from prismatic.training.data_sets import open_data, open_old_data
from prismatic.training.folder_kinds import is_vlm
from prismatic.training.instruction_record import recorded_instructions
from prismatic.training.lora import lora_targets
from prismatic.training.published import check_exportable
from prismatic.training.training_setup import TrainingSetup
from prismatic.training.vlm_folder import load_vlm
from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.datasets.registry import expand_data_set_names, get_data_set_config, load_data_set_file
from prismatic.vla.datasets.replay import ReplayMixture
from prismatic.vla.images import ImageSpec
from prismatic.vla.prompts import PromptKind


@dataclass
class StartModel:
    """A policy to start from, with the objects that travel with it.

    `base` identifies the weights for adapters, None for random ones; `origin` is where the weights came from: `random`,
    `llm` (random but for the language model), `native` (a Prismatic VLM), `vlm` (a folder like OpenVLA's), `published`
    or `craft` (a checkpoint of this code).
    `instructions` are those it was trained on, {data set name: sentences}, as far as they are recorded.
    """

    model: VLAPolicyModel
    processor: PrismaticProcessor
    action_spec: ActionSpec
    image_spec: ImageSpec
    base: BaseModel | None
    origin: str
    statistics: dict[str, Any] = field(default_factory=dict)
    dataset_metadata: dict[str, Any] = field(default_factory=dict)
    instructions: dict[str, list[str]] = field(default_factory=dict)


def build_setup(
    cfg: FinetuneConfig, start_model: Callable[[FinetuneConfig], StartModel] | None = None
) -> TrainingSetup:
    """Load or make the start model, choose its trainable weights and open the data set.

    `start_model` makes the start in another way than `load_start_model`.

    Raises ValueError when a flag contradicts the start model, FileNotFoundError for missing files.
    """
    if cfg.data_set_file is not None:
        load_data_set_file(cfg.data_set_file)
    start = (start_model or load_start_model)(cfg)
    _check_flags(cfg, start)
    _compare_specs(cfg, start.action_spec)
    apply_tuning(start.model, cfg)
    settings = DatasetSettings(
        action_spec=start.action_spec,
        image_spec=start.image_spec,
        num_images=start.model.num_images,
        image_aug=cfg.image_aug,
        blind_images=cfg.blind_images,
        proprio_dropout=cfg.proprio_dropout,
        seed=cfg.seed,
        subset_seed=cfg.subset_seed,
        n_shot_episodes=cfg.n_shot_episodes,
        frame_stride=cfg.frame_stride,
        split=cfg.split,
        skip_bad_episodes=cfg.skip_bad_episodes,
        val_fraction=cfg.val_fraction if cfg.use_val_set and cfg.val_split is None else 0.0,
        # What the start can do is in its units: a name that it knows keeps them, in training, replay and memory.
        known_statistics=start.statistics,
    )
    new = open_data("--dataset_name", cfg.data_root_dir, cfg.dataset_name, settings)
    dataset = new if cfg.replay_data is None else _with_replay(cfg, new)
    # Random crops in training go with the centre crop at evaluation: both show 90 % of the image.
    start.image_spec = replace(start.image_spec, center_crop=cfg.image_aug, **_jpeg_quality(new.metadata))
    return TrainingSetup(
        model=start.model,
        processor=start.processor,
        dataset=dataset,
        action_spec=start.action_spec,
        image_spec=start.image_spec,
        dataset_metadata=dataset.metadata | start.dataset_metadata | new.metadata,
        # The start model's statistics stay: its own tasks are still evaluated with them.
        statistics=start.statistics | dataset.statistics,
        base=start.base,
        origin=start.origin,
        run_dir=Path(cfg.run_root_dir) / cfg.run_id,
        val_dataset=_held_out(cfg, new) if cfg.use_val_set else None,
        start_instructions=start.instructions,
    )


def _with_replay(cfg: FinetuneConfig, new: VLADataset) -> ReplayMixture:
    """The new data with `--replay_data` mixed in."""
    settings = replace(new.settings, n_shot_episodes=None, val_fraction=0.0)
    assert cfg.replay_data is not None
    folders = split_places(cfg.replay_data) or [cfg.replay_data]
    old = [open_old_data("--replay_data", folder, settings) for folder in folders]
    return ReplayMixture(new, old, cfg.replay_fraction)


def _held_out(cfg: FinetuneConfig, training: VLADataset) -> VLADataset:
    """The episodes that `training` leaves out, or another split, without augmentation, normalised as it is."""
    settings = replace(training.settings, image_aug=False, proprio_dropout=0.0, normalizer=training.normalizers)
    place = cfg.data_root_dir, cfg.dataset_name
    if cfg.val_split is None:  # the same episodes, of which all was said
        return open_data("--use_val_set", *place, replace(settings, part="val"), training.warnings)
    return open_data("--val_split", *place, replace(settings, split=cfg.val_split, n_shot_episodes=None))


def load_start_model(cfg: FinetuneConfig) -> StartModel:
    """The model named by `--config_file_path`, or the native Prismatic VLM named by `--vlm_path`.

    `--config_file_path` is a checkpoint folder (ours or published), a folder with a VLM alone (OpenVLA's), a preset
    with random weights, or, together with `--vlm_path`, a preset or a folder with configuration and tokenizer files
    only.
    """
    source = cfg.config_file_path.rstrip("/")
    if cfg.vlm_path:
        return _native_start(cfg, source)
    if source in PRESETS:
        return _random_start(cfg, source)
    if is_vlm(Path(source)):
        return _vlm_start(cfg, Path(source))
    try:
        loaded = load_checkpoint(
            source, cfg.num_images_in_input, cfg.base_checkpoint, cfg.robot_platform, cfg.dataset_name
        )
    except CheckpointError as error:
        presets = "" if Path(source).is_dir() else f"; presets: {', '.join(sorted(PRESETS))}"
        raise type(error)(f"--config_file_path: {error}{presets}") from error
    return StartModel(
        loaded.model,
        loaded.processor,
        ActionSpec.from_dict(loaded.manifest["action_spec"]),
        ImageSpec.from_dict(loaded.manifest["image_spec"]),
        BaseModel.of_checkpoint(Path(source)),
        # Weights that started from published ones keep their conventions, so the record keeps their origin.
        "published" if loaded.manifest.get("origin") == "published" else "craft",
        loaded.statistics,
        loaded.manifest["datasets"],
        recorded_instructions(loaded.manifest, loaded.path / MANIFEST),
    )


def _random_start(cfg: FinetuneConfig, preset: str) -> StartModel:
    """A preset: weights drawn from the seed, but for the language model of a preset that has one."""
    processor = build_processor(preset, cfg.tokenizer_path)
    spec, config = action_spec_of_data(cfg), with_images(build_config(preset), cfg)
    options = get_preset(preset).head | head_flags(cfg, spec)
    model = VLAPolicyModel(
        *build_policy_parts(config, cfg.seed, spec.proprio_dim, **options), legacy_slices=bool(cfg.legacy_slices)
    )
    file = packaged_file(preset)
    if file is not None:
        load_language_model_(model.vla.language_model, file)
    return StartModel(model, processor, spec, image_spec_of(preset), None, "random" if file is None else "llm")


def _vlm_start(cfg: FinetuneConfig, path: Path) -> StartModel:
    """The VLM of a folder without a head, with new action queries, head and proprio projector, drawn from the seed."""
    spec = action_spec_of_data(cfg)
    try:
        vla, unused = load_vlm(path, cfg.num_images_in_input)
        processor = load_processor(path, vla)
    except CheckpointError as error:
        raise type(error)(f"--config_file_path: {error}") from error
    if unused:
        say(f"--config_file_path {path}: stored, but not used: {', '.join(unused)}")
    head, projector = build_new_parts(vla, cfg.seed, spec.proprio_dim, **head_flags(cfg, spec))
    model = VLAPolicyModel(vla, head, projector, legacy_slices=bool(cfg.legacy_slices))
    image = ImageSpec(size=vla.config.tower_specs()[0].image_size)
    return StartModel(model, processor, spec, image, BaseModel.of_vlm(path), "vlm")


def _native_start(cfg: FinetuneConfig, source: str) -> StartModel:
    """A native VLM with new action queries, head and proprio projector, drawn from the seed."""
    config = native_config(cfg, source)
    is_preset = source in PRESETS
    processor = build_processor(source, cfg.tokenizer_path) if is_preset else PrismaticProcessor.from_pretrained(source)
    check_native_config(cfg.vlm_path, config)
    spec = action_spec_of_data(cfg)
    vla, head, projector = build_policy_parts(config, cfg.seed, spec.proprio_dim, **head_flags(cfg, spec))
    report = load_native_weights(vla, cfg.vlm_path)
    model = VLAPolicyModel(vla, head, projector, legacy_slices=bool(cfg.legacy_slices))
    image = ImageSpec(size=config.tower_specs()[0].image_size)
    base = BaseModel.of_native(report.file, report.sha256)
    return StartModel(model, processor, spec, image, base, "native")


def native_config(cfg: FinetuneConfig, source: str) -> OpenVLAConfig:
    """Configuration that goes with `--vlm_path`: of a preset, or of a folder without weights."""
    if source in PRESETS:
        config = build_config(source)
    elif (Path(source) / "config.json").is_file() and not has_weights(Path(source)):
        config = read_config(Path(source))
    else:
        raise ValueError(
            f"--config_file_path {source}: with --vlm_path expected a preset or a folder with config.json, tokenizer "
            "and preprocessor files and no weights"
        )
    return with_images(config, cfg)


def with_images(config: OpenVLAConfig, cfg: FinetuneConfig) -> OpenVLAConfig:
    """A new head is made for the number of images that the command line names."""
    if cfg.num_images_in_input is not None:
        config.num_images_in_input = cfg.num_images_in_input
    return config


def action_spec_of_data(cfg: FinetuneConfig) -> ActionSpec:
    """Sizes of the robot that a new head is made for; ValueError when the data sets are of different ones."""
    names = expand_data_set_names(cfg.dataset_name)
    specs = {name: get_data_set_config(name).action_spec for name in names}
    if len(set(specs.values())) != 1:
        raise ValueError(f"--dataset_name {cfg.dataset_name}: one new head cannot serve robots as different as {specs}")
    return next(iter(specs.values()))


def _compare_specs(cfg: FinetuneConfig, start: ActionSpec) -> None:
    """Say where a data set is registered for other chunks or another normalisation than the start model has."""
    for name in expand_data_set_names(cfg.dataset_name):
        spec = get_data_set_config(name).action_spec
        if (spec.chunk_len, spec.normalization) != (start.chunk_len, start.normalization):
            say(
                f"Warning: --dataset_name: {name} is registered with chunks of {spec.chunk_len} actions and "
                f"{spec.normalization.value}; the start model keeps its own, {start.chunk_len} and "
                f"{start.normalization.value}"
            )


def head_flags(cfg: FinetuneConfig, spec: ActionSpec) -> dict[str, Any]:
    """Options of a new head that the data and the command line decide."""
    flags: dict[str, Any] = {"action_dim": spec.action_dim, "chunk_len": spec.chunk_len}
    flags |= {} if cfg.use_pro_version is None else {"use_pro_version": cfg.use_pro_version}
    if cfg.legacy_slices:
        flags |= {"rope_mode": "legacy", "chunk_start": "zeros", "published_layout": True}
    return flags


def apply_tuning(model: VLAPolicyModel, cfg: FinetuneConfig) -> None:
    """Set `requires_grad` (and add LoRA adapters, in place) as the tuning mode says.

    The action queries, the head and the proprio projector are trained in every mode.
    """
    _freeze_unreached(model.vla)
    if cfg.freeze_vision:
        model.vla.vision_backbone.requires_grad_(False)
    for name in cfg.checkpointed_parts:
        _checkpoint(_part(model, name))
    if cfg.tuning_mode is TuningMode.FULL:
        return
    model.vla.requires_grad_(False)
    queries = model.vla.action_queries
    if cfg.tuning_mode is TuningMode.LORA:
        assert cfg.lora_rank is not None and cfg.lora_dropout is not None  # given or set to their defaults
        lora = LoraConfig(
            r=cfg.lora_rank,
            lora_alpha=2 * cfg.lora_rank,
            lora_dropout=cfg.lora_dropout,
            target_modules=lora_targets(model.vla, skip_vision=cfg.freeze_vision),
            init_lora_weights="gaussian",
        )
        adapted: Any = get_peft_model(model.vla, lora)  # the wrapper stands for the VLM
        model.vla = adapted
        for layer in adapter_layers(adapted):
            # Else the input of every adapter would be kept in float32 beside the base layer's. Autocast casts it.
            layer.cast_input_dtype_enabled = False
    queries.requires_grad_(True)


def _part(model: VLAPolicyModel, name: str) -> nn.Module:
    parts: dict[str, nn.Module] = {
        "towers": model.vla.vision_backbone,
        "llm": model.vla.language_model,
        "head": model.action_head,
    }
    return parts[name]


def _checkpoint(part: nn.Module) -> None:
    """Let the layers of a part compute their activations again in the backward pass."""
    module: Any  # with attributes of transformers' layers
    for module in part.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            # Only the non-reentrant kind lets `autograd.grad` through, which CRaFT needs.
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def _freeze_unreached(vla: OpenVLAForActionPrediction) -> None:
    # Parameters without gradient would make DDP wait for them, and weight decay would shrink them. A tied head is the
    # embedding table, which is reached.
    embeddings = vla.get_input_embeddings().weight
    for name in vla.unreached_module_names():
        for parameter in vla.get_submodule(name).parameters():
            if parameter is not embeddings:
                parameter.requires_grad_(False)


def _jpeg_quality(metadata: dict[str, dict[str, Any] | None]) -> dict[str, int]:
    # Evaluation repeats the JPEG round trip of the demonstrations; data sets without a record keep the default.
    recorded = {data["jpeg_quality"] for data in metadata.values() if data and "jpeg_quality" in data}
    if len(recorded) > 1:
        raise ValueError(
            f"the data sets were encoded with different JPEG qualities {sorted(recorded)}: collect them alike"
        )
    return {"jpeg_quality": recorded.pop()} if recorded else {}


def _check_flags(cfg: FinetuneConfig, start: StartModel) -> None:
    if cfg.export_published_layout:
        check_exportable(start.model)
    found = {
        "num_images_in_input": start.model.num_images,
        "use_proprio": start.model.proprio_projector is not None,
        "use_pro_version": start.model.action_head.use_pro_version,
        "use_minivlm": start.model.prompt_kind is PromptKind.QWEN_CHAT,
    }
    for name, value in found.items():
        wanted = getattr(cfg, name)
        if wanted is not None and wanted != value:
            raise ValueError(f"--{name} {wanted}: the start model {cfg.config_file_path} was made with {value}")
    if cfg.legacy_slices is not None and cfg.legacy_slices != start.model.legacy_slices:
        raise ValueError(
            f"--legacy_slices {cfg.legacy_slices}: the start model {cfg.config_file_path} was made with "
            f"{start.model.legacy_slices}"
        )
    if cfg.tuning_mode is TuningMode.LORA and start.base is None:
        raise ValueError(
            f"--use_lora True needs a checkpoint folder as --config_file_path: preset {cfg.config_file_path!r} has "
            "new weights, and adapters could not be loaded again without them"
        )
