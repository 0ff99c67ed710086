"""Mistral: Llama whose layers see only a window of positions (arXiv:2310.06825), in later models all of them again.

transformers' MistralForCausalLM is the reference. Split as Llama is; the window is config.json's sliding_window.
"""

from ringlm.models.llama import build

__all__ = ["build"]
