"""Replay of text: the language model goes on predicting the next token of a text beside the actions (co-training)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prismatic.craft.reference import unwrap
from prismatic.training.retention.protocol import Retention, StepFacts

WINDOW = 128
"""Tokens of a window that are predicted."""
_FLAG = "--replay_text"


class TextReplay(Retention):
    """Adds weight * mean next-token cross-entropy on a window of a text to the action loss of each micro-batch.

    The language model runs alone, as it was pretrained: no image, no action queries. Windows are drawn from the seed
    and the number of the step, so that a resumed run draws the same.

    Args:
        model: the policy, possibly wrapped by DDP.
        tokens: (T,) int64, T > `WINDOW`, as of `read`.
        weight: > 0.
        autocast: context of the forward pass.
        key: seed and number of the process, for the draws.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        weight: float,
        autocast: Callable[[], AbstractContextManager[Any]],
        key: tuple[int, int] = (0, 0),
    ) -> None:
        self._policy: Any = unwrap(model)
        self._tokens, self._weight, self._autocast, self._key = tokens, weight, autocast, key
        self._step, self._drawn = 0, 0
        self._losses: list[Tensor] = []

    @staticmethod
    def read(path: str, tokenizer: Any) -> Tensor:
        """The tokens of a UTF-8 text file. FileNotFoundError, or ValueError for one that is not text or too short."""
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{_FLAG} {path}: no such file, expected a text file")
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{_FLAG} {path}: not UTF-8 text ({error})") from None
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) <= WINDOW:
            raise ValueError(f"{_FLAG} {path}: {len(ids)} tokens, expected more than the {WINDOW} of a window")
        return torch.tensor(ids, dtype=torch.int64)

    def at(self, step: int) -> Retention:
        self._step, self._drawn = step, 0
        return self

    def loss_term(self, value: Any, fraction: float, loss_scale: float) -> Tensor:
        window = self._draw()
        with self._autocast():
            logits = self._policy.vla.language_model(input_ids=window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[0, 1:])
        self._losses.append(loss.detach() * fraction)
        return self._weight * loss

    def _draw(self) -> Tensor:
        """(1, WINDOW + 1) tokens."""
        generator = np.random.default_rng((*self._key, self._step, self._drawn))
        self._drawn += 1
        first = int(generator.integers(len(self._tokens) - WINDOW))
        window = self._tokens[None, first : first + WINDOW + 1]
        return window.to(next(self._policy.parameters()).device, non_blocking=True)

    def combine_(self, facts: StepFacts) -> dict[str, float]:
        """The gradients are complete: reports the loss of the text, averaged over the processes."""
        losses, self._losses = self._losses, []
        mean = torch.stack(losses).sum()
        return {"VLA Train/Text Loss": float(mean if facts.reduce_mean is None else facts.reduce_mean(mean))}

    def banner(self) -> list[str]:
        return [f"Replay of text: {len(self._tokens):,} tokens, windows of {WINDOW}, weight {self._weight:g}"]
