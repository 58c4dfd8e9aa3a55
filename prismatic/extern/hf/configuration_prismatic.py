"""Configuration classes of the vision-language-action model (published field names plus explicit tower geometry)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, cast

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import CONFIG_MAPPING

from prismatic.vla.prompts import PromptKind, prompt_kind_of

# vision backbone id -> (image sizes, timm model ids, activation override per tower)
_DINO_ID = "vit_large_patch14_reg4_dinov2.lvd142m"
VISION_BACKBONES: dict[str, tuple[list[int], list[str], list[str | None]]] = {
    "clip-vit-l": ([224], ["vit_large_patch14_clip_224.openai"], ["quick_gelu"]),
    "clip-vit-l-336px": ([336], ["vit_large_patch14_clip_336.openai"], ["quick_gelu"]),
    "siglip-vit-so400m": ([224], ["vit_so400m_patch14_siglip_224"], [None]),
    "siglip-vit-so400m-384px": ([384], ["vit_so400m_patch14_siglip_384"], [None]),
    "dinov2-vit-l": ([224], [_DINO_ID], [None]),
    "in1k-vit-l": ([224], ["vit_large_patch16_224.augreg_in21k_ft_in1k"], [None]),
    "dinoclip-vit-l-336px": ([336, 336], [_DINO_ID, "vit_large_patch14_clip_336.openai"], [None, "quick_gelu"]),
    "dinosiglip-vit-so-224px": ([224, 224], [_DINO_ID, "vit_so400m_patch14_siglip_224"], [None, None]),
    "dinosiglip-vit-so-384px": ([384, 384], [_DINO_ID, "vit_so400m_patch14_siglip_384"], [None, None]),
}

# LLM id -> (Hugging Face model id, model_type)
LLM_BACKBONES: dict[str, tuple[str, str]] = {
    "llama2-7b-pure": ("meta-llama/Llama-2-7b-hf", "llama"),
    "llama2-7b-chat": ("meta-llama/Llama-2-7b-chat-hf", "llama"),
    "llama2-13b-pure": ("meta-llama/Llama-2-13b-hf", "llama"),
    "llama2-13b-chat": ("meta-llama/Llama-2-13b-chat-hf", "llama"),
    "vicuna-v15-7b": ("lmsys/vicuna-7b-v1.5", "llama"),
    "vicuna-v15-13b": ("lmsys/vicuna-13b-v1.5", "llama"),
    "mistral-v0.1-7b-pure": ("mistralai/Mistral-7B-v0.1", "mistral"),
    "mistral-v0.1-7b-instruct": ("mistralai/Mistral-7B-Instruct-v0.1", "mistral"),
    "phi-2-3b": ("microsoft/phi-2", "phi"),
    "qwen25-0_5b-extra": ("Qwen/Qwen2.5-0.5B", "qwen2"),
    "qwen25-0_5b-pure": ("Qwen/Qwen2.5-0.5B", "qwen2"),
    "smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "llama"),
}

RESIZE_STRATEGIES = ("resize-naive", "resize-crop", "letterbox")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
STEMS = ("patch", "conv")
POS_EMBED_RULES = ("patches", "all")
_MOVED_ROPE_FIELDS = ("rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class VisionTowerSpec:
    """Geometry of one vision transformer.

    `pos_embed` says which tokens carry a position embedding: "patches" (prefix tokens are prepended afterwards) or
    "all" (prefix tokens included). `stem` is "patch" (one strided convolution, published models) or "conv" (stride-2
    3x3 convolutions; `patch_size` is then the total stride and must be a power of two).
    """

    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_hidden_dim: int
    activation: str = "gelu"
    norm_eps: float = 1e-6
    class_token: bool = False
    reg_tokens: int = 0
    layer_scale: bool = False
    layer_scale_init: float = 1e-5
    attention_pool: bool = False
    pre_norm: bool = False
    pos_embed: str = "patches"
    stem: str = "patch"

    def __post_init__(self) -> None:
        """Raise ValueError naming the field when the geometry is impossible."""
        for name in ("image_size", "patch_size", "embed_dim", "num_heads", "mlp_hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"vision tower field `{name}`: expected a positive integer, got {getattr(self, name)}")
        if self.depth < 2:
            raise ValueError(
                f"vision tower field `depth`: expected at least 2 (features leave block depth-2), got {self.depth}"
            )
        if self.image_size < self.patch_size:
            raise ValueError(f"vision tower: image_size {self.image_size} is below patch_size {self.patch_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"vision tower: embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )
        choices = {"activation": ACTIVATIONS, "stem": STEMS, "pos_embed": POS_EMBED_RULES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"vision tower field `{name}`: expected one of {allowed}, got {getattr(self, name)!r}")
        if self.stem == "conv" and (self.patch_size & (self.patch_size - 1) or self.image_size % self.patch_size):
            raise ValueError(
                f"vision tower: a conv stem needs a power-of-two patch_size that divides image_size {self.image_size}, "
                f"got {self.patch_size}"
            )

    @property
    def num_patches(self) -> int:
        """Patches per image; pixels beyond the last whole patch are dropped (384 px, patch 14: 27 x 27)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens in front of the patches."""
        return int(self.class_token) + self.reg_tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-serialisable dict; inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VisionTowerSpec:
        """Build from a dict; unknown or missing fields raise ValueError."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"vision tower: unknown fields {unknown}; known fields are {sorted(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"vision tower: {error}") from error


def published_tower(timm_model_id: str, image_size: int, activation: str | None) -> VisionTowerSpec:
    """Geometry of one of the published timm backbones; unknown ids raise ValueError."""
    large: dict[str, Any] = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_hidden_dim": 4096}
    large["image_size"] = image_size
    act = activation or "gelu"
    extra: dict[str, Any]
    if timm_model_id == _DINO_ID:
        extra = {"class_token": True, "reg_tokens": 4, "layer_scale": True, "pos_embed": "patches"}
        return VisionTowerSpec(**large, patch_size=14, activation=act, **extra)
    if timm_model_id.startswith("vit_large_patch14_clip_"):
        extra = {"class_token": True, "pre_norm": True, "pos_embed": "all", "norm_eps": 1e-5}
        return VisionTowerSpec(**large, patch_size=14, activation=act, **extra)
    if timm_model_id.startswith("vit_large_patch16_224"):
        return VisionTowerSpec(**large, patch_size=16, activation=act, class_token=True, pos_embed="all")
    if timm_model_id.startswith("vit_so400m_patch14_siglip_"):
        so400m: dict[str, Any] = {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_hidden_dim": 4304}
        so400m["attention_pool"] = True
        return VisionTowerSpec(image_size=image_size, patch_size=14, activation=act, **so400m)
    raise ValueError(
        f"config field `timm_model_ids`: {timm_model_id!r} is unknown; give the tower's geometry in `vision_towers`"
    )


class PrismaticConfig(PretrainedConfig):
    """Vision-language model configuration.

    Fields not in the published files: `vision_towers` (list of VisionTowerSpec dicts; None -> from the id table),
    `num_images_in_input`, `num_action_queries`, `projector_hidden_multiplier` (width of the first projector layer in
    units of the vision width, fused projector only).
    """

    model_type = "prismatic"
    is_composition = False
    # The library, too, puts AutoConfig here, which its own annotation leaves out.
    sub_configs = {"text_config": cast("type[PretrainedConfig]", AutoConfig)}

    def __init__(  # noqa: PLR0913 -- published constructor fields
        self,
        vision_backbone_id: str = "siglip-vit-so400m",
        llm_backbone_id: str = "vicuna-v15-7b",
        arch_specifier: str = "no-align+gelu-mlp",
        use_fused_vision_backbone: bool | None = None,
        image_resize_strategy: str = "letterbox",
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        llm_max_length: int = 2048,
        pad_token_id: int = 32000,
        pad_to_multiple_of: int = 64,
        output_projector_states: bool = False,
        vision_towers: list[dict[str, Any]] | None = None,
        num_images_in_input: int = 1,
        num_action_queries: int = 64,
        projector_hidden_multiplier: int = 4,
        **kwargs: Any,
    ) -> None:
        """Validate ids and derive the per-tower geometry; ValueError on unknown ids."""
        _require("vision_backbone_id", vision_backbone_id, VISION_BACKBONES)
        _require("llm_backbone_id", llm_backbone_id, LLM_BACKBONES)
        _require("image_resize_strategy", image_resize_strategy, RESIZE_STRATEGIES)
        if use_fused_vision_backbone is None:
            use_fused_vision_backbone = vision_backbone_id.startswith(("dinoclip", "dinosiglip"))
        image_sizes, timm_ids, act_layers = VISION_BACKBONES[vision_backbone_id]
        self.vision_backbone_id = vision_backbone_id
        self.llm_backbone_id = llm_backbone_id
        self.arch_specifier = arch_specifier
        self.use_fused_vision_backbone = use_fused_vision_backbone
        self.image_resize_strategy = image_resize_strategy
        self.llm_max_length = llm_max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.output_projector_states = output_projector_states
        self.num_images_in_input = num_images_in_input
        self.num_action_queries = num_action_queries
        self.projector_hidden_multiplier = projector_hidden_multiplier
        # Published JSON files store the derived lists too; the stored values win.
        self.timm_model_ids = list(kwargs.pop("timm_model_ids", None) or timm_ids)
        self.timm_override_act_layers = list(kwargs.pop("timm_override_act_layers", None) or act_layers)
        self.image_sizes = list(kwargs.pop("image_sizes", None) or image_sizes)
        hf_llm_id = kwargs.pop("hf_llm_id", None)
        self.hf_llm_id = LLM_BACKBONES[llm_backbone_id][0] if hf_llm_id is None else hf_llm_id
        self.vision_towers = vision_towers
        self.text_config = _text_config(text_config, LLM_BACKBONES[llm_backbone_id][1])
        kwargs.setdefault("tie_word_embeddings", bool(getattr(self.text_config, "tie_word_embeddings", False)))
        super().__init__(pad_token_id=pad_token_id, **kwargs)

    @property
    def prompt_kind(self) -> PromptKind:
        """The form of the prompt, which follows from the language model. KeyError for a body that is not run."""
        return prompt_kind_of(self.text_config.model_type, self.llm_backbone_id)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: readable by transformers 4, 5 and the published code."""
        values = super().to_diff_dict()
        return values | {"text_config": _with_moved_rope_fields(values["text_config"])}

    def tower_specs(self) -> list[VisionTowerSpec]:
        """One spec per featurizer (two when the backbone is fused); ValueError on a wrong number of towers."""
        if self.vision_towers is None:
            entries = zip(self.timm_model_ids, self.image_sizes, self.timm_override_act_layers, strict=True)
            specs = [published_tower(name, size, act) for name, size, act in entries]
        else:
            specs = [VisionTowerSpec.from_dict(dict(tower)) for tower in self.vision_towers]
        expected = 2 if self.use_fused_vision_backbone else 1
        if len(specs) != expected:
            raise ValueError(f"config field `vision_towers`: expected {expected} towers, found {len(specs)}")
        if len({spec.num_patches for spec in specs}) != 1:
            raise ValueError(f"config: fused towers need equal patch counts, got {[s.num_patches for s in specs]}")
        return specs


class OpenVLAConfig(PrismaticConfig):
    """PrismaticConfig plus data-set statistics and the action-bin count of the discrete decoder."""

    model_type = "openvla"

    def __init__(self, norm_stats: dict[str, Any] | None = None, n_action_bins: int = 256, **kwargs: Any) -> None:
        """`norm_stats`: {data set: {"action": {...}, "proprio": {...}}}; `n_action_bins`: uniform bins on [-1, 1]."""
        self.norm_stats = norm_stats
        self.n_action_bins = n_action_bins
        super().__init__(**kwargs)


def _require(name: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"config field `{name}`: {value!r} is unknown; expected one of {sorted(allowed)}")


def _text_config(values: dict[str, Any] | PretrainedConfig | None, default_type: str) -> PretrainedConfig:
    if isinstance(values, PretrainedConfig):
        return values
    values = _with_moved_rope_fields(values or {})
    model_type = values.pop("model_type", default_type)
    return CONFIG_MAPPING[model_type](**values)


def _with_moved_rope_fields(text_config: dict[str, Any]) -> dict[str, Any]:
    """Copy that repeats what transformers 5 moved into `rope_parameters` under the old names.

    Without them transformers 4 and the published code would silently rotate with a base of 10000.
    """
    rope = text_config.get("rope_parameters") or {}
    return {name: rope[name] for name in _MOVED_ROPE_FIELDS if name in rope} | text_config
