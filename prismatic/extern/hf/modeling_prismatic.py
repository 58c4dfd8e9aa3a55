"""Vision-language model with action queries: published module names, causal LLM, CRaFT feature outputs.

Multimodal sequence of one row: [text 0 | N patches | text 1..P-1 | Q action queries | right padding]. A text index
i >= 1 therefore sits at absolute position N + i.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig, PrismaticConfig
from prismatic.extern.hf.vision_transformer import AttentionPool, LayerScale, VisionTransformer

IGNORE_INDEX = -100
# Labels above this id count as action tokens (Qwen2.5 tokenizer vocabulary 151643 minus 256 bins minus 1).
ACTION_TOKEN_BEGIN_IDX = 151386
_TIED = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}


class CrTokenMode(str, Enum):
    """Tokens that make up the raw latent C_R."""

    VISION_ONLY = "vision_only"
    VISION_PLUS_PROMPT = "vision_plus_prompt"


@dataclass
class PrismaticCausalLMOutputWithPast(ModelOutput):
    """Model output. B batch, S multimodal length, N vision tokens, Q action queries, D width, V vocabulary."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None  # (B, S, V), only on request
    past_key_values: Any | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None  # layers + 1 tensors (B, S, D); the last is normed
    attentions: tuple[torch.FloatTensor, ...] | None = None
    projector_features: torch.FloatTensor | None = None  # (B, N, D)
    raw_latent_features: torch.FloatTensor | None = None  # (B, N, D); (B, S, D) in vision_plus_prompt mode
    raw_latent_mask: torch.BoolTensor | None = None  # (B, S), only in vision_plus_prompt mode
    action_query_features: torch.FloatTensor | None = None  # (B, Q, D)


