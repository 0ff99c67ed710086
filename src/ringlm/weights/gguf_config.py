"""GGUF's words for Hugging Face's: config.json from metadata, and names of tensors. Torch-free.

llama.cpp's convert_hf_to_gguf.py is the source of both, and src/models of what its metadata leave out. The converter
also permutes the rows of q and k of some architectures, see `is_permuted`, and adds 1 to the norms of Gemma.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from ringlm.errors import ModelError
from ringlm.weights.gguf_header import GGUFHeader

# What each rotary frequency is divided by, (rotary dimensions / 2,) float32: always, or beyond and within the context
# that the model was first made for.
ROPE_FACTORS: Final = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class _Architecture(NamedTuple):
    """What is special about one of GGUF's architectures."""

    name: str  # Hugging Face's
    model_type: str
    permuted: bool = False
    inner: Mapping[str, str] = {}  # names of tensors that differ from _INNER's
    config: Mapping[str, Any] = {}  # what metadata leave out


_GEMMA: Final = {"ffn_norm": "pre_feedforward_layernorm"}
_ARCHITECTURES: Final = {
    "llama": _Architecture("LlamaForCausalLM", "llama", permuted=True),
    "qwen2": _Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": _Architecture("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": _Architecture("Qwen3MoeForCausalLM", "qwen3_moe", config={"norm_topk_prob": True}),
    "gemma2": _Architecture("Gemma2ForCausalLM", "gemma2", inner=_GEMMA, config={"norm_offset": 0.0}),
    "gemma3": _Architecture("Gemma3ForCausalLM", "gemma3_text", inner=_GEMMA, config={"norm_offset": 0.0}),
    "phi3": _Architecture("Phi3ForCausalLM", "phi3", inner={"ffn_up": "mlp.gate_up_proj"}),
    "smollm3": _Architecture("SmolLM3ForCausalLM", "smollm3", permuted=True),
    "olmo2": _Architecture("Olmo2ForCausalLM", "olmo2"),
}
_OPTIONAL: Final = (  # metadata, config.json's word, type
    ("attn_logit_softcapping", "attn_logit_softcapping", float),
    ("final_logit_softcapping", "final_logit_softcapping", float),
    ("rope.freq_base_swa", "rope_local_base_freq", float),
    ("rope.scaling.original_context_length", "original_max_position_embeddings", int),
)
_MIXTRAL: Final = _Architecture("MixtralForCausalLM", "mixtral", permuted=True)  # GGUF's llama with experts
_MOST_EXPERTS: Final = 1 << 14  # more is a damaged file
_LARGEST: Final = {"gemma2": 46, "gemma3": 62}  # layers of the size whose scores are scaled by hidden_size / heads
_OUTER: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
}
_BLOCK: Final = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hugging_face_name(gguf_name: str, arch: str) -> str | None:
    """`blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`; None for a name with no counterpart. A `*`
    stands for every expert's number: GGUF has their tensors as one, with a dimension more."""
    if match := _BLOCK.fullmatch(gguf_name):
        layer, inner, kind = match.groups()
        name = _ARCHITECTURES[arch].inner.get(inner) or _INNER.get(inner)
        return f"model.layers.{int(layer)}.{name}.{kind}" if name else None
    outer, _, kind = gguf_name.rpartition(".")
    return f"{_OUTER[outer]}.{kind}" if outer in _OUTER and kind == "weight" else None


def is_permuted(name: str, arch: str) -> bool:
    """Whether the converter put this tensor's rows (Hugging Face name) in ggml's rotary order.

    Within a head, Hugging Face pairs row i with row i + head_dim / 2; ggml keeps a pair side by side.
    """
    return _ARCHITECTURES[arch].permuted and bool(re.search(r"\.self_attn\.[qk]_proj\.(weight|bias)$", name))


