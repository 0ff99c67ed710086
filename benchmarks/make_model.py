"""A Llama, Qwen3-MoE or Gemma 3 with random weights in a real model's shape, for benchmarks: it computes what the real
one does, and says nothing. Written tensor by tensor, in the time that the disk takes.

    python benchmarks/make_model.py llama-3.2-1b 1b                    # a folder: config.json and safetensors, bfloat16
    python benchmarks/make_model.py llama-3.2-1b 1b.gguf --type Q4_0   # a GGUF file: Q4_0, Q4_1, Q8_0 or F16
    python benchmarks/make_model.py llama-3.2-1b 1b.m                  # distributed-llama's: 1b.m in Q4_0, and 1b.t
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    """The sizes of a Llama, with experts of a Qwen3-MoE, with a window of a Gemma 3. All tie the output head to the
    embedding."""

    hidden: int
    columns: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    theta: float
    llama3: bool = False  # whether the rotary frequencies are scaled as Llama 3's are
    experts: int = 0  # in every layer, each of `columns`
    chosen: int = 0  # of them, for each token
    window: int = 0  # positions that a token sees in five of six layers

    @property
    def architecture(self) -> tuple[str, str, str]:
        """Its names in GGUF, and in config.json for `model_type` and `architectures`."""
        if self.window:
            return "gemma3", "gemma3_text", "Gemma3ForCausalLM"
        if self.experts:
            return "qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM"
        return "llama", "llama", "LlamaForCausalLM"


SHAPES = {
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 64, 49152, 100000.0),
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, 500000.0, True),
    "llama-3.2-3b": Shape(3072, 8192, 28, 24, 8, 128, 128256, 500000.0, True),
    "qwen3-30b-a3b-5": Shape(2048, 768, 5, 32, 4, 128, 32768, 1e6, False, 128, 8),  # 5 of 48 layers, few tokens
    "gemma-3-1b": Shape(1152, 6912, 26, 4, 1, 256, 262144, 1e6, window=512),
}
CONTEXT = 8192
TYPES = {"Q4_0": (32, 2), "Q4_1": (32, 4), "Q8_0": (32, 2), "F16": (1, 0)}  # elements of a block, bytes before codes


class Matrix(NamedTuple):
    """Its name in safetensors, where `*` stands for an expert's number, and in GGUF; its rows, columns and experts."""

    name: str
    theirs: str
    rows: int
    columns: int
    experts: int = 0

    @property
    def names(self) -> list[str]:
        """In safetensors, where every expert has its own."""
        return [f"{self.name.replace('*', str(expert))}.weight" for expert in range(self.experts or 1)]


