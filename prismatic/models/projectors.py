"""Projectors into the LLM width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ProprioProjector(nn.Module):
    """Normalised proprioceptive state -> one token: fc1, GELU (erf), fc2."""

    def __init__(self, llm_dim: int, proprio_dim: int) -> None:
        """`llm_dim` D, `proprio_dim` P."""
        super().__init__()
        self.llm_dim = llm_dim
        self.proprio_dim = proprio_dim
        self.fc1 = nn.Linear(proprio_dim, llm_dim)
        self.fc2 = nn.Linear(llm_dim, llm_dim)

    def forward(self, proprio: torch.Tensor) -> torch.Tensor:
        """(B, P) in [-1, 1] -> (B, D). ValueError on another P."""
        if proprio.shape[-1] != self.proprio_dim:
            raise ValueError(f"proprio: expected {self.proprio_dim} values per sample, got {proprio.shape[-1]}")
        return self.fc2(F.gelu(self.fc1(proprio.to(self.fc1.weight.dtype))))
