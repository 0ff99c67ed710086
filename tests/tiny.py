"""Tiny random Llama models on disk, seeded, without a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 131


def save_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A LlamaForCausalLM in `folder` as transformers saves it: odd sizes, three key-value heads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_hidden_layers": 3,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**(fields | changes))).save_pretrained(folder)
    return folder
