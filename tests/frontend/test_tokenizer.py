"""Tokenizers from GGUF files and folders: the ids transformers gives, templates, the cache, clear errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ringlm.errors import ConfigError, ModelError, RequestError
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
        patch.setattr("ringlm.frontend.gguf_tokenizer._build", None)
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


def test_a_folder_without_tokenizer_works_with_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Tokenizer.open(Model(tmp_path, "plain")) is None
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"no tokenizer\.json.*pip install sentencepiece protobuf"):
        Tokenizer.open(Model(tmp_path, "plain"))


def test_a_sentencepiece_tokenizer_is_converted(tmp_path: Path) -> None:
    """Where the two packages are installed; they are no part of the tests' own set-up."""
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    options = {"vocab_size": 900, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    corpus = Path(__file__).parents[2] / "docs" / "performance.md"
    spm.SentencePieceTrainer.train(input=corpus, model_prefix=tmp_path / "tokenizer", **options, **identity)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"tokenizer_class": "LlamaTokenizer"}')
    found, theirs = opened(tmp_path), spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("Two ranks are 1.30x", "x  y\n\nz 漢字", "Hi"):
        assert found.encode(text, special=False) == theirs.encode(text)
        assert found.decode(theirs.encode(text)) == text
    settings.write_text('{"tokenizer_class": "AutoModel"}')
    with pytest.raises(ModelError, match="names no tokenizer_class of transformers"):
        opened(tmp_path)


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        Tokenizer.open(Model(tmp_path, "plain"))


@pytest.mark.parametrize(
    ("template", "error", "words"),
    [
        ("", ModelError, r"no chat template.*--chat-template FILE"),
        ("{{ raise_exception('roles must alternate') }}", RequestError, r"line 1, refuses .*roles must alternate"),
        ("{{ messages[0].content.__class__.__mro__ }}", RequestError, "unsafe"),
        ("a\n{{ messages[0] +\n 1 }}", RequestError, r"its chat template, line \d, refuses these messages: .*int"),
        ("a\n\n{{ messages[0]", ModelError, r"copy: its chat template, line 3: unexpected end"),
    ],
)
def test_templates_that_refuse(folder: Path, tmp_path: Path, template: str, error: type[Exception], words: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(error, match=words):
        opened(copy).chat([{"role": "user", "content": "Hi"}])


def test_a_template_that_takes_roles_in_turn(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "chat_template.jinja").write_text(
        "{% for each in messages %}{% if not loop.first and each.role in ('system', loop.previtem.role) %}"
        "{{ raise_exception('in turn') }}{% endif %}<{{ each.role }}>{{ each.content }}{% endfor %}"
    )
    found = opened(copy)
    said = ["system A", "system B", "user 1", "system 2", "assistant 3", "user 4", "user 5"]
    tokens = found.chat([dict(zip(("role", "content"), each.split(), strict=True)) for each in said])
    assert found.decode(tokens) == "<system>A\n\nB<user>1\n\n2<assistant>3<user>4\n\n5"
    with pytest.raises(RequestError, match="in turn"):
        found.chat([{"role": "assistant", "content": "Hi"}] * 2)


def test_a_template_in_a_file_of_the_users(folder: Path, tmp_path: Path, demo: Model) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}")
    for model in (Model(folder, "plain"), demo):
        found = Tokenizer.open(model, file)
        assert found is not None
        assert found.chat([{"role": "user", "content": "Hi"}]) == found.encode("<user>Hi")
    file.write_text("\n{% for %}")
    broken = Tokenizer.open(demo, file)
    assert broken is not None
    with pytest.raises(ModelError, match=r"mine\.jinja, line 2: "):
        broken.chat([{"role": "user", "content": "Hi"}])
    with pytest.raises(ConfigError, match=r"--chat-template .*missing: cannot be read"):
        Tokenizer.open(demo, tmp_path / "missing")


@pytest.mark.parametrize("where", ["config", "named", "jinja", "json"])
def test_where_a_folder_may_have_its_template(folder: Path, tmp_path: Path, where: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    text = "!{{ messages[0].content }}"
    settings = copy / "tokenizer_config.json"
    config = json.loads(settings.read_text())
    if where == "config":
        settings.write_text(json.dumps(config | {"chat_template": text}))
    elif where == "named":
        named = [{"name": "tool_use", "template": "?"}, {"name": "default", "template": text}]
        settings.write_text(json.dumps(config | {"chat_template": named}))
    elif where == "jinja":
        (copy / "chat_template.jinja").write_text(text)
    else:
        (copy / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    found = opened(copy)
    assert found.chat([{"role": "user", "content": "Hi"}]) == found.encode("!Hi")
    if where == "named":
        named.pop()
        settings.write_text(json.dumps(config | {"chat_template": named}))
        with pytest.raises(ModelError, match="has the chat templates tool_use and none by default"):
            opened(copy).check_chat_template()


def test_text_that_is_not_unicode(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="character 2"):
        tokenizer.encode("Hi\udcff")
