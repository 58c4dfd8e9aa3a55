"""Vision-language model with action queries: published module names, causal LLM, CRaFT feature outputs.

Where the tokens of the multimodal sequence lie and what is cut out of it: `prismatic/models/bridge.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig, PrismaticConfig
from prismatic.extern.hf.language_body import (
    first_layers,
    hide_right_padding,
    keep_less,
    plain_causal_mask,
    require_body,
)
from prismatic.extern.hf.published_inputs import (
    ACTION_TOKEN_BEGIN_IDX,  # noqa: F401 -- published here
    IGNORE_INDEX,  # noqa: F401 -- published here
    action_mask_from_labels,
    check_compat,
    check_craft,
    check_unsupported,
)
from prismatic.extern.hf.vision_backbone import PrismaticProjector, PrismaticVisionBackbone
from prismatic.extern.hf.vision_transformer import AttentionPool, LayerScale, VisionTransformer
from prismatic.models.activations import as_stream
from prismatic.models.bridge import BridgeLayout, CrTokenMode, resolve_craft_layer

_TIED = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}


@dataclass
class PrismaticCausalLMOutputWithPast(ModelOutput):
    """Model output. B batch, S multimodal length, N vision tokens, Q action queries, D width, V vocabulary."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None  # (B, S, V), only on request
    past_key_values: Any | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None  # layers + 1 tensors (B, S, D); the last is normed
    attentions: tuple[torch.Tensor, ...] | None = None
    projector_features: torch.Tensor | None = None  # (B, N, D)
    raw_latent_features: torch.Tensor | None = None  # (B, N, D); (B, S, D) in vision_plus_prompt mode
    raw_latent_mask: torch.Tensor | None = None  # (B, S), only in vision_plus_prompt mode
    action_query_features: torch.Tensor | None = None  # (B, Q, D)


