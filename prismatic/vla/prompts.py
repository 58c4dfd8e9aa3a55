"""The text prompt of the policy, the same in training and evaluation."""

from __future__ import annotations

PROMPT_KIND = "qwen_chat"
_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def build_prompt(instruction: str) -> str:
    """Qwen chat prompt up to and including the assistant header; the instruction is lower-cased.

    No token is put in front by the tokenizer and none follows: the action queries come right after the last newline.
    Raises ValueError for an empty instruction.
    """
    if not instruction.strip():
        raise ValueError(f"the instruction is {instruction!r}, expected a non-empty text")
    question = f"What action should the robot take to {instruction.lower()}?"
    return f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
