"""The text prompt of the policy, the same in training and evaluation. Its form belongs to the language model's body."""

from __future__ import annotations

from enum import Enum
from typing import Any

_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


class PromptKind(str, Enum):
    """Form of the prompt: a chat in Qwen's or SmolLM2's markup, or OpenVLA's plain question behind a BOS token.

    The two markups are one; Qwen's chat has a system message, ours of SmolLM2 has none, which saves 20 tokens a sample.
    """

    QWEN_CHAT = "qwen_chat"
    OPENVLA_TEXT = "openvla_text"
    SMOLLM_CHAT = "smollm_chat"


_OF_BODY = {"qwen2": PromptKind.QWEN_CHAT, "llama": PromptKind.OPENVLA_TEXT}
_OF_LLM = {"smollm2-135m-instruct": PromptKind.SMOLLM_CHAT}
_TURN = "<|im_start|>"


def prompt_kind_of(body: str, llm: str = "") -> PromptKind:
    """The prompt of a language model: its own where `llm_backbone_id` has one, else that of `text_config.model_type`.

    KeyError for another model type.
    """
    return _OF_LLM.get(llm) or _OF_BODY[body]


def build_prompt(instruction: str, kind: PromptKind = PromptKind.QWEN_CHAT) -> str:
    """The prompt's text up to where the action queries begin; the instruction is lower-cased.

    Chats: up to and including the newline after the assistant header. OpenVLA: up to and including the space after
    `Out:`, which Llama's tokenizer makes a token of its own (29871). Raises ValueError for an empty instruction.
    """
    if not instruction.strip():
        raise ValueError(f"the instruction is {instruction!r}, expected a non-empty text")
    question = f"What action should the robot take to {instruction.lower()}?"
    if kind is PromptKind.OPENVLA_TEXT:
        return f"In: {question}\nOut: "
    system = f"{_TURN}system\n{_SYSTEM}<|im_end|>\n" if kind is PromptKind.QWEN_CHAT else ""
    return f"{system}{_TURN}user\n{question}<|im_end|>\n{_TURN}assistant\n"


def check_tokenizer(tokenizer: Any, kind: PromptKind) -> None:
    """ValueError for a Hugging Face tokenizer without a token that the prompt begins with."""
    if kind is PromptKind.OPENVLA_TEXT and tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no BOS token, which a prompt for a llama body begins with (bos_token)")
    if kind is PromptKind.SMOLLM_CHAT and _TURN not in tokenizer.get_vocab():
        raise ValueError(f"the tokenizer has no token {_TURN}, which the prompt begins with")


def encode_prompt(tokenizer: Any, instruction: str, kind: PromptKind) -> list[int]:
    """Token ids of the prompt. Nothing is added in front but the BOS token of OpenVLA's form, and nothing behind."""
    ids = tokenizer(build_prompt(instruction, kind), add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids] if kind is PromptKind.OPENVLA_TEXT else ids
