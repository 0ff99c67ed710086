"""Text to token ids and back, and chat templates. Knows one model's tokenizer, nothing of engines.

The work is done by Hugging Face's tokenizers and transformers, whose templates render in a sandboxed
Jinja environment. Nothing in a model's folder is executed, and torch is never imported.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringlm.errors import ModelError, RequestError
from ringlm.frontend.detokenizer import Detokenizer
from ringlm.frontend.model import Model
from ringlm.frontend.token_bytes import TokenBytes
from ringlm.paths import atomic_write, cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ringlm.weights.gguf_header import GGUFHeader

Message = Mapping[str, Any]  # {"role": …, "content": …}, as in the OpenAI API

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' names and GGUF's


class Tokenizer:
    """The tokenizer of one model."""

    def __init__(self, fast: PreTrainedTokenizerFast, name: str) -> None:
        self._fast = fast
        self._name = name
        self._backend = fast.backend_tokenizer
        self._token_bytes: TokenBytes | None = None

    @classmethod
    def open(cls, model: Model) -> Tokenizer | None:
        """The tokenizer in a model's files; None when they hold none, and only token ids can be used.

        Raises ModelError when there is one that cannot be read.
        """
        fast = _from_folder(model.path) if model.format == "plain" else _from_gguf(model.path)
        return None if fast is None else cls(fast, model.name)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._fast.chat_template)

    def check_chat_template(self) -> None:
        """Raises ModelError for a model that cannot chat."""
        if not self.has_chat_template:
            raise ModelError(
                f"{self._name} has no chat template, so it cannot chat; "
                "it goes on from a text: give that with --prompt, or to LLM.generate."
            )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer, says the tokenizer; the model's configuration may have more."""
        return () if self._fast.eos_token_id is None else (self._fast.eos_token_id,)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of `text`; with `special`, those that begin and end every text are added (such as BOS).

        Raises RequestError for text that is not valid Unicode, such as a lone surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text is not valid Unicode at character {error.start} ({error.reason}).") from None
        ids: list[int] = self._backend.encode(text, add_special_tokens=special).ids
        return ids

    def chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """The ids of a conversation in the model's template, ready for the assistant's answer.

        `variables` reach the template. Raises ModelError without a template, RequestError when it
        refuses the messages.
        """
        self.check_chat_template()
        from jinja2.exceptions import TemplateError

        try:
            text = self._fast.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
                **variables,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise RequestError(f"{self._name}'s chat template refuses these messages: {error}") from error
        return self.encode(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        detokenizer = self.detokenizer()
        return detokenizer.push(ids) + detokenizer.finish()

    def detokenizer(self, continues: bool = False) -> Detokenizer:
        """A stream of text; `continues` when it goes on from a prompt rather than begins a text."""
        if self._token_bytes is None:
            self._token_bytes = TokenBytes(self._backend)
        return Detokenizer(self._token_bytes, continues)


def _from_folder(folder: Path) -> PreTrainedTokenizerFast | None:
    if not (folder / "tokenizer.json").is_file():
        if (folder / "tokenizer.model").is_file():
            raise ModelError(
                f"{folder} has tokenizer.model but no tokenizer.json; save it with transformers "
                "(AutoTokenizer.from_pretrained(…).save_pretrained(…)) and try again."
            )
        return None
    with _quiet_transformers() as transformers:
        try:
            return transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the Rust library raises bare Exception
            raise ModelError(f"{folder}: the tokenizer cannot be read: {error}") from error


def _from_gguf(path: Path) -> PreTrainedTokenizerFast | None:
    from ringlm.weights.gguf_header import GGUFHeader

    header = GGUFHeader(path)
    metadata = header.metadata
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    from transformers import PreTrainedTokenizerFast

    cached = cache_dir() / "tokenizers" / _fingerprint(header) / "tokenizer.json"
    settings: dict[str, Any] = {"chat_template": metadata.get("tokenizer.chat_template")}
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


def _build(path: Path, metadata: Mapping[str, Any], settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that GGUF metadata describes; takes seconds. transformers knows the many kinds of it."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING

    names = GGUF_TOKENIZER_MAPPING["tokenizer"]
    known = {f"tokenizer.{key}": ours for key, ours in names.items()}
    description = {ours: metadata[key] for key, ours in known.items() if key in metadata}
    kind = description.get("tokenizer_type")
    # As llama.cpp: SentencePiece adds BOS unless the file says otherwise; Gemma 4's template writes it itself.
    add_bos = kind != "gemma4" and metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    try:
        backend, _ = convert_gguf_tokenizer(metadata.get("general.architecture"), description)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, add_bos_token=add_bos, add_eos_token=add_eos, **settings
        )
    except Exception as error:  # the Rust library raises bare Exception
        raise ModelError(f"{path}: no tokenizer can be made of its metadata: {error}") from error


def _fingerprint(header: GGUFHeader) -> str:
    """Of the file's header and of the libraries that turn it into a tokenizer."""
    import tokenizers
    import transformers

    data = header.data[header.path]
    end = min((tensor.offset for tensor in header.tensors.values() if tensor.path == header.path), default=len(data))
    digest = hashlib.blake2b(data[:end], digest_size=16)
    digest.update(f"{transformers.__version__} {tokenizers.__version__}".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """transformers, without its advice on stderr."""
    import transformers

    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield transformers
    finally:
        logging.set_verbosity(before)
