"""Qwen2 and Qwen2.5: Llama with a bias on queries, keys and values (arXiv:2407.10671).

transformers' Qwen2ForCausalLM is the reference. Split as Llama is. With config.json's use_sliding_window, layers from
max_window_layers on see only a window of positions.
"""

from ringlm.models.llama import build

__all__ = ["build"]
