"""Streaming text: pieces joined are the whole text, no piece has half a character, and it agrees with
the tokenizers library. On SmolLM2's tokenizer and on small ones of each kind."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models
from tokenizers import Tokenizer as Backend

from ringlm.errors import ModelError
from ringlm.frontend.detokenizer import Detokenizer
from ringlm.frontend.token_bytes import TokenBytes, byte_alphabet
from ringlm.frontend.tokenizer import Tokenizer

SMOLLM2_VOCABULARY = 49152
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
WORDS = ["▁Hello", "▁", "wor", "ld", "▁▁▁", "é", "😀", "</s>", "<think>"]


def sentencepiece(decoder: decoders.Decoder) -> Backend:
    names = {name: index for index, name in enumerate([*BYTES, *WORDS])}
    backend = Backend(models.BPE(names, [], byte_fallback=True))
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<think>", special=False)])
    backend.decoder = decoder
    return backend


LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
GEMMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
KINDS = {"llama": LLAMA, "gemma": GEMMA, "metaspace": decoders.Metaspace()}


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push([token]) for token in ids), detokenizer.finish()]


def with_emoji() -> st.SearchStrategy[str]:
    return st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("é漢字😀👩‍🚀🇫🇷नि\u200d\ufe0f")))


@given(ids=st.lists(st.integers(0, SMOLLM2_VOCABULARY - 1), max_size=40))
def test_random_tokens_of_smollm2(tokenizer: Tokenizer, ids: list[int]) -> None:
    pieces = stream(tokenizer.detokenizer(), ids)
    assert "".join(pieces) == tokenizer._backend.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


@given(data=st.binary(max_size=40))
def test_random_bytes_of_smollm2(tokenizer: Tokenizer, data: bytes) -> None:
    spelled = {byte: character for character, byte in byte_alphabet().items()}
    ids = [tokenizer._backend.token_to_id(spelled[byte]) for byte in data]
    # A vocabulary may lack bytes that UTF-8 never has.
    ids = [token for token in ids if token is not None]
    pieces = stream(tokenizer.detokenizer(), ids)
    assert "".join(pieces) == tokenizer._backend.decode(ids, skip_special_tokens=True)


@given(text=with_emoji())
def test_text_comes_back_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assume(tokenizer._backend.decode(ids) == text)  # this vocabulary lacks a few bytes, such as 0xF1
    pieces = stream(tokenizer.detokenizer(), ids)
    assert "".join(pieces) == text
    # Each piece is text of its own: it encodes, and only characters that were meant are in it.
    assert all(set(piece) <= set(text) for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@given(words=st.lists(st.sampled_from([*WORDS, "<0x0A>", "<0x41>"]), max_size=12))
def test_sentencepiece_agrees_with_the_library(kind: str, words: list[str]) -> None:
    backend = sentencepiece(KINDS[kind])
    if kind == "metaspace":  # it knows no bytes, and drops every space of the first token where we drop one
        words = [word for word in words if word not in BYTES and word != "▁▁▁"]
    ids = [backend.token_to_id(word) for word in words]
    pieces = stream(Detokenizer(TokenBytes(backend)), ids)
    assert "".join(pieces) == backend.decode(ids, skip_special_tokens=True)


@given(text=with_emoji())
def test_byte_fallback_waits_for_the_last_byte(text: str) -> None:
    backend = sentencepiece(GEMMA)
    ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    pieces = stream(Detokenizer(TokenBytes(backend)), ids)
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)


def test_bytes_that_never_become_a_character() -> None:
    backend = sentencepiece(GEMMA)
    ids = [backend.token_to_id(name) for name in ("<0xF0>", "<0x9F>", "wor", "<0xE2>")]
    assert stream(Detokenizer(TokenBytes(backend)), ids) == ["", "", "\ufffdwor", "", "\ufffd"]


def test_a_continuation_keeps_its_first_space() -> None:
    token_bytes = TokenBytes(sentencepiece(LLAMA))
    hello = token_bytes._tokenizer.token_to_id("▁Hello")
    assert Detokenizer(token_bytes).push([hello, hello]) == "Hello Hello"
    assert Detokenizer(token_bytes, continues=True).push([hello, hello]) == " Hello Hello"


def test_unknown_ids_are_silent(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([10**6, *tokenizer.encode("Hi")]) == "Hi"


def test_a_decoder_of_another_kind_is_refused() -> None:
    backend = Backend(models.WordPiece({"a": 0, "##b": 1}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="WordPiece"):
        TokenBytes(backend)


def test_a_pattern_that_is_not_a_string_is_refused() -> None:
    backend = sentencepiece(decoders.Sequence([decoders.Replace(Regex("a+"), "b"), decoders.Fuse()]))
    assert "Regex" in json.dumps(json.loads(backend.to_str())["decoder"])
    with pytest.raises(ModelError, match="decoder"):
        TokenBytes(backend)
