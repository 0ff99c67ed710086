"""The tokenizer that a GGUF file's metadata describe, in a cache since building it takes seconds. Loads no torch.

transformers builds it: vocabulary, merges, special tokens and how most kinds split text. What it leaves out is added
here, so that token ids are those of the tokenizer that the file was made from; src/llama-vocab.cpp of llama.cpp says
what `tokenizer.ggml.pre` stands for.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ringlm.errors import ModelError
from ringlm.paths import atomic_write, cache_dir

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from ringlm.weights.gguf_header import GGUFHeader

_SPECIAL: Final = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' names and GGUF's

# Kinds of splitting by `tokenizer.ggml.pre`, beside those that transformers knows.
_GPT2: Final = {None, "default", "gpt-2", "phi-2", "olmo", "jais", "mpt", "trillion", "a.x-4.0", "mellum", "gigachat"}
_SINGLE_DIGITS: Final = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# A piece of text that is a token itself is taken whole, whatever the merges; and BOS comes first if nothing is said.
_WHOLE_WORDS: Final = {
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken",
}  # fmt: skip
_NORMALIZED: Final = {"qwen2", "qwen35", "deepseek-r1-qwen"}  # to NFC


def read(path: Path) -> PreTrainedTokenizerFast | None:
    """None for a file that describes none. Raises ModelError for one that cannot be made."""
    from ringlm.weights.gguf_header import GGUFHeader

    header = GGUFHeader(path)
    metadata = header.metadata
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    from transformers import PreTrainedTokenizerFast

    cached = cache_dir() / "tokenizers" / _fingerprint(header) / "tokenizer.json"
    settings: dict[str, Any] = {"chat_template": _templates(metadata)}
    tokens = metadata["tokenizer.ggml.tokens"]
    for ours, theirs in _SPECIAL.items():
        token = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        settings[f"{ours}_token"] = tokens[token] if token is not None and token < len(tokens) else None
    if cached.is_file():
        with contextlib.suppress(Exception):  # a damaged cache is built again
            return PreTrainedTokenizerFast(tokenizer_file=str(cached), **settings)
    fast = _build(path, metadata, settings)
    with contextlib.suppress(OSError), atomic_write(cached) as file:  # without a cache it only takes longer
        file.write(fast.backend_tokenizer.to_str().encode())
    return fast


def _templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or several by their names."""
    default = metadata.get("tokenizer.chat_template")
    names = [
        name for name in metadata.get("tokenizer.chat_templates", ()) if f"tokenizer.chat_template.{name}" in metadata
    ]
    if not names:
        return default
    named = {name: metadata[f"tokenizer.chat_template.{name}"] for name in names}
    return named if default is None else named | {"default": default}


def _build(path: Path, metadata: Mapping[str, Any], settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING

    names = GGUF_TOKENIZER_MAPPING["tokenizer"]
    known = {f"tokenizer.{key}": ours for key, ours in names.items()}
    description = {ours: metadata[key] for key, ours in known.items() if key in metadata}
    kind, pre = description.get("tokenizer_type"), description.get("pre_tokenizer_type")
    # As llama.cpp, unless the file says otherwise; Gemma 4's template writes BOS itself.
    add_bos = kind != "gemma4" and metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _WHOLE_WORDS)
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    if kind == "gpt2":
        _refuse_unknown(path, pre)
    try:
        backend, _ = convert_gguf_tokenizer(metadata.get("general.architecture"), description)
        if kind == "gpt2":
            _complete_byte_level(backend, pre)
        elif kind == "llama" and not metadata.get("tokenizer.ggml.add_space_prefix", True):
            _without_space_prefix(backend)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, add_bos_token=add_bos, add_eos_token=add_eos, **settings
        )
    except Exception as error:  # the Rust library raises bare Exception
        raise ModelError(f"{path}: no tokenizer can be made of its metadata: {error}") from error


def _refuse_unknown(path: Path, pre: str | None) -> None:
    """A text that is split otherwise gives other token ids, and worse answers than one would notice."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if pre not in _GPT2 | _SINGLE_DIGITS | set(GGUF_PRE_TOKENIZER_SPLITS):
        raise ModelError(
            f"{path}: how its tokenizer splits text is not known here: tokenizer.ggml.pre is {pre!r}. "
            "Give the model as a Hugging Face folder."
        )


def _complete_byte_level(backend: Tokenizer, pre: str | None) -> None:
    from tokenizers import normalizers, pre_tokenizers

    if pre in _SINGLE_DIGITS:
        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    if pre in _NORMALIZED:
        backend.normalizer = normalizers.NFC()
    if pre in _WHOLE_WORDS:
        backend.model.ignore_merges = True


def _without_space_prefix(backend: Tokenizer) -> None:
    """SentencePiece that puts no space before a text, and takes none away; Gemma's has no such step anyway."""
    from tokenizers import decoders, pre_tokenizers

    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _fingerprint(header: GGUFHeader) -> str:
    """Of the file's header, and of the libraries and this module, which turn it into a tokenizer."""
    import tokenizers
    import transformers

    data = header.data[header.path]
    end = min((tensor.offset for tensor in header.tensors.values() if tensor.path == header.path), default=len(data))
    digest = hashlib.blake2b(data[:end], digest_size=16)
    digest.update(f"{transformers.__version__} {tokenizers.__version__}".encode())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()
