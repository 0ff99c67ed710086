"""GGUF files for tests: a tiny model's folder converted as convert_hf_to_gguf does, and headers byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ringlm.weights.gguf_config import hugging_face_name

SIMPLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")  # gguf can write them
K_TYPES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
FACTORS = {"IQ4_NL": (0,)} | K_TYPES  # where float16 factors lie in a block
TYPES = {name: gguf.GGMLQuantizationType[name] for name in (*SIMPLE, *FACTORS)}

ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's order of rotary rows to ggml's (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_model(
    folder: Path, path: Path, types: dict[str, str] | None = None, default: str = "F32", in_a_part: int = 0
) -> Path:
    """The model in `folder` as a GGUF file, or as several with `in_a_part` tensors each; `types` are by a layer's last
    name, vectors are F32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=in_a_part)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if arch != "phi3":
        writer.add_key_length(size)
        writer.add_value_length(size)
        writer.add_rope_dimension_count(size)
    _add_windows_and_rope(writer, arch, config)
    if hasattr(config, "num_local_experts"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if arch == "qwen3moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(2)
    writer.add_token_list([f"<{index}>" for index in range(config.vocab_size)])
    if config.rope_parameters.get("rope_type") == "llama3":
        plain = 1.0 / config.rope_parameters["rope_theta"] ** (np.arange(0, size, 2) / size)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in _matrices(model):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.float().numpy()
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            data = data + 1
        if arch in ("llama", "smollm3") and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            data = permute(data, heads)
        kind = "F32" if data.ndim == 1 else (types or {}).get(name.split(".")[-2], default)
        add(writer, names.get_name(name, (".weight", ".bias")), data, kind)
    finish(writer)
    return path


def _matrices(model: Any) -> Iterator[tuple[str, Any]]:
    """The tensors of transformers' model, with gates and ups of experts apart, as the converter has them."""
    for name, tensor in model.state_dict().items():
        prefix, last = name.rpartition(".")[::2]
        if last == "gate_up_proj":
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2, 1), strict=True):
                yield f"{prefix}.{part}.weight", half
        else:
            yield f"{name}.weight" if last == "down_proj" else name, tensor


def _add_windows_and_rope(writer: gguf.GGUFWriter, arch: str, config: Any) -> None:
    """As the converter does it for each architecture."""
    rope = config.rope_parameters
    if arch == "gemma3":
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "phi3":
        heads = config.num_attention_heads
        writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * config.hidden_size) // heads)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or 0)
        if rope["rope_type"] == "longrope":
            scale, original = config.max_position_embeddings, config.original_max_position_embeddings
            factor = (1 + np.log(scale / original) / np.log(original)) ** 0.5
            writer.add_rope_scaling_attn_factors(float(factor))
            for name in ("long", "short"):
                writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))
    elif rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def encode(data: np.ndarray, kind: str) -> np.ndarray:
    """The rows of `data` as GGUF stores them in `kind`; random blocks of the same shape where gguf cannot."""
    if kind not in FACTORS:
        return gguf.quants.quantize(np.ascontiguousarray(data), TYPES[kind])
    random = np.random.default_rng(data.size)
    size, nbytes = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    raw = random.integers(0, 256, (data.size // size, nbytes), np.uint8)
    for place in FACTORS[kind]:
        raw[:, place : place + 2] = random.uniform(1e-5, 1e-3, (len(raw), 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(*data.shape[:-1], -1)


def add(writer: gguf.GGUFWriter, name: str, data: np.ndarray, kind: str) -> None:
    """One tensor, quantized to `kind`."""
    writer.add_tensor(name, encode(data, kind), raw_dtype=TYPES[kind])


def write_tensors(path: Path, kind: str) -> dict[str, np.ndarray]:
    """A file with a few tensors of one type, 4 and 2 heads of size 6; what it holds by Hugging Face name and in
    Hugging Face order, as stored."""
    heads, kv_heads, size, experts = 4, 2, 6, 3
    hidden = 512 if kind in K_TYPES else 96
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(10)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(2)
    shapes = {
        "token_embd.weight": (7, hidden),
        "blk.0.attn_q.weight": (heads * size, hidden),
        "blk.0.attn_k.weight": (kv_heads * size, hidden),
        "blk.0.attn_v.weight": (kv_heads * size, hidden),
        "output_norm.weight": (hidden,),
        "blk.0.ffn_gate_exps.weight": (experts, 10, hidden),
    }
    random = np.random.default_rng(0)
    stored = {}
    for name, shape in shapes.items():
        raw = encode(random.normal(size=shape).astype(np.float32), kind)
        known = str(hugging_face_name(name, "llama"))
        stored |= {known.replace("*", str(expert)): part for expert, part in enumerate(raw if "*" in known else [raw])}
        permuted = {"blk.0.attn_q.weight": heads, "blk.0.attn_k.weight": kv_heads}.get(name)
        writer.add_tensor(name, permute(raw, permuted) if permuted else raw, raw_dtype=TYPES[kind])
    finish(writer)
    return stored


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def field(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """An entry of the tensor table; `dims` in ggml's order."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(
    fields: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    *,
    data: bytes = b"",
    counts: tuple[int, int] | None = None,
    version: int = 3,
    magic: bytes = b"GGUF",
) -> bytes:
    """A whole file: header, padding to 32 bytes, data; `counts` (tensors, fields) to lie about them."""
    tensor_count, field_count = counts or (len(tensors), len(fields))
    head = magic + struct.pack("<IQQ", version, tensor_count, field_count) + b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data
