"""GGUF's words for Hugging Face's: config.json from metadata, and names of tensors. Torch-free.

llama.cpp's convert_hf_to_gguf.py is the source of both; it also permutes the rows of q and k, see `is_permuted`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any, Final

from ringlm.errors import ModelError
from ringlm.weights.gguf_header import GGUFHeader

ROPE_FACTORS: Final = "rope_freqs.weight"  # what each rotary frequency is divided by, (head_dim / 2,) float32

_ARCHITECTURES: Final = {"llama": ("LlamaForCausalLM", "llama")}  # GGUF's: (the class, model_type)
_OUTER: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK: Final = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hugging_face_name(gguf_name: str) -> str | None:
    """`blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`; None for a name with no counterpart."""
    if match := _BLOCK.fullmatch(gguf_name):
        layer, inner, kind = match.groups()
        return f"model.layers.{int(layer)}.{_INNER[inner]}.{kind}" if inner in _INNER else None
    outer, _, kind = gguf_name.rpartition(".")
    return f"{_OUTER[outer]}.{kind}" if outer in _OUTER and kind == "weight" else None


def is_permuted(name: str) -> bool:
    """Whether the converter put this tensor's rows (Hugging Face name) in ggml's rotary order.

    Within a head, Hugging Face pairs row i with row i + head_dim / 2; ggml keeps a pair side by side.
    """
    return bool(re.search(r"\.self_attn\.[qk]_proj\.(weight|bias)$", name))


def config_from(header: GGUFHeader) -> dict[str, Any]:
    """The model's config.json as Hugging Face would write it; ModelError where the metadata do not suffice."""
    meta, file = header.metadata, header.path.name
    arch = meta.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise ModelError(f"{file}: architecture {arch!r} is not supported; known are {', '.join(_ARCHITECTURES)}.")
    architecture, model_type = _ARCHITECTURES[arch]

    def need(key: str, kind: type) -> Any:
        value = meta.get(f"{arch}.{key}")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ModelError(f"{file}: metadata {arch}.{key} is {_shown(value)}; a {kind.__name__} is needed.")
        return value

    def maybe(key: str, kind: type, default: Any) -> Any:
        return need(key, kind) if f"{arch}.{key}" in meta else default

    if maybe("expert_count", int, 0):
        raise ModelError(f"{file}: a mixture of {meta[f'{arch}.expert_count']} experts is not supported.")
    heads = need("attention.head_count", int)
    hidden = need("embedding_length", int)
    if heads < 1:
        raise ModelError(f"{file}: metadata {arch}.attention.head_count is {heads}.")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file}: tensor 'token_embd.weight' is missing.")
    ends = (meta.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length", int),
        "num_hidden_layers": need("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": maybe("attention.head_count_kv", int, heads),
        "head_dim": maybe("attention.key_length", int, maybe("rope.dimension_count", int, hidden // heads)),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": need("context_length", int),
        "vocab_size": embedding.shape[0],
        "rope_theta": maybe("rope.freq_base", float, 10000.0),
        "rope_scaling": _rope_scaling(header, arch, meta),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "attention_output_bias": "blk.0.attn_output.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in header.tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if isinstance(end, int))),
    }


def _rope_scaling(header: GGUFHeader, arch: str, meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """llama3's scaling has become a tensor of factors in GGUF; the others are metadata."""
    info = header.tensors.get(ROPE_FACTORS)
    if info is not None:
        if info.ggml_type != "F32" or len(info.shape) != 1:
            raise ModelError(f"{header.path.name}: tensor {ROPE_FACTORS!r} is {info.ggml_type} {list(info.shape)}.")
        factors = struct.unpack_from(f"<{info.shape[0]}f", header.data[info.path], info.offset)
        return {"rope_type": "factors", "factors": list(factors)}
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    factor = meta.get(f"{arch}.rope.scaling.factor", meta.get(f"{arch}.rope.scale_linear", 1.0))
    if kind == "none" and factor == 1.0:
        return None
    return {"rope_type": "linear" if kind == "none" else kind, "factor": factor}


def _shown(value: object) -> str:
    return "missing" if value is None else f"{value!r:.40}"
