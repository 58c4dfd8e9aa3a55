"""L1 action head: a short attention network that reads every LLM layer once.

Block i (0-based) consumes hidden state i+1 of the LLM; hidden state 0 (the input embeddings) is never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prismatic.models.activations import layer_norm, product_dtype

ROPE_BASE = 10000.0
RopeTables = tuple[torch.Tensor, torch.Tensor]


class RopeMode(str, Enum):
    """Arithmetic of the rotary angles: float32, or bfloat16 as in published Pro heads (positions collapse)."""

    EXACT = "exact"
    LEGACY = "legacy"


class ChunkStart(str, Enum):
    """Input of the head's first layer: zeros (published) or one learned vector per chunk row."""

    ZEROS = "zeros"
    LEARNED = "learned"


class Phase(str, Enum):
    """Published names of the two modes of the head; start noise is added in training only."""

    TRAINING = "Training"
    INFERENCE = "Inference"


@dataclass(frozen=True)
class ActionHeadConfig:
    """Geometry and options of the head; stored with a checkpoint.

    `num_task_tokens` is the number of vision tokens N the head was trained for. `start_noise_std` is the training
    noise on the start (0.02 in published training). `published_layout` adds the parameters that published Pro files
    contain and nothing reads (`film_gen`).
    """

    hidden_dim: int = 896
    action_dim: int = 7
    chunk_len: int = 8
    num_blocks: int = 24
    num_heads: int = 8
    num_task_tokens: int = 512
    use_pro_version: bool = True
    rope_mode: RopeMode = RopeMode.EXACT
    chunk_start: ChunkStart = ChunkStart.ZEROS
    start_noise_std: float = 0.02
    published_layout: bool = True

    def __post_init__(self) -> None:
        """Coerce enum names; ValueError on impossible geometry."""
        object.__setattr__(self, "rope_mode", RopeMode(self.rope_mode))
        object.__setattr__(self, "chunk_start", ChunkStart(self.chunk_start))
        for name in ("hidden_dim", "action_dim", "chunk_len", "num_blocks", "num_heads", "num_task_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"action head field `{name}`: expected a positive integer, got {getattr(self, name)}")
        if self.hidden_dim % (2 * self.num_heads):
            raise ValueError(
                f"action head: hidden_dim {self.hidden_dim} must be a multiple of 2*num_heads ({2 * self.num_heads})"
            )
        if self.start_noise_std < 0:
            raise ValueError(f"action head field `start_noise_std`: expected >= 0, got {self.start_noise_std}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable dict; inverse of `from_dict`."""
        return {k: v.value if isinstance(v, Enum) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ActionHeadConfig:
        """Build from a dict; ValueError on unknown fields."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"action head config: unknown fields {unknown}")
        return cls(**values)


def rope_tables(length: int, head_dim: int, mode: RopeMode, device: torch.device | None = None) -> RopeTables:
    """cos and sin, each (length, head_dim); float32 (exact) or bfloat16 (legacy: every step rounded to bfloat16).

    The second half of the feature axis repeats the first, while `rotate_pairs` swaps neighbours. The two conventions
    do not form a rotation; published weights were trained with this combination, so it is kept.
    """
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    dtype = torch.bfloat16 if mode is RopeMode.LEGACY else torch.float32
    inv_freq = (1.0 / ROPE_BASE**exponent).to(dtype)
    positions = torch.arange(length, device=device, dtype=torch.float32).to(dtype)
    angles = positions[:, None] * inv_freq[None, :]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate_pairs(x: torch.Tensor, tables: RopeTables) -> torch.Tensor:
    """x (B, H, T, d) -> x*cos + swap(x)*sin with swap(x)[2j] = -x[2j+1], swap(x)[2j+1] = x[2j]."""
    cos, sin = (table[: x.shape[-2]].to(x.dtype) for table in tables)
    swapped = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos + swapped * sin


class MLPResNetBlock(nn.Module):
    """Plain block: one K and one V projection shared by self, conditioning and vision tokens."""

    def __init__(self, config: ActionHeadConfig) -> None:
        """`gating_factor` starts at 0: vision logits are then 0 (uniform attention), not absent."""
        super().__init__()
        dim = config.hidden_dim
        self.num_heads = config.num_heads
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())
        self.q_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        self.gating_factor = nn.Parameter(torch.zeros(1))
        self._add_kv_projections(config)

    def _add_kv_projections(self, config: ActionHeadConfig) -> None:
        self.k_proj = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.v_proj = nn.Linear(config.hidden_dim, config.hidden_dim)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, H, T, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _keys_values(
        self, x: torch.Tensor, condition: torch.Tensor, task: torch.Tensor, tables: RopeTables | None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Keys per source and joint values (B, H, sum T, d)."""
        lengths = [x.shape[1], condition.shape[1], task.shape[1]]
        tokens = torch.cat([x, condition, task], dim=1)
        keys = self._heads(self.k_proj(tokens)).split(lengths, dim=2)
        return list(keys), self._heads(self.v_proj(tokens))

    def _query(self, x: torch.Tensor, tables: RopeTables | None) -> torch.Tensor:
        return self._heads(self.q_proj(x))

    def forward(
        self, x: torch.Tensor, condition: torch.Tensor, task: torch.Tensor, tables: RopeTables | None = None
    ) -> torch.Tensor:
        """x (B, K, D), condition (B, Q [+1], D), task (B, N, D) -> (B, K, D)."""
        query = self._query(x, tables)
        (k_self, k_condition, k_task), values = self._keys_values(x, condition, task, tables)
        # The gate multiplies the vision logits; scaling the keys is the same and keeps the attention fused.
        gate = torch.tanh(self.gating_factor).to(k_task.dtype)
        keys = torch.cat([k_self, k_condition, gate * k_task], dim=2)
        y = F.scaled_dot_product_attention(query, keys, values, scale=1.0 / math.sqrt(query.shape[-1]))
        norm, linear, act = self.ffn
        assert isinstance(norm, nn.LayerNorm)
        return act(linear(layer_norm(x + self.o_proj(y.transpose(1, 2).flatten(2)), norm)))


class MLPResNetBlockPro(MLPResNetBlock):
    """Pro block: separate K and V projections per source and rotary angles that restart for every source."""

    def _add_kv_projections(self, config: ActionHeadConfig) -> None:
        dim = config.hidden_dim
        for source in ("self", "adapter", "task"):
            setattr(self, f"k_{source}", nn.Linear(dim, dim))
            setattr(self, f"v_{source}", nn.Linear(dim, dim))
        if config.published_layout:
            self.film_gen = nn.Sequential(nn.Linear(dim, 2 * dim))
            self.film_gen.requires_grad_(False)

    def _keys_values(
        self, x: torch.Tensor, condition: torch.Tensor, task: torch.Tensor, tables: RopeTables | None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        assert tables is not None  # a Pro head makes them
        sources = {"self": x, "adapter": condition, "task": task}
        keys = [rotate_pairs(self._heads(getattr(self, f"k_{s}")(t)), tables) for s, t in sources.items()]
        values = torch.cat([getattr(self, f"v_{s}")(t) for s, t in sources.items()], dim=1)
        return keys, self._heads(values)

    def _query(self, x: torch.Tensor, tables: RopeTables | None) -> torch.Tensor:
        assert tables is not None  # a Pro head makes them
        return rotate_pairs(self._heads(self.q_proj(x)), tables)


class MLPResNet(nn.Module):
    """LayerNorm, Linear, ReLU, the blocks, LayerNorm, Linear."""

    def __init__(self, config: ActionHeadConfig) -> None:
        """Parameter names equal the published ones below `model.`."""
        super().__init__()
        self.config = config
        self._gradient_checkpointing_func: Callable[..., torch.Tensor]  # given with the next
        self.gradient_checkpointing = False  # set by `apply_tuning`
        start_dim = config.hidden_dim * config.action_dim
        block = MLPResNetBlockPro if config.use_pro_version else MLPResNetBlock
        if config.chunk_start is ChunkStart.LEARNED:
            self.chunk_start = nn.Parameter(torch.randn(config.chunk_len, start_dim) * 0.02)
        self.layer_norm1 = nn.LayerNorm(start_dim)
        self.fc1 = nn.Linear(start_dim, config.hidden_dim)
        self.mlp_resnet_blocks = nn.ModuleList(block(config) for _ in range(config.num_blocks))
        self.layer_norm2 = nn.LayerNorm(config.hidden_dim)
        self.fc2 = nn.Linear(config.hidden_dim, config.action_dim)

    def start(self, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Start (K, A*D): zeros or the learned rows, plus `noise` of the same shape."""
        weight = self.fc1.weight
        if self.config.chunk_start is ChunkStart.LEARNED:
            start: torch.Tensor = self.chunk_start
        else:
            start = torch.zeros(self.config.chunk_len, weight.shape[1], dtype=weight.dtype, device=weight.device)
        return start if noise is None else start + noise.to(start)

    def _tables(self, task: torch.Tensor, condition: torch.Tensor) -> RopeTables | None:
        if not self.config.use_pro_version:
            return None
        length = max(self.config.chunk_len, task.shape[2], condition.shape[2])
        return rope_tables(length, self.config.hidden_dim // self.config.num_heads, self.config.rope_mode, task.device)

    def forward(self, task: torch.Tensor, condition: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """task (B, layers+1, N, D), condition (B, layers+1, Q[+1], D), noise (K, A*D)|None -> (B, K, A)."""
        tables = self._tables(task, condition)
        # The start is the same for every sample: embed it once, then expand.
        x = F.relu(self.fc1(layer_norm(self.start(noise), self.layer_norm1)))
        x = x.unsqueeze(0).expand(task.shape[0], -1, -1)
        # Unbind once: indexing per block would make backward fill a full-size gradient for every block.
        layers = zip(condition.unbind(1)[1:], task.unbind(1)[1:], strict=True)
        for block, (layer_condition, layer_task) in zip(self.mlp_resnet_blocks, layers, strict=True):
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x, layer_condition, layer_task, tables)
            else:
                x = block(x, layer_condition, layer_task, tables)
        return self.fc2(layer_norm(x, self.layer_norm2))


class L1RegressionActionHead(nn.Module):
    """Action chunk from the hidden states of all LLM layers.

    The plain version (`use_pro_version=False`, zero start) has no positional information: at inference all K rows of
    the chunk are identical. The Pro version separates the rows through rotary positions, a learned start does so from
    the outset.
    """

    def __init__(self, **options: Any) -> None:
        """`options` are the fields of `ActionHeadConfig`; ValueError on unknown or impossible ones."""
        super().__init__()
        self.geometry = ActionHeadConfig.from_dict(options)
        self.model = MLPResNet(self.geometry)

    @property
    def config(self) -> dict[str, Any]:
        """JSON-serialisable options: `L1RegressionActionHead(**head.config)` has the same layout."""
        return self.geometry.to_dict()

    @property
    def use_pro_version(self) -> bool:
        """True for Pro blocks."""
        return self.geometry.use_pro_version

    def _split(self, states: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.geometry.num_task_tokens
        if isinstance(states, torch.Tensor):
            if states.shape[2] <= tokens:
                raise ValueError(f"action head: expected more than {tokens} tokens per layer, got {states.shape[2]}")
            states = (states[:, :, :tokens], states[:, :, tokens:])
        task, action = states
        if task.shape[2] != tokens:
            raise ValueError(f"action head: trained for {tokens} task tokens (vision patches), got {task.shape[2]}")
        blocks = self.geometry.num_blocks
        if task.shape[1] != blocks + 1:
            raise ValueError(
                f"action head: expected {blocks + 1} hidden states for {blocks} blocks, got {task.shape[1]}"
            )
        return task, action

    def _draw_noise(self) -> torch.Tensor | None:
        if self.geometry.start_noise_std == 0:
            return None
        weight = self.model.fc1.weight
        shape = (self.geometry.chunk_len, weight.shape[1])
        return torch.randn(shape, dtype=weight.dtype, device=weight.device) * self.geometry.start_noise_std

    def forward(
        self,
        actions_hidden_states: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        proprio_features: torch.Tensor | None = None,
        start_noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normalised actions (B, K, A).

        Args:
            actions_hidden_states: (B, layers+1, N+Q, D), or the pair task (.., N, D), action (.., Q, D).
            proprio_features: (B, D) projected state, one extra conditioning token; None = no such token.
            start_noise: (K, A*D) added to the start; None draws it in training mode, adds nothing in eval mode.

        Raises ValueError when the token or layer counts differ from the configuration.
        """
        task, action = self._split(actions_hidden_states)
        dtype = product_dtype(task) or self.model.fc1.weight.dtype
        task, action = task.to(dtype), action.to(dtype)
        if proprio_features is not None:
            token = proprio_features.to(dtype)[:, None, None].expand(-1, action.shape[1], 1, -1)
            action = torch.cat([action, token], dim=2)
        if start_noise is None and self.training:
            start_noise = self._draw_noise()
        return self.model(task, action, start_noise)

    def predict_action(
        self,
        actions_hidden_states: torch.Tensor,
        proprio: torch.Tensor | None = None,
        proprio_projector: nn.Module | None = None,
        phase: Phase | str = Phase.INFERENCE,
    ) -> torch.Tensor:
        """Published signature: projects the normalised proprio (B, P); "Training" adds start noise -> (B, K, A)."""
        features = None
        if proprio is not None:
            if proprio_projector is None:
                raise ValueError("`proprio` was given without a `proprio_projector`")
            features = proprio_projector(proprio.reshape(actions_hidden_states.shape[0], -1))
        was_training = self.training
        self.training = Phase(phase) is Phase.TRAINING
        try:
            return self(actions_hidden_states, features)
        finally:
            self.training = was_training
