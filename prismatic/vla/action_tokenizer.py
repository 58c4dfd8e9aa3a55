"""Discrete action tokens: the last 256 ids of the vocabulary stand for uniform bins on [-1, 1]."""

from __future__ import annotations

import numpy as np


class ActionTokenizer:
    """Values in [low, high] <-> token ids, as in OpenVLA: id = vocab_size - bin, bin 1..bins.

    The L1 policy does not predict these ids; they mark the action slots in published training data.
    `bins` are the bin edges, (bins,) float64; `bin_centers` their midpoints, (bins - 1,): the two highest bins share
    the last one.
    """

    def __init__(self, vocab_size: int, bins: int = 256, low: float = -1.0, high: float = 1.0) -> None:
        """`vocab_size`: ordinary tokens of the tokenizer (151643 for Qwen2.5). ValueError when there are too few."""
        if not 1 < bins < vocab_size:
            raise ValueError(f"action tokenizer: expected 1 < bins < vocab_size {vocab_size}, got {bins} bins")
        if not low < high:
            raise ValueError(f"action tokenizer: expected low < high, got {low} and {high}")
        self.vocab_size = vocab_size
        self.low, self.high = low, high
        self.bins = np.linspace(low, high, bins)
        self.bin_centers = (self.bins[:-1] + self.bins[1:]) / 2.0

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Values (...) float, clipped to [low, high] -> token ids (...) int64. ValueError for NaN."""
        values = np.asarray(values)
        if np.isnan(values).any():
            raise ValueError("action tokenizer: the values hold NaN")
        return self.vocab_size - np.digitize(np.clip(values, self.low, self.high), self.bins).astype(np.int64)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Token ids (...) -> bin centres (...) float64; ids outside the action range take the nearest bin."""
        index = np.clip(self.vocab_size - np.asarray(ids, dtype=np.int64) - 1, 0, len(self.bin_centers) - 1)
        return self.bin_centers[index]