def matrices(shape: Shape) -> Iterator[Matrix]:
    """Every matrix."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden, columns, experts = shape.hidden, shape.columns, shape.experts
    inner, many = (".experts.*", "_exps") if experts else ("", "")
    yield Matrix("model.embed_tokens", "token_embd", shape.vocabulary, hidden)
    for layer in range(shape.layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        yield Matrix(f"{ours}self_attn.q_proj", f"{theirs}attn_q", queries, hidden)
        yield Matrix(f"{ours}self_attn.k_proj", f"{theirs}attn_k", keys, hidden)
        yield Matrix(f"{ours}self_attn.v_proj", f"{theirs}attn_v", keys, hidden)
        yield Matrix(f"{ours}self_attn.o_proj", f"{theirs}attn_output", hidden, queries)
        if experts:
            yield Matrix(f"{ours}mlp.gate", f"{theirs}ffn_gate_inp", experts, hidden)
        yield Matrix(f"{ours}mlp{inner}.gate_proj", f"{theirs}ffn_gate{many}", columns, hidden, experts)
        yield Matrix(f"{ours}mlp{inner}.up_proj", f"{theirs}ffn_up{many}", columns, hidden, experts)
        yield Matrix(f"{ours}mlp{inner}.down_proj", f"{theirs}ffn_down{many}", hidden, columns, experts)


def norms(shape: Shape) -> Iterator[tuple[str, str, int]]:
    """Every norm: its name in safetensors and in GGUF, and its size."""
    for layer in range(shape.layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        yield f"{ours}input_layernorm", f"{theirs}attn_norm", shape.hidden
        if shape.window:
            yield f"{ours}post_attention_layernorm", f"{theirs}post_attention_norm", shape.hidden
            yield f"{ours}pre_feedforward_layernorm", f"{theirs}ffn_norm", shape.hidden
            yield f"{ours}post_feedforward_layernorm", f"{theirs}post_ffw_norm", shape.hidden
        else:
            yield f"{ours}post_attention_layernorm", f"{theirs}ffn_norm", shape.hidden
        if shape.experts or shape.window:
            yield f"{ours}self_attn.q_norm", f"{theirs}attn_q_norm", shape.head_dim
            yield f"{ours}self_attn.k_norm", f"{theirs}attn_k_norm", shape.head_dim
    yield "model.norm", "output_norm", shape.hidden


def config(shape: Shape) -> dict[str, object]:
    """config.json."""
    _, model_type, architecture = shape.architecture
    values: dict[str, object] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.columns,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.theta,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if shape.experts:
        values |= {
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.chosen,
            "moe_intermediate_size": shape.columns,
            "norm_topk_prob": True,
        }
    if shape.window:
        values |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": shape.window,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": shape.head_dim,
        }
    if shape.llama3:
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": CONTEXT,
        }
    return values


def write_folder(shape: Shape, folder: Path) -> None:
    """config.json and model.safetensors in bfloat16, a matrix in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1))
    sizes = {name: [matrix.rows, matrix.columns] for matrix in matrices(shape) for name in matrix.names}
    sizes |= {f"{name}.weight": [size] for name, _, size in norms(shape)}
    header, end = {}, 0
    for name, size in sizes.items():
        nbytes = int(np.prod(size)) * 2
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    one = 0 if shape.window else 0x3F80  # 1.0; Gemma adds 1 to it
    random = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in sizes.values():
            if len(size) == 1:
                file.write(np.full(size, one, np.uint16).tobytes())
                continue
            values = random.standard_normal(size, np.float32) * (size[1] ** -0.5)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def blocks(random: np.random.Generator, kind: str, rows: int, columns: int) -> np.ndarray:
    """Rows of random blocks, as they lie in a file, whose weights have a variance of about 1 / columns."""
    if kind == "F16":
        return (random.standard_normal((rows, columns), np.float32) * columns**-0.5).astype(np.float16)
    elements, before = TYPES[kind]
    count = columns // elements
    code_bytes = 32 if kind == "Q8_0" else 16
    data = random.integers(0, 256, (rows, count, before + code_bytes), np.uint8)
    deviation = 74.0 if kind == "Q8_0" else 4.6  # of uniform codes
    scale = np.float16(columns**-0.5 / deviation)
    data[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
    if kind == "Q4_1":
        data[..., 2:4] = np.frombuffer(np.float16(-7.5 * float(scale)).tobytes(), np.uint8)
    return data.reshape(rows, -1)


def write_gguf(shape: Shape, path: Path, kind: str, name: str) -> None:
    """A GGUF file without a vocabulary, which llama.cpp reads as well."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, shape.architecture[0], use_temp_file=True)
    writer.add_name(name)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.columns)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.chosen)
        writer.add_expert_feed_forward_length(shape.columns)
    if shape.window:
        writer.add_sliding_window(shape.window)
    random = np.random.default_rng(0)
    if shape.llama3:
        from ringlm.models.kinds import Rope
        from ringlm.models.rope import frequencies

        plain, scaled = Rope(shape.theta), Rope(shape.theta, kind="llama3", factor=32.0)
        factors = frequencies(plain, shape.head_dim, CONTEXT) / frequencies(scaled, shape.head_dim, CONTEXT)
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    for matrix in matrices(shape):
        own = "F16" if matrix.theirs.endswith("ffn_gate_inp") else kind  # a router is never packed
        data = blocks(random, own, matrix.rows * (matrix.experts or 1), matrix.columns)
        data = data.reshape(matrix.experts, matrix.rows, -1) if matrix.experts else data
        writer.add_tensor(f"{matrix.theirs}.weight", data, raw_dtype=getattr(GGMLQuantizationType, own))
    for _, theirs, size in norms(shape):
        writer.add_tensor(f"{theirs}.weight", np.ones(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_dllama(shape: Shape, path: Path) -> None:
    """distributed-llama's model file with matrices in Q4_0, as its converter writes it, and beside it a tokenizer of
    one-letter words, so that a prompt has as many tokens as letters."""
    header = {0: 0, 1: 0xABCD00, 2: shape.hidden, 3: shape.columns, 4: shape.layers, 5: shape.heads, 6: shape.kv_heads}
    header |= {7: 0, 8: 0, 9: shape.vocabulary, 10: CONTEXT, 11: 1, 12: int(shape.theta), 13: 2, 18: 0}
    header |= {19: shape.head_dim, 20: 5}
    if shape.llama3:
        header |= {14: 32, 15: 1, 16: 4, 17: CONTEXT, 18: 2}
    words = np.array([word for pair in header.items() for word in pair], np.int32)
    random = np.random.default_rng(0)
    of = {matrix.name.rpartition(".")[2]: (matrix.rows, matrix.columns) for matrix in matrices(shape)}
    norm = np.ones(shape.hidden, np.float32)
    with path.open("wb") as file:
        file.write(np.array([0xA00ABCD, 8 + words.nbytes], np.int32).tobytes() + words.tobytes())
        file.write((random.standard_normal(of["embed_tokens"], np.float32) * shape.hidden**-0.5).data)
        for _ in range(shape.layers):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"):
                file.write(blocks(random, "Q4_0", *of[name]).data)
            file.write(norm.tobytes() * 2)
        file.write(norm.tobytes())
        file.write(blocks(random, "Q4_0", *of["embed_tokens"]).data)
    pieces = [b"a", *(b"%07x" % number for number in range(1, shape.vocabulary - 1)), b"<s>"]
    settings = np.array([3, len(pieces) - 1, 0, 1, 1, len(pieces), 2, 7, 9, 0, 10, 1], np.int32)  # BOS comes last
    with path.with_suffix(".t").open("wb") as file:
        file.write(np.array([0x567124, 8 + settings.nbytes], np.int32).tobytes() + settings.tobytes())
        for piece in pieces:
            file.write(np.float32(0).tobytes() + np.int32(len(piece)).tobytes() + piece)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path, help="a folder, or a file that ends in .gguf or .m")
    parser.add_argument("--type", choices=TYPES, default="Q4_0", help="of a GGUF file's matrices")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.path.suffix == ".gguf":
        write_gguf(shape, options.path, options.type, options.shape)
    elif options.path.suffix == ".m":
        write_dllama(shape, options.path)
    else:
        write_folder(shape, options.path)


if __name__ == "__main__":
    main()
