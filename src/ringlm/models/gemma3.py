"""Gemma 3, text only: Gemma 2 with a norm on each query and key head instead of soft caps (arXiv:2503.19786).

Five layers with a window come before each one without, and have a rope of their own. transformers' Gemma3ForCausalLM is
the reference. Split as Llama is; every rank holds the heads' norms.
"""

from __future__ import annotations

from ringlm.models import gemma2
from ringlm.models.layers import Block, LayerBuilder


def block(layer: LayerBuilder) -> Block:
    """As Gemma 2's, with norms on the heads."""
    return gemma2.block(layer, layer.norm_of_each_head())
