"""A Llama with random weights in a real model's shape, for benchmarks.

python benchmarks/make_model.py smollm2-135m FOLDER [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
from pathlib import Path

SHAPES = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128, 128256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, columns, layers, heads, kv_heads, head_dim, vocabulary = SHAPES[options.shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=columns,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, options.dtype)).save_pretrained(options.folder)


if __name__ == "__main__":
    main()
