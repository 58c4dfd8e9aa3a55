"""Samples to a batch: prompt tokens with action query placeholders, pixel values and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from prismatic.vla.prompts import PromptKind, check_tokenizer, encode_prompt

_REMEMBERED = 10_000
"""Instructions whose tokens are kept."""


class VLACollator:
    """Builds the batch dictionary of the policy from `VLADataset` samples.

    tokenizer: Hugging Face tokenizer with a pad token. image_processor: object whose
    `preprocess_batch(images uint8 (B, n, H, W, 3))` returns float32 (B, 3 * towers * n, H, W).
    num_action_queries: placeholders after the prompt (Q). prompt_kind: of the policy's language model.
    """

    def __init__(
        self, tokenizer, image_processor, num_action_queries: int, prompt_kind: PromptKind = PromptKind.QWEN_CHAT
    ):
        if num_action_queries < 1:
            raise ValueError(f"num_action_queries is {num_action_queries}, expected at least 1")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token, which is needed to pad prompts to one length")
        check_tokenizer(tokenizer, prompt_kind)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.num_action_queries = num_action_queries
        self.prompt_kind = prompt_kind
        self._prompt_ids: dict[str, torch.Tensor] = {}

    @classmethod
    def of_policy(cls, processor, model) -> VLACollator:
        """For a `VLAPolicyModel` and the `PrismaticProcessor` that travels with it."""
        return cls(processor.tokenizer, processor.image_processor, model.num_action_queries, model.prompt_kind)

    def __call__(self, samples: Sequence[dict]) -> dict:
        """B samples -> one batch.

        Returns input_ids (B, L) int64 (prompt, Q placeholders, right padding), attention_mask (B, L) bool (prompt and
        placeholders), action_mask (B, L) bool (the Q placeholders of each row), pixel_values
        (B, 3 * towers * n, H, W) float32, proprio (B, P) and, unless the samples are observations, actions (B, K, A)
        float32, trusted_masks (True: the model need not check the masks), dataset_names, sample_ids, keys and
        instructions (lists); of a mixture with replay is_replay (list of bool).

        Raises ValueError for samples with different numbers or sizes of images.
        """
        batch: dict[str, Any] = self.tokenize([sample["instruction"] for sample in samples])
        shapes = {sample["images"].shape for sample in samples}
        if len(shapes) != 1:
            raise ValueError(f"samples of one batch have images of shapes {sorted(shapes)}, expected one shape")
        images = np.stack([sample["images"] for sample in samples])
        batch["pixel_values"] = self.image_processor.preprocess_batch(images)
        for name in ("proprio", "actions") if "actions" in samples[0] else ("proprio",):
            batch[name] = torch.from_numpy(np.stack([sample[name] for sample in samples]))
        # By construction: Q placeholders per row, padding on the right. A check would wait for the device.
        batch["trusted_masks"] = True
        batch["dataset_names"] = [sample["dataset_name"] for sample in samples]
        batch["sample_ids"] = [sample["sample_id"] for sample in samples]
        if "key" in samples[0]:
            batch["keys"] = [sample["key"] for sample in samples]
        if "is_replay" in samples[0]:
            batch["is_replay"] = [sample["is_replay"] for sample in samples]
        batch["instructions"] = [sample["instruction"] for sample in samples]
        return batch

    def tokenize(self, instructions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Instructions -> input_ids, attention_mask, action_mask, each (B, L), as in a batch."""
        prompts = [self._encode(instruction) for instruction in instructions]
        lengths = torch.tensor([len(ids) for ids in prompts])[:, None]
        position = torch.arange(int(lengths.max()) + self.num_action_queries)[None]
        # Placeholder ids are pad ids: their embeddings are replaced by the action queries. The masks therefore come
        # from positions, never from comparing ids.
        input_ids = torch.full((len(prompts), position.shape[1]), self.tokenizer.pad_token_id, dtype=torch.int64)
        for row, ids in enumerate(prompts):
            input_ids[row, : len(ids)] = ids
        attention_mask = position < lengths + self.num_action_queries
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "action_mask": attention_mask & (position >= lengths),
        }

    def _encode(self, instruction: str) -> torch.Tensor:
        if instruction not in self._prompt_ids:
            if len(self._prompt_ids) >= _REMEMBERED:  # a server is asked anything
                self._prompt_ids.clear()
            ids = encode_prompt(self.tokenizer, instruction, self.prompt_kind)
            longest = self.tokenizer.model_max_length
            if len(ids) + self.num_action_queries > longest:
                raise ValueError(
                    f"prompt of {instruction[:200]!r} has {len(ids)} tokens and {self.num_action_queries} action "
                    f"queries, the tokenizer allows {longest}"
                )
            self._prompt_ids[instruction] = torch.tensor(ids, dtype=torch.int64)
        return self._prompt_ids[instruction]
