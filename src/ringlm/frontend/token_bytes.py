"""The bytes each token stands for. Knows decoders of the `tokenizers` library, nothing of requests.

Text joined from bytes is right wherever the tokens are cut, which decoding a few tokens at a time is
not: a character may span several tokens. Two ways of spelling bytes are in use (Hugging Face's
`tokenizers`, decoders ByteLevel and ByteFallback):

- ByteLevel (GPT-2, Llama 3, Qwen): each character of a token's name is one byte, of an alphabet.
- SentencePiece (Llama 2, Gemma, Mistral): the name is text with U+2581 for a space; `<0xE2>` is a byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

from tokenizers import Tokenizer

from ringlm.errors import ModelError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_KNOWN = {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}


def byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: printable Latin-1 stands for itself, the rest follow from U+0100."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(itself)]
    return {chr(byte): byte for byte in itself} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """token_bytes[id] is what token `id` adds to the text; nothing for unknown ids, and for special ones unless one of
    the words `keep` has them in it.

    `strips_space`: the decoder drops one space at the start of a text. Raises ModelError for a
    tokenizer whose decoder is not one of a language model's.
    """

    def __init__(self, tokenizer: Tokenizer, keep: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        special = {i: token.content for i, token in added.items() if token.special}
        self._silent = frozenset(i for i, name in special.items() if not any(name in word for word in keep))
        self._cache: dict[int, bytes] = {}
        steps = list(_steps(tokenizer))
        kinds = {step["type"] for step in steps}
        patterns = [step["pattern"] for step in steps if step["type"] == "Replace"]
        if not kinds or kinds - _KNOWN or any("String" not in pattern for pattern in patterns):
            raise ModelError(
                f"the tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) is not supported; "
                f"known are {', '.join(sorted(_KNOWN))}. Token ids still work."
            )
        self._alphabet = byte_alphabet() if "ByteLevel" in kinds else None
        self._fallback = "ByteFallback" in kinds
        self._replaced = [(s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"]
        self._replaced += [(s["replacement"], " ") for s in steps if s["type"] == "Metaspace"]
        self.strips_space = any(
            (s["type"] == "Strip" and s["content"] == " " and s["start"] > 0)
            or (s["type"] == "Metaspace" and s.get("prepend_scheme", "always") != "never")
            for s in steps
        )

    def __getitem__(self, token: int) -> bytes:
        found = self._cache.get(token)
        if found is None:
            found = self._cache[token] = self._bytes(token)
        return found

    def _bytes(self, token: int) -> bytes:
        name = self._tokenizer.id_to_token(token)
        if name is None or token in self._silent:
            return b""
        if self._alphabet is not None:
            # An added token may be spelled in plain text; then its own bytes are meant.
            known = [self._alphabet.get(character) for character in name]
            return name.encode() if None in known else bytes(byte for byte in known if byte is not None)
        if self._fallback and (byte := _BYTE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        for pattern, content in self._replaced:
            name = name.replace(pattern, content)
        return name.encode()


def _steps(tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """The decoder's parts in order, as in tokenizer.json."""

    def flat(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if step["type"] != "Sequence":
            yield step
            return
        for inner in step["decoders"]:
            yield from flat(inner)

    decoder: Any = tokenizer.decoder
    if decoder is not None:
        yield from flat(json.loads(decoder.__getstate__()))