def config_from(header: GGUFHeader) -> dict[str, Any]:
    """The model's config.json as Hugging Face would write it; ModelError where the metadata do not suffice."""
    meta, file = header.metadata, header.path.name
    arch = meta.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise ModelError(f"{file}: architecture {arch!r} is not supported; known are {', '.join(_ARCHITECTURES)}.")
    special = _ARCHITECTURES[arch]

    def need(key: str, kind: type) -> Any:
        value = meta.get(f"{arch}.{key}")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ModelError(f"{file}: metadata {arch}.{key} is {_shown(value)}; a {kind.__name__} is needed.")
        return value

    def maybe(key: str, kind: type, default: Any) -> Any:
        return need(key, kind) if f"{arch}.{key}" in meta else default

    experts = maybe("expert_count", int, 0)
    if experts and (arch not in ("llama", "qwen3moe") or experts > _MOST_EXPERTS):
        raise ModelError(f"{file}: a mixture of {experts} experts is not supported for {arch}.")
    if experts and arch == "llama":
        special = _MIXTRAL
    heads = need("attention.head_count", int)
    hidden = need("embedding_length", int)
    if heads < 1:
        raise ModelError(f"{file}: metadata {arch}.attention.head_count is {heads}.")
    window = maybe("attention.sliding_window", int, 0)
    if arch == "olmo2" and window:
        raise ModelError(f"{file}: OLMo 3 is not supported.")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file}: tensor 'token_embd.weight' is missing.")
    ends = (meta.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    rotary = maybe("rope.dimension_count", int, None)  # of a head, which has as many if nothing else is said
    head_dim = maybe("attention.key_length", int, hidden // heads if arch == "phi3" else rotary or hidden // heads)
    if head_dim < 1:
        raise ModelError(f"{file}: a head has {head_dim} dimensions.")
    config = {
        "architectures": [special.name],
        "model_type": special.model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length", int),
        "num_hidden_layers": need("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": maybe("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": need("context_length", int),
        "vocab_size": embedding.shape[0],
        "rope_theta": maybe("rope.freq_base", float, 10000.0),
        "rope_scaling": _rope_scaling(header, arch, meta),
        "partial_rotary_factor": (rotary or head_dim) / head_dim,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": not {"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"}.isdisjoint(header.tensors),
        "attention_output_bias": "blk.0.attn_output.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in header.tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if isinstance(end, int))),
        **special.config,
    }
    if experts:
        config["num_local_experts"] = experts
        config["num_experts_per_tok"] = need("expert_used_count", int)
        config["moe_intermediate_size"] = maybe("expert_feed_forward_length", int, config["intermediate_size"])
    if arch in _LARGEST:
        large = config["num_hidden_layers"] == _LARGEST[arch]
        config["query_pre_attn_scalar"] = hidden // heads if large else head_dim
    if f"{arch}.attention.sliding_window" in meta:
        config["sliding_window"] = window or None
    pattern = meta.get(f"{arch}.attention.sliding_window_pattern")
    if isinstance(pattern, list):
        config["layer_types"] = ["sliding_attention" if sliding else "full_attention" for sliding in pattern]
    elif pattern is not None:
        config["sliding_window_pattern"] = pattern
    for key, name, kind in _OPTIONAL:
        if f"{arch}.{key}" in meta:
            config[name] = need(key, kind)
    return config


def _rope_scaling(header: GGUFHeader, arch: str, meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """Factors of frequencies have become tensors in GGUF, llama3's too; the rest is metadata."""

    def factors(name: str) -> list[float] | None:
        info = header.tensors.get(name)
        if info is None:
            return None
        if info.ggml_type != "F32" or len(info.shape) != 1:
            raise ModelError(f"{header.path.name}: tensor {name!r} is {info.ggml_type} {list(info.shape)}.")
        return list(struct.unpack_from(f"<{info.shape[0]}f", header.data[info.path], info.offset))

    always, long, short = map(factors, ROPE_FACTORS)
    if always is not None:
        return {"rope_type": "factors", "factors": always}
    if long is not None and short is not None:
        return {
            "rope_type": "longrope",
            "long_factor": long,
            "short_factor": short,
            "attention_factor": meta.get(f"{arch}.rope.scaling.attn_factor"),
        }
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    factor = meta.get(f"{arch}.rope.scaling.factor", meta.get(f"{arch}.rope.scale_linear", 1.0))
    if kind == "none" and factor == 1.0:
        return None
    return {"rope_type": "linear" if kind == "none" else kind, "factor": factor}


def _shown(value: object) -> str:
    return "missing" if value is None else f"{value!r:.40}"
