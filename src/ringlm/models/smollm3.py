"""SmolLM3: Llama of whose layers every fourth has no rotary positions (NoPE, arXiv:2501.18795).

transformers' SmolLM3ForCausalLM is the reference. Split as Llama is; config.json's no_rope_layers names the layers.
"""

from ringlm.models.llama import build

__all__ = ["build"]