class PrismaticPreTrainedModel(PreTrainedModel):
    """Hugging Face plumbing shared by the model classes."""

    config_class: Any = PrismaticConfig  # the base class has None, so its type says None
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PrismaticProjector", "Block"]
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
    _tied_weights_keys: Any = _TIED if int(transformers.__version__.split(".")[0]) >= 5 else list(_TIED)

    def __init__(self, config: PrismaticConfig) -> None:
        """Random weights; towers and LLM geometry come from `config` alone. ValueError for another LLM body."""
        require_body(config.text_config.model_type)
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
            config.text_config, attn_implementation=config._attn_implementation, trust_remote_code=False
        )
        keep_less(self.language_model.model)
        self._no_split_modules = [*self._no_split_modules, *self.language_model._no_split_modules]
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

    @property
    def bridge_layout(self) -> BridgeLayout:
        """Token layout for the present number of images."""
        return BridgeLayout(self.vision_backbone.num_vision_tokens, self.num_action_queries)

    def resolve_action_mask(
        self, action_mask: torch.Tensor | None, labels: torch.Tensor | None, trusted: bool = False
    ) -> torch.Tensor:
        """Bool (B, L) mask of the action-query slots, from `action_mask` or, failing that, from `labels`.

        Raises ValueError when neither is given or, unless it is trusted, a row does not hold exactly Q slots.
        """
        if action_mask is not None:
            mask = action_mask.bool()
        elif labels is not None:
            mask = action_mask_from_labels(labels, self.config.text_config.model_type)
        else:
            raise ValueError("a multimodal forward needs `action_mask` or `labels` to place the action queries")
        if not trusted:
            self.bridge_layout.require_query_slots(mask)
        return mask

    def _embed_text(self, input_ids: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
        """Token embeddings (B, L, D) with the action-query table at the masked slots."""
        # Placeholder ids only mark slots; id 0 is always a valid row of the table.
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(action_mask, 0))
        queries = self.action_queries.weight.to(embeddings.dtype)
        return self.bridge_layout.fill_query_slots(embeddings, queries, action_mask)

    def _multimodal_inputs(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        projected: torch.Tensor,
        action_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, N+L, D) and padding mask (B, N+L) of the multimodal sequence."""
        assert input_ids is not None  # images come with text
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        layout, text = self.bridge_layout, as_stream(self._embed_text(input_ids, action_mask))
        embeddings = layout.insert_patches(text, projected.to(text.dtype))
        return embeddings, layout.multimodal_mask(attention_mask.bool(), True)

    def _run_body(
        self,
        layers: int | None,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        mask: tuple[torch.Tensor | None, bool],
        output_attentions: bool,
    ) -> Any:
        """The first `layers` of the LLM body, or all, on `inputs_embeds`, or without them on `input_ids`.

        `mask`: (B, N+L), False where right padding is, and whether the caller vouches for that.
        """
        body, (full_mask, trusted) = self.language_model.model, mask
        if layers is not None:
            body = first_layers(body, layers)
        return body(
            input_ids=input_ids if inputs_embeds is None else None,
            inputs_embeds=inputs_embeds,
            attention_mask=plain_causal_mask(body, full_mask) if trusted else hide_right_padding(full_mask),
            use_cache=False,
            output_attentions=output_attentions,
            # The library records by hooks that it hangs on the layers once per body: a cut one would hang its own.
            output_hidden_states=layers is None,
            return_dict=True,
        )

    # --------------------------------------------------------------------------------------------------- forward

    def forward(  # noqa: PLR0913 -- Hugging Face signature
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
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
            craft_raw_only: return C_R alone, without hidden states; the LLM runs only up to its layer.
            vision_features: (B, N, embed_dim) output of the towers for these pixels, when known already.
            trusted_masks: the caller vouches for Q slots per row and right padding: nothing is read back to check.
            compat: published arguments without a role here; diffusion and FiLM inputs must be None/False.
        Raises ValueError for inconsistent images, masks or layer index, NotImplementedError for unsupported inputs.
        """
        check_compat(compat)
        check_unsupported(past_key_values is not None or use_cache, inputs_embeds, pixel_values)
        check_craft(output_craft_features, craft_raw_only, pixel_values)
        projected, mask, full_mask = None, None, attention_mask
        if pixel_values is not None:
            mask = self.resolve_action_mask(action_mask, labels, trusted_masks)
            features = self.vision_backbone(pixel_values) if vision_features is None else vision_features
            projected = self.projector(features)
            inputs_embeds, full_mask = self._multimodal_inputs(input_ids, attention_mask, projected, mask)
        layers = resolve_craft_layer(craft_layer_idx, self._num_states) if craft_raw_only else None
        output = self._run_body(layers, input_ids, inputs_embeds, (full_mask, trusted_masks), bool(output_attentions))
        result = PrismaticCausalLMOutputWithPast(
            logits=self.language_model.lm_head(output.last_hidden_state) if output_logits else None,
            hidden_states=output.hidden_states if output_hidden_states and layers is None else None,
            attentions=output.attentions if output_attentions else None,
            projector_features=projected if output_projector_features else None,
        )
        if output_craft_features:
            assert inputs_embeds is not None and mask is not None  # made from `pixel_values`
            layer = None if craft_raw_only else resolve_craft_layer(craft_layer_idx, self._num_states)
            self._add_craft_features(result, output, (attention_mask, mask), layer, craft_cr_token_mode)
        return result if return_dict is not False else result.to_tuple()

    def _add_craft_features(
        self,
        result: PrismaticCausalLMOutputWithPast,
        output: Any,
        masks: tuple[torch.Tensor | None, torch.Tensor],
        layer: int | None,
        token_mode: CrTokenMode | str,
    ) -> None:
        """C_R of the hidden state `layer`, and C_AQ; None is the output of a body that was cut there: C_R alone."""
        attention_mask, action_mask = masks
        layout, mode = self.bridge_layout, CrTokenMode(token_mode)
        state = output.last_hidden_state if layer is None else output.hidden_states[layer]
        if layer is not None:
            result.action_query_features = layout.action_query_latent(output.hidden_states[-1], action_mask)
        result.raw_latent_features, result.raw_latent_mask = layout.raw_latent(state, attention_mask, action_mask, mode)

    @property
    def _num_states(self) -> int:
        return len(self.language_model.model.layers) + 1  # the embeddings are the first

    def bridge_states(
        self, hidden_states: Sequence[torch.Tensor], action_mask: torch.Tensor, legacy_slices: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Task (B, layers+1, N, D) and action (B, layers+1, Q, D) states of the head: `BridgeLayout.bridge_states`."""
        return self.bridge_layout.bridge_states(hidden_states, action_mask, legacy_slices)


class OpenVLAForActionPrediction(PrismaticForConditionalGeneration):
    """The model with data-set statistics and single-sample action prediction."""

    config_class: Any = OpenVLAConfig
    if TYPE_CHECKING:
        config: OpenVLAConfig

    def __init__(self, config: OpenVLAConfig) -> None:
        """Adds the action bins and their centres."""
        super().__init__(config)
        self.bins = np.linspace(-1, 1, config.n_action_bins)
        self.bin_centers = (self.bins[:-1] + self.bins[1:]) / 2.0
        # Undo the vocabulary padding; only the discrete decoder of Llama checkpoints would use it.
        self.vocab_size = config.text_config.vocab_size - config.pad_to_multiple_of
        self.version: str | None = None

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
        check_compat({"noisy_action_projector": noisy_action_projector, "use_film": use_film})
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


def _proprio_features(proprio: Any | None, projector: nn.Module | None) -> torch.Tensor | None:
    """Normalised proprio (P,) or (1, P) -> (1, D), or None."""
    if proprio is None:
        return None
    if projector is None:
        raise ValueError("`proprio` was given without a `proprio_projector`")
    weight = next(projector.parameters())
    tensor = torch.as_tensor(proprio, device=weight.device).to(weight.dtype)
    return projector(tensor.reshape(1, -1))
