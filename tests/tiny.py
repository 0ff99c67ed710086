"""Tiny random Llama models on disk, seeded, with a tokenizer or without."""

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


def save_speaking_llama(folder: Path) -> Path:
    """One whose words are w0, w1, …, w0 standing for all others; it chats, and does not end by itself."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer, words.decoder = tokenizers.pre_tokenizers.Whitespace(), tokenizers.decoders.Fuse()
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template).save_pretrained(folder)
    return save_llama(folder, eos_token_id=None)
