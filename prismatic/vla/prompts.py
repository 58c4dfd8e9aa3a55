"""The text prompt of the policy, the same in training and evaluation. Its form belongs to the language model's body."""

from __future__ import annotations

from enum import Enum
from typing import Any

_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


class PromptKind(str, Enum):
    """Form of the prompt: Qwen's chat markup, or OpenVLA's plain question behind a BOS token."""

    QWEN_CHAT = "qwen_chat"
    OPENVLA_TEXT = "openvla_text"


_OF_BODY = {"qwen2": PromptKind.QWEN_CHAT, "llama": PromptKind.OPENVLA_TEXT}


def prompt_kind_of(body: str) -> PromptKind:
    """The prompt of a language model by its `text_config.model_type`; KeyError for another one."""
    return _OF_BODY[body]


def build_prompt(instruction: str, kind: PromptKind = PromptKind.QWEN_CHAT) -> str:
    """The prompt's text up to where the action queries begin; the instruction is lower-cased.

    Qwen: up to and including the newline after the assistant header. OpenVLA: up to and including the space after
    `Out:`, which Llama's tokenizer makes a token of its own (29871). Raises ValueError for an empty instruction.
    """
    if not instruction.strip():
        raise ValueError(f"the instruction is {instruction!r}, expected a non-empty text")
    question = f"What action should the robot take to {instruction.lower()}?"
    if kind is PromptKind.OPENVLA_TEXT:
        return f"In: {question}\nOut: "
    return f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def check_tokenizer(tokenizer: Any, kind: PromptKind) -> None:
    """ValueError for a Hugging Face tokenizer without a token that the prompt begins with."""
    if kind is PromptKind.OPENVLA_TEXT and tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no BOS token, which a prompt for a llama body begins with (bos_token)")


def encode_prompt(tokenizer: Any, instruction: str, kind: PromptKind) -> list[int]:
    """Token ids of the prompt. Nothing is added in front but the BOS token of OpenVLA's form, and nothing behind."""
    ids = tokenizer(build_prompt(instruction, kind), add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids] if kind is PromptKind.OPENVLA_TEXT else ids
