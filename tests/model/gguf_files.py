"""A llama language model of toy size as the `gguf` package writes it, in the layout of llama.cpp's converter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prismatic.command_line import is_installed

MARKUP = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["p i", "c k", "pi ck", "Ġ u", "Ġu p"]
TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50_000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def vocabulary() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return [*MARKUP, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]


def toy_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary()), **TEXT)).eval()


def write_gguf(model: LlamaForCausalLM, file: Path) -> Path:
    """Weights in fp32 and the tokenizer; skips the test without the package."""
    if not is_installed("gguf"):
        pytest.skip("gguf is not installed: pip install 'craft-vla[smollm2]'")
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(gguf, writer)
    for name, value in _tensors(model).items():
        writer.add_tensor(name, np.ascontiguousarray(value.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(gguf, writer) -> None:
    tokens = vocabulary()
    special, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([special if token in MARKUP else normal for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)


_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    state, config = model.state_dict(), model.config
    found = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in _LAYER.items():
            value = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            if heads:  # llama.cpp turns neighbouring pairs where the library turns halves
                value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(value.shape)
            found[f"blk.{layer}.{theirs}.weight"] = value
    return found
