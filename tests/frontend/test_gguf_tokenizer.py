"""Tokenizers of GGUF files give the ids of those that the files were made from, kind by kind.

The originals are trained here, and are made of the parts that the families' own tokenizer.json have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ringlm.errors import ModelError
from ringlm.frontend import tokenizer as ours
from ringlm.frontend.model import Model
from tests.weights.write_gguf import finish

CORPUS = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
TEXTS = [
    "Two ranks are 1.30x as fast as one: 145 tok/s, 44.5, 18.0.",
    "a  12\n\n1   end \t\r\n  x",
    "It's WE'LL they'Ve",
    "cafe\u0301 caf\u00e9 ½ ² ٣٤ １２ 漢字 😀",
    "<|end|>all of it<|end|> <|end|>",
    " leading, trailing ",
    *CORPUS.splitlines()[:40],
]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def by_words(digits: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(WORDS.replace("DIGITS", digits)), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def by_digits() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])


BYTE_LEVEL: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "llama-bpe": lambda: by_words("{1,3}"),
    "qwen2": lambda: by_words(""),
    "smollm": by_digits,
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
}


def byte_level(pre: str) -> Tokenizer:
    """As Llama 3, Qwen 2, SmolLM or GPT-2 have it."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer, found.decoder = BYTE_LEVEL[pre](), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator(
        [CORPUS], trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    if pre == "qwen2":
        found.normalizer = normalizers.NFC()
    if pre == "llama-bpe":
        # Some of its tokens are the result of no merge, and stand for whole words all the same.
        raw = json.loads(found.to_str())
        raw["model"] |= {"merges": raw["model"]["merges"][:-80], "ignore_merges": True}
        found = Tokenizer.from_str(json.dumps(raw))
    found.add_special_tokens(["<|end|>"])
    return found


def sentencepiece(prefix: bool) -> Tokenizer:
    """As Llama 2 has it; without `prefix` no space is put before a text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator([CORPUS], trainers.BpeTrainer(vocab_size=900, show_progress=False))
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    joined = ["".join(merge) for merge in merges]
    single = [token for token in trained.get_vocab() if len(token) == 1]
    names = ["<unk>", "<s>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256)), *joined, *single]
    vocabulary = {name: index for index, name in enumerate(names)}
    found = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix else "never", split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    found.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    found.add_special_tokens(["<unk>", "<s>", "<|end|>"])
    return found


def write(
    path: Path, original: Tokenizer, kind: str, pre: str, templates: list[dict[str, str]] | None = None, **flags: bool
) -> Path:
    """What a converter writes of a tokenizer, and no tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    names = [original.id_to_token(index) for index in range(original.get_vocab_size())]
    special = {token.content for token in original.get_added_tokens_decoder().values()}
    writer.add_token_list(names)
    types = [3 if name in special else 6 if kind == "llama" and name.startswith("<0x") else 1 for name in names]
    writer.add_token_types(types)
    if kind == "gpt2":
        writer.add_token_merges([" ".join(merge) for merge in json.loads(original.to_str())["model"]["merges"]])
    else:
        writer.add_token_scores([-float(index) for index in range(len(names))])
    writer.add_bos_token_id(original.token_to_id("<|end|>"))
    if templates is not None:
        writer.add_chat_template(templates)
    for name, flag in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)
    finish(writer)
    return path


def opened(path: Path) -> ours.Tokenizer:
    found = ours.Tokenizer.open(Model(path, "gguf"))
    assert found is not None
    return found


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_byte_level(pre: str, tmp_path: Path) -> None:
    original = byte_level(pre)
    found = opened(write(tmp_path / "a.gguf", original, "gpt2", pre, add_bos_token=False))
    for text in TEXTS:
        assert found.encode(text) == original.encode(text).ids, text
        assert found.decode(found.encode(text)) == original.decode(original.encode(text).ids)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    original = sentencepiece(prefix)
    flags = {"add_bos_token": False} | ({} if prefix else {"add_space_prefix": False})
    found = opened(write(tmp_path / "a.gguf", original, "llama", "default", **flags))
    for text in TEXTS:
        assert found.encode(text) == original.encode(text).ids, text
        assert found.decode(found.encode(text)) == original.decode(original.encode(text).ids)


@pytest.mark.parametrize(("pre", "begins"), [("llama-bpe", True), ("qwen2", False)])
def test_a_text_begins_as_llama_cpp_has_it_begin(pre: str, begins: bool, tmp_path: Path) -> None:
    original = byte_level(pre)
    bos = original.token_to_id("<|end|>")
    unsaid = opened(write(tmp_path / "a.gguf", original, "gpt2", pre))
    assert (unsaid.encode("Hi")[0] == bos) == begins
    said = opened(write(tmp_path / "b.gguf", original, "gpt2", pre, add_bos_token=not begins))
    assert (said.encode("Hi")[0] == bos) != begins


def test_smollm2_counts_digits_one_by_one(tokenizer: ours.Tokenizer) -> None:
    assert tokenizer.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer.encode("a  12") == [81, 256, 33, 34]  # not the ids that a split by GPT-2's rule alone gives


def test_a_kind_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", byte_level("gpt-2"), "gpt2", "martian")
    with pytest.raises(ModelError, match=r"a\.gguf: how its tokenizer splits text is not known here: .*'martian'"):
        opened(path)


def test_several_templates(tmp_path: Path) -> None:
    original = byte_level("gpt-2")
    tools, default = (
        {"name": "tool_use", "template": "{% if tools %}?{% endif %}{# <tool_call> #}"},
        {"name": "default", "template": "!{{ messages[0].content }}"},
    )
    found = opened(write(tmp_path / "a.gguf", original, "gpt2", "gpt-2", [tools, default]))
    assert found.chat([{"role": "user", "content": "Hi"}]) == found.encode("!Hi")
    assert found.chat(
        [{"role": "user", "content": "Hi"}], tools=[{"type": "function", "function": {"name": "f"}}]
    ) == found.encode("?")
    with pytest.raises(ModelError, match="has the chat templates tool_use and none by default"):
        opened(write(tmp_path / "b.gguf", original, "gpt2", "gpt-2", [tools])).check_chat_template()
