"""Tokenizers from GGUF files and folders: the ids transformers gives, templates, the cache, clear errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ringlm.errors import ModelError, RequestError
from ringlm.frontend.model import Model
from ringlm.frontend.tokenizer import Tokenizer

TEXTS = ["", "Once upon a time", "  two spaces\n\ttab", "1234567", "漢字 and 😀", "<|im_start|>user", "it's 'S"]


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "smol"
    tokenizer._fast.save_pretrained(path)
    (path / "config.json").write_text("{}")
    return path


def opened(path: Path) -> Tokenizer:
    found = Tokenizer.open(Model(path, "plain"))
    assert found is not None
    return found


def test_gguf_gives_the_ids_of_transformers(tokenizer: Tokenizer, demo: Model) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(demo.path.parent, gguf_file=demo.path.name)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs(text)["input_ids"]
    messages = [{"role": "user", "content": "Hi 😀"}]
    theirs_ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.chat(messages) == theirs_ids
    assert tokenizer.eos_token_ids == (theirs.eos_token_id,)


def test_the_cache_spares_the_building(
    tokenizer: Tokenizer, demo: Model, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cached,) = (home / "cache" / "ringlm" / "tokenizers").glob("*/tokenizer.json")
    with monkeypatch.context() as patch:
        patch.setattr("ringlm.frontend.tokenizer._build", None)
        again = Tokenizer.open(demo)
    assert again is not None
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    cached.write_text("{damaged")
    mended = Tokenizer.open(demo)
    assert mended is not None
    assert mended.encode("Hi") == tokenizer.encode("Hi")
    assert json.loads(cached.read_text())


def test_a_folder(folder: Path, tokenizer: Tokenizer) -> None:
    found = opened(folder)
    assert [found.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert found.chat([{"role": "user", "content": "Hi"}]) == tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert found.decode(found.encode("naïve 😀")) == "naïve 😀"


def test_a_folder_without_tokenizer_works_with_ids(tmp_path: Path) -> None:
    assert Tokenizer.open(Model(tmp_path, "plain")) is None
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer.open(Model(tmp_path, "plain"))


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        Tokenizer.open(Model(tmp_path, "plain"))


@pytest.mark.parametrize(
    ("template", "error", "words"),
    [
        ("", ModelError, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", RequestError, "roles must alternate"),
        ("{{ messages[0].content.__class__.__mro__ }}", RequestError, "unsafe"),
        ("{{ messages[0]", RequestError, "template"),
    ],
)
def test_templates_that_refuse(folder: Path, tmp_path: Path, template: str, error: type[Exception], words: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(error, match=words):
        opened(copy).chat([{"role": "user", "content": "Hi"}])


def test_text_that_is_not_unicode(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="character 2"):
        tokenizer.encode("Hi\udcff")