class PrismaticVisionBackbone(nn.Module):
    """One or two vision towers; features of fused towers are concatenated on the feature axis, first tower first."""

    def __init__(self, config: PrismaticConfig) -> None:
        """Towers are named `featurizer` and, when fused, `fused_featurizer`."""
        super().__init__()
        self.config = config
        specs = config.tower_specs()
        self.featurizer = VisionTransformer(specs[0])
        if len(specs) == 2:
            self.fused_featurizer = VisionTransformer(specs[1])
        self.embed_dim = sum(spec.embed_dim for spec in specs)

    @property
    def towers(self) -> list[VisionTransformer]:
        """The towers in channel order of `pixel_values`."""
        return [self.featurizer] + ([self.fused_featurizer] if hasattr(self, "fused_featurizer") else [])

    def get_num_patches(self) -> int:
        """Patches per image."""
        return self.featurizer.spec.num_patches

    @property
    def num_images_in_input(self) -> int:
        """Images per sample, kept in the configuration so that it is saved with the model."""
        return self.config.num_images_in_input

    def get_num_images_in_input(self) -> int:
        """Images per sample."""
        return self.num_images_in_input

    def set_num_images_in_input(self, num_images_in_input: int) -> None:
        """Set the images per sample (>= 1, ValueError otherwise)."""
        if num_images_in_input < 1:
            raise ValueError(f"num_images_in_input: expected at least 1, got {num_images_in_input}")
        self.config.num_images_in_input = num_images_in_input

    @property
    def num_vision_tokens(self) -> int:
        """N: vision tokens per sample."""
        return self.get_num_patches() * self.num_images_in_input

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3*towers*n, H, W) -> features (B, N, embed_dim), images in order on the token axis.

        Raises ValueError when the channel count does not match the number of images.
        """
        towers, images = self.towers, self.num_images_in_input
        batch, channels, height, width = pixel_values.shape
        if channels != 3 * len(towers) * images:
            raise ValueError(
                f"pixel_values: expected {3 * len(towers) * images} channels for num_images_in_input={images} and "
                f"{len(towers)} tower(s), found {channels}"
            )
        # Cameras join the batch axis: one call per tower instead of one per image.
        folded = pixel_values.view(batch * images, len(towers), 3, height, width)
        features = torch.cat([tower(folded[:, index]) for index, tower in enumerate(towers)], dim=-1)
        return features.reshape(batch, -1, self.embed_dim)


class PrismaticProjector(nn.Module):
    """MLP from vision width to LLM width: three layers for fused towers, two otherwise, GELU between."""

    def __init__(self, use_fused: bool, vision_dim: int, llm_dim: int, hidden_multiplier: int = 4) -> None:
        """`hidden_multiplier` sets the first layer's width (fused only, in units of `vision_dim`)."""
        super().__init__()
        self.fused = use_fused
        hidden = hidden_multiplier * vision_dim if use_fused else llm_dim
        self.fc1 = nn.Linear(vision_dim, hidden)
        self.fc2 = nn.Linear(hidden, llm_dim)
        if use_fused:
            self.fc3 = nn.Linear(llm_dim, llm_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, vision_dim) -> (B, N, llm_dim)."""
        x = self.fc2(F.gelu(self.fc1(features)))
        return self.fc3(F.gelu(x)) if self.fused else x


class PrismaticPreTrainedModel(PreTrainedModel):
    """Hugging Face plumbing shared by the model classes."""

    config_class = PrismaticConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PrismaticProjector", "Qwen2DecoderLayer", "Block"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # nn.init, not tensor methods: transformers 5 makes it skip what was read from a file (a module of which only
        # the bias is missing keeps its weight).
        std = getattr(self.config, "initializer_range", None) or self.config.text_config.initializer_range
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=1.0 / math.sqrt(fan_in) if isinstance(module, nn.Conv2d) else std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.scale_factor, module.init)
        elif isinstance(module, AttentionPool):
            nn.init.zeros_(module.latent)
        elif isinstance(module, VisionTransformer):
            module.reset_embeddings(std)


class PrismaticForConditionalGeneration(PrismaticPreTrainedModel):
    """Vision towers, projector, causal language model and the table of action queries."""

    # transformers 4 wants a list of tied keys, transformers 5 a mapping target -> source.
    _tied_weights_keys = _TIED if int(transformers.__version__.split(".")[0]) >= 5 else list(_TIED)

    def __init__(self, config: PrismaticConfig) -> None:
        """Random weights; towers and LLM geometry come from `config` alone."""
        super().__init__(config)
        self.vision_backbone = PrismaticVisionBackbone(config)
        self.llm_dim = config.text_config.hidden_size
        self.projector = PrismaticProjector(
            config.use_fused_vision_backbone,
            self.vision_backbone.embed_dim,
            self.llm_dim,
            config.projector_hidden_multiplier,
        )
        self.language_model = AutoModelForCausalLM.from_config(
            config.text_config, attn_implementation=config._attn_implementation
        )
        self.action_queries = nn.Embedding(config.num_action_queries, self.llm_dim)
        self.vocab_size = config.text_config.vocab_size
        self.pad_token_id = config.pad_token_id
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's token embedding table."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's token embedding table."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The LM head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the LM head."""
        self.language_model.set_output_embeddings(new_embeddings)

    @property
    def num_action_queries(self) -> int:
        """Q."""
        return self.action_queries.num_embeddings

    def unreached_module_names(self) -> list[str]:
        """Modules the forward pass never runs (without `output_logits`): last vision blocks, final vision norms,
        attention pools and the LM head. Their parameters get no gradient, except a tied embedding table.
        """
        names = ["language_model.lm_head"]
        for tower_name in ("featurizer", "fused_featurizer"):
            tower = getattr(self.vision_backbone, tower_name, None)
            if tower is not None:
                names += [f"vision_backbone.{tower_name}.{name}" for name in tower.unreached_module_names]
        return names

    # ---------------------------------------------------------------------------------------------- token layout

    def resolve_action_mask(self, action_mask: torch.Tensor | None, labels: torch.Tensor | None) -> torch.Tensor:
        """Bool (B, L) mask of the action-query slots, from `action_mask` or, failing that, from `labels`.

        Raises ValueError when neither is given or a row does not hold exactly Q slots.
        """
        if action_mask is None and labels is None:
            raise ValueError("a multimodal forward needs `action_mask` or `labels` to place the action queries")
        mask = action_mask.bool() if action_mask is not None else action_mask_from_labels(labels)
        counts = mask.sum(dim=1)
        if not bool((counts == self.num_action_queries).all()):
            raise ValueError(f"action mask: expected {self.num_action_queries} slots per row, found {counts.tolist()}")
        return mask

    def _multimodal_mask(self, text_mask: torch.Tensor, vision_value: bool) -> torch.Tensor:
        """Text mask (B, L) -> multimodal mask (B, N+L) with `vision_value` at the patches."""
        fill = text_mask.new_full((text_mask.shape[0], self.vision_backbone.num_vision_tokens), vision_value)
        return torch.cat([text_mask[:, :1], fill, text_mask[:, 1:]], dim=1)

    def _query_positions(self, action_mask: torch.Tensor) -> torch.Tensor:
        """Absolute multimodal positions (B, Q) int64 of the action queries, in order."""
        # A stable sort puts the slots first, in order; `nonzero` would wait for the device to learn how many there are.
        order = torch.sort(action_mask.byte(), dim=1, descending=True, stable=True).indices
        text_positions = order[:, : self.num_action_queries]
        return text_positions + self.vision_backbone.num_vision_tokens

    def _embed_text(self, input_ids: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
        """Token embeddings (B, L, D) with the action-query table at the masked slots."""
        # Placeholder ids only mark slots; id 0 is always a valid row of the table.
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(action_mask, 0))
        queries = self.action_queries.weight.to(embeddings.dtype)
        slot = (action_mask.long().cumsum(dim=1) - 1).clamp(min=0, max=self.num_action_queries - 1)
        return torch.where(action_mask.unsqueeze(-1), queries[slot], embeddings)

    def _multimodal_inputs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        projected: torch.Tensor,
        action_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, N+L, D) and padding mask (B, N+L) of [text 0 | patches | rest of the text]."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        text = self._embed_text(input_ids, action_mask)
        embeddings = torch.cat([text[:, :1], projected.to(text.dtype), text[:, 1:]], dim=1)
        return embeddings, self._multimodal_mask(attention_mask.bool(), True)

    # --------------------------------------------------------------------------------------------------- forward

    def forward(  # noqa: PLR0913 -- Hugging Face signature
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_projector_features: bool | None = None,
        return_dict: bool | None = None,
        action_mask: torch.Tensor | None = None,
        output_craft_features: bool | None = None,
        craft_layer_idx: int | None = None,
        craft_cr_token_mode: CrTokenMode | str = CrTokenMode.VISION_ONLY,
        craft_raw_only: bool = False,
        vision_features: torch.Tensor | None = None,
        output_logits: bool = False,
        trusted_masks: bool = False,
        **compat: Any,
    ) -> PrismaticCausalLMOutputWithPast | tuple:
        """Run towers, projector and LLM body (the LM head only for `output_logits`).

        Args:
            input_ids: (B, L) int64, prompt ids followed by Q placeholder ids (values irrelevant), right padded.
            attention_mask: (B, L) bool or 0/1; None means no padding.
            pixel_values: (B, 3*towers*n, H, W) normalised floats; None runs the text alone.
            labels, action_mask: (B, L); bool mask of the Q placeholders, or published-style labels to derive it from.
            output_craft_features, craft_layer_idx: also return C_AQ, and C_R of this hidden state (None: the middle).
            craft_cr_token_mode: "vision_only", or "vision_plus_prompt" (whole layer plus `raw_latent_mask`).
            craft_raw_only: return C_R alone and run the LLM only up to its layer; other hidden states are then missing.
            vision_features: (B, N, embed_dim) output of the towers for these pixels, when it is known already.
            trusted_masks: the caller vouches for Q slots per row and right padding: nothing is read back to check.
            compat: published arguments without a role here; diffusion and FiLM inputs must be None/False.
        Raises ValueError for inconsistent images, masks or layer index, NotImplementedError for unsupported inputs.
        """
        _check_compat(compat)
        _check_unsupported(past_key_values is not None or use_cache, inputs_embeds, pixel_values)
        if output_craft_features and pixel_values is None:
            raise ValueError("CRaFT features need `pixel_values`")
        projected, mask, full_mask = None, None, attention_mask
        if pixel_values is not None:
            mask = action_mask.bool() if trusted_masks else self.resolve_action_mask(action_mask, labels)
            features = self.vision_backbone(pixel_values) if vision_features is None else vision_features
            projected = self.projector(features)
            inputs_embeds, full_mask = self._multimodal_inputs(input_ids, attention_mask, projected, mask)
        body = self.language_model.model
        if craft_raw_only:
            body = first_layers(body, resolve_craft_layer(craft_layer_idx, len(body.layers) + 1))
        output = body(
            input_ids=input_ids if inputs_embeds is None else None,
            inputs_embeds=inputs_embeds,
            attention_mask=plain_causal_mask(body, full_mask) if trusted_masks else hide_right_padding(full_mask),
            use_cache=False,
            output_attentions=bool(output_attentions),
            output_hidden_states=True,
            return_dict=True,
        )
        result = PrismaticCausalLMOutputWithPast(
            logits=self.language_model.lm_head(output.last_hidden_state) if output_logits else None,
            hidden_states=output.hidden_states if output_hidden_states else None,
            attentions=output.attentions if output_attentions else None,
            projector_features=projected if output_projector_features else None,
        )
        if output_craft_features:
            options = craft_layer_idx, CrTokenMode(craft_cr_token_mode)
            # A body cut to no layers records no states: its only one is its input.
            states = output.hidden_states or (inputs_embeds,)
            self._add_craft_features(result, states, (full_mask, mask), *options)
        elif craft_raw_only:
            raise ValueError("craft_raw_only needs output_craft_features")
        return result if return_dict is not False else result.to_tuple()

    def _add_craft_features(
        self,
        result: PrismaticCausalLMOutputWithPast,
        hidden_states: Sequence[torch.Tensor],
        masks: tuple[torch.Tensor, torch.Tensor],
        layer_idx: int | None,
        mode: CrTokenMode,
    ) -> None:
        full_mask, action_mask = masks
        num_layers = len(self.language_model.model.layers)
        layer = hidden_states[resolve_craft_layer(layer_idx, num_layers + 1)]
        if len(hidden_states) == num_layers + 1:
            result.action_query_features = _gather_tokens(hidden_states[-1], self._query_positions(action_mask))
        if mode is CrTokenMode.VISION_ONLY:
            result.raw_latent_features = layer[:, 1 : 1 + self.vision_backbone.num_vision_tokens]
            return
        result.raw_latent_features = layer
        # Vision and real prompt tokens, position 0 included (it is the first prompt token), no queries, no padding.
        result.raw_latent_mask = full_mask.bool() & ~self._multimodal_mask(action_mask, False)

    def bridge_states(
        self, hidden_states: Sequence[torch.Tensor], action_mask: torch.Tensor, legacy_slices: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states the action head reads.

        Args:
            hidden_states: layers + 1 tensors (B, N+L, D).
            action_mask: (B, L) bool, Q slots per row.
            legacy_slices: True = slices published heads were trained on, one position early: task tokens 0..N-1
                (first text token, last patch missing), action tokens one before each query. False = the patches and
                the queries themselves.

        Returns:
            task (B, layers+1, N, D) and action (B, layers+1, Q, D).
        """
        first = 0 if legacy_slices else 1
        positions = self._query_positions(action_mask.bool()) - int(legacy_slices)
        tokens = self.vision_backbone.num_vision_tokens
        task = torch.stack([state[:, first : first + tokens] for state in hidden_states], dim=1)
        action = torch.stack([_gather_tokens(state, positions) for state in hidden_states], dim=1)
        return task, action


class OpenVLAForActionPrediction(PrismaticForConditionalGeneration):
    """The model with data-set statistics and single-sample action prediction."""

    config_class = OpenVLAConfig

    def __init__(self, config: OpenVLAConfig) -> None:
        """Adds the action bins and their centres."""
        super().__init__(config)
        self.bins = np.linspace(-1, 1, config.n_action_bins)
        self.bin_centers = (self.bins[:-1] + self.bins[1:]) / 2.0
        # Undo the vocabulary padding; only the discrete decoder of Llama checkpoints would use it.
        self.vocab_size = config.text_config.vocab_size - config.pad_to_multiple_of
        self.version = None

    @property
    def norm_stats(self) -> dict[str, Any] | None:
        """Statistics per data set, kept in the configuration so that they are saved with the model."""
        return self.config.norm_stats

    @norm_stats.setter
    def norm_stats(self, norm_stats: dict[str, Any] | None) -> None:
        """Replace the statistics (JSON-ready: lists, no arrays)."""
        self.config.norm_stats = norm_stats

    def set_version(self, version: str) -> str:
        """Remember a free-form version string (called by published evaluation code); returns it."""
        self.version = version
        return version

    def get_action_statistics(self, unnorm_key: str | None = None) -> dict[str, Any]:
        """Statistics of one data set. `unnorm_key` None is allowed with exactly one data set.

        Raises KeyError listing the known keys; ValueError when the model carries no statistics.
        """
        if not self.norm_stats:
            raise ValueError("the model has no `norm_stats`; load dataset_statistics.json first")
        if unnorm_key is None and len(self.norm_stats) == 1:
            return next(iter(self.norm_stats.values()))
        for key in (unnorm_key, f"{unnorm_key}_no_noops"):
            if key in self.norm_stats:
                return self.norm_stats[key]
        raise KeyError(f"unnorm_key {unnorm_key!r} not found in norm_stats; known keys: {sorted(self.norm_stats)}")

    @torch.no_grad()
    def predict_action(  # noqa: PLR0913 -- published signature
        self,
        input_ids: torch.LongTensor,
        unnorm_key: str | None = None,
        proprio: np.ndarray | torch.Tensor | None = None,
        proprio_projector: nn.Module | None = None,
        action_head: nn.Module | None = None,
        noisy_action_projector: nn.Module | None = None,
        use_film: bool = False,
        legacy_slices: bool = True,
        action_spec: Any | None = None,
        **kwargs: Any,
    ) -> tuple[np.ndarray, torch.Tensor]:
        """One chunk of un-normalised actions for one sample.

        Args:
            input_ids: (1, P) prompt ids without placeholders; kwargs: `pixel_values`, `attention_mask` (1, P).
            proprio: (8,) normalised state, or None for heads trained without it.
            legacy_slices: see `bridge_states`; True is what published heads expect.
            action_spec: ActionSpec for un-normalisation, default the LIBERO one.

        Returns:
            actions (K, A) float64 in data-set units and the last layer's action tokens (1, Q, D).

        Raises:
            ValueError: batch size other than 1, missing head. KeyError: unknown `unnorm_key`.
        """
        _check_compat({"noisy_action_projector": noisy_action_projector, "use_film": use_film})
        if action_head is None:
            raise ValueError("predict_action needs an action head; discrete token decoding is not supported")
        if input_ids.shape[0] != 1:
            raise ValueError(f"predict_action: expected batch size 1, got {input_ids.shape[0]}")
        ids, attention, mask = self._append_query_slots(input_ids, kwargs.get("attention_mask"))
        output = self(
            input_ids=ids,
            attention_mask=attention,
            pixel_values=kwargs["pixel_values"],
            action_mask=mask,
            output_hidden_states=True,
        )
        task, action = self.bridge_states(output.hidden_states, mask, legacy_slices)
        features = _proprio_features(proprio, proprio_projector)
        normalised = action_head((task, action), features)[0].float().cpu().numpy()
        return self._unnormalize(normalised, unnorm_key, action_spec), action[:, -1]

    def _append_query_slots(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prompt ids (1, P) -> ids, attention mask and action mask, each (1, P+Q)."""
        slots = input_ids.new_zeros((1, self.num_action_queries))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        attention = torch.cat([attention_mask.bool(), torch.ones_like(slots, dtype=torch.bool)], dim=1)
        mask = torch.cat([torch.zeros_like(input_ids), torch.ones_like(slots)], dim=1).bool()
        return torch.cat([input_ids, slots], dim=1), attention, mask

    def _unnormalize(self, actions: np.ndarray, unnorm_key: str | None, action_spec: Any | None) -> np.ndarray:
        # Imported here: the model must be usable without the data modules.
        from prismatic.vla.action_spec import ActionSpec
        from prismatic.vla.normalization import Normalizer

        normalizer = Normalizer(self.get_action_statistics(unnorm_key), action_spec or ActionSpec())
        return np.asarray(normalizer.unnormalize_action(actions))


def action_mask_from_labels(labels: torch.Tensor) -> torch.Tensor:
    """Bool (B, L) union mask by the published rule: supervised (not -100) labels above ACTION_TOKEN_BEGIN_IDX.

    The published current/next split by cumulative counts only partitions this set.
    """
    return (labels != IGNORE_INDEX) & (labels > ACTION_TOKEN_BEGIN_IDX)


def hide_right_padding(mask: torch.Tensor | None) -> torch.Tensor | None:
    """All ones when every row of the mask (B, S) is ones then zeros, else the mask itself.

    Under causal attention real tokens never see what is on their right, so the result at real positions is the same;
    with all ones the library picks the causal kernels instead of materialising (B, 1, S, S) masks.
    """
    if mask is None:
        return None
    mask = mask.bool()
    return mask if bool((mask[:, 1:] & ~mask[:, :-1]).any()) else torch.ones_like(mask)


def plain_causal_mask(body: nn.Module, mask: torch.Tensor | None) -> dict[str, None] | torch.Tensor | None:
    """What makes the body causal without a look at the mask, whose padding must be on the right.

    The library would read an all-ones mask back to see that it is one. A prepared entry per layer type skips that; its
    fused kernels take None as causal, the unfused one does not.
    """
    fused = body.config._attn_implementation in ("sdpa", "flash_attention_2")
    if fused and not body.has_sliding_layers:
        return {"full_attention": None}
    return None if mask is None else torch.ones_like(mask, dtype=torch.bool)


def resolve_craft_layer(layer_idx: int | None, num_hidden_states: int) -> int:
    """Index into hidden_states: None -> the middle one, negative counts from the end; ValueError out of range."""
    if layer_idx is None:
        return num_hidden_states // 2
    if not -num_hidden_states <= layer_idx < num_hidden_states:
        raise ValueError(
            f"craft_layer_idx: expected {-num_hidden_states}..{num_hidden_states - 1} (0 = input embeddings), "
            f"got {layer_idx}"
        )
    return layer_idx % num_hidden_states


def first_layers(body: nn.Module, count: int) -> nn.Module:
    """The LLM body cut after `count` layers, sharing every module with it; its last output is hidden state `count`.

    With all layers it is the body itself, whose last output is normed.
    """
    if count >= len(body.layers):
        return body
    view = copy.copy(body)
    view._modules = {**body._modules, "layers": body.layers[:count], "norm": nn.Identity()}
    return view


def _gather_tokens(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """states (B, S, D), positions (B, Q) -> (B, Q, D)."""
    rows = torch.arange(states.shape[0], device=states.device).unsqueeze(1)
    return states[rows, positions]


def _proprio_features(proprio: Any | None, projector: nn.Module | None) -> torch.Tensor | None:
    """Normalised proprio (P,) or (1, P) -> (1, D), or None."""
    if proprio is None:
        return None
    if projector is None:
        raise ValueError("`proprio` was given without a `proprio_projector`")
    weight = next(projector.parameters())
    tensor = torch.as_tensor(proprio, device=weight.device).to(weight.dtype)
    return projector(tensor.reshape(1, -1))


def _check_unsupported(cached: bool | None, inputs_embeds: Any, pixel_values: Any) -> None:
    if cached:
        raise NotImplementedError("cached generation is not supported: actions come from one parallel pass")
    if inputs_embeds is not None and pixel_values is not None:
        raise NotImplementedError("`inputs_embeds` together with `pixel_values` is not supported")


def _check_compat(compat: dict[str, Any]) -> None:
    """Reject inputs outside the implemented scope instead of ignoring them."""
    ignored = {"proprio", "proprio_projector"}
    out_of_scope = {"noisy_actions", "noisy_action_projector", "diffusion_timestep_embeddings", "use_film"}
    for name, value in compat.items():
        if name in out_of_scope and value not in (None, False):
            raise NotImplementedError(f"`{name}`: diffusion and FiLM are not supported")
        if name not in ignored | out_of_scope:
            raise TypeError(f"forward() got an unexpected argument {name!r}")
