"""LLM: prompts and conversations in, completions out; local ranks or a ring of the environment."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

import ringlm
from ringlm import LLM, SamplingParams, StopReason
from ringlm.cluster.spec import EngineSpec
from ringlm.errors import ConfigError, ModelError, RequestError
from ringlm.frontend.tokenizer import Tokenizer
from tests.frontend.fake import EOS, FakeEngine, install, until

GREEDY = SamplingParams(temperature=0, max_tokens=16)
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(lambda prompt: [*prompt[-3:], EOS])


@pytest.fixture
def specs(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> list[EngineSpec]:
    return install(monkeypatch.setattr, engine)


@pytest.fixture
def llm(specs: list[EngineSpec], tokenizer: Tokenizer) -> Iterator[LLM]:
    with LLM("demo", tensor_parallel=2) as llm:
        yield llm


def test_texts_and_ids(llm: LLM, tokenizer: Tokenizer, engine: FakeEngine) -> None:
    text, ids = llm.generate(["Once upon a", tokenizer.encode("Once upon a")], GREEDY)
    assert text == ids
    assert (text.text, text.finish_reason) == ("Once upon a", "stop")
    assert text.finish_reason == StopReason.STOP
    assert text.token_ids == (*tokenizer.encode("Once upon a"), EOS)
    assert len(engine.submitted) == 2


def test_one_prompt_is_a_batch_of_one(llm: LLM, tokenizer: Tokenizer) -> None:
    assert llm.generate("Once", GREEDY) == llm.generate(tokenizer.encode("Once"), GREEDY)
    assert llm.generate([]) == []


def test_params_one_each(llm: LLM, engine: FakeEngine) -> None:
    short, long = llm.generate(["one two three"] * 2, [GREEDY.replace(max_tokens=1), GREEDY])
    assert (short.completion_tokens, short.finish_reason) == (1, "length")
    assert long.completion_tokens == 4
    with pytest.raises(RequestError, match="2 prompts came with 1"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(RequestError, match="mix"):
        llm.generate(["a", 5])  # type: ignore[list-item]


def test_a_bad_prompt_ends_the_others(llm: LLM, engine: FakeEngine) -> None:
    engine._answer, engine._delay_s = lambda _: itertools.repeat(5), 0.01
    with pytest.raises(RequestError, match="no token id"):
        llm.generate(["one two", [10**9]], GREEDY)
    until(lambda: not engine.running)
    assert engine.canceled == [1]


def test_a_long_list_is_handed_in_bit_by_bit(llm: LLM, engine: FakeEngine) -> None:
    most = 0
    submit = engine.submit

    def counted(prompt: list[int], params: SamplingParams) -> int:
        nonlocal most
        request = submit(prompt, params)
        most = max(most, len(engine.running))
        return request

    engine.submit = counted  # type: ignore[method-assign]
    prompts = [[10 + number] for number in range(300)]
    completions = llm.generate(prompts, GREEDY.replace(n=2))
    assert [completion.token_ids for completion in completions] == [(*prompt, EOS) for prompt in prompts]
    assert 64 < most <= 128
    assert llm.embed(prompts) == [[float(token)] for (token,) in prompts]


def test_chat_whole_and_streamed(llm: LLM) -> None:
    whole = llm.chat(USER, GREEDY)
    pieces = list(llm.chat(USER, GREEDY, stream=True))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert pieces[-1].finish_reason == whole.finish_reason == "stop"


def test_what_is_asked_of_the_engine(
    specs: list[EngineSpec], engine: FakeEngine, demo_gguf: Path, tokenizer: Tokenizer
) -> None:
    with LLM("demo", tensor_parallel=3, split=[2, 1, 1], context=512, dtype="float32") as llm:
        assert (llm.world_size, llm.context) == (2, 2048)  # the fake's
    assert engine.closed
    (spec,) = specs
    assert (spec.local_ranks, spec.ring, spec.model) == (3, None, str(demo_gguf.resolve()))
    assert (spec.settings.split, spec.settings.context, spec.settings.format) == ((2, 1, 1), 512, "gguf")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tensor_parallel": 0}, "1 or more"),
        ({"backend": "mpi"}, "choose ring"),
        ({"device": "tpu"}, "choose auto"),
        ({"dtype": "float64"}, "float32"),
        ({"quant": "int5"}, "int8 or int4"),
        ({"split": [1]}, "world size 2"),
        ({"context": 0}, "1 or more"),
        ({"tool_format": "none.toml"}, "none.toml: cannot be read"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(
    specs: list[EngineSpec], arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM("demo", **({"tensor_parallel": 2} | arguments))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no such file"):
        LLM("no-such-model")
    assert specs == []


def test_a_ring_of_the_environment(
    specs: list[EngineSpec], monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "RING_PORT": "1500", "RING_RIGHT": "1501"}.items():
        monkeypatch.setenv(name, value)
    for given in (None, 2):
        LLM("demo", tensor_parallel=given).close()
    assert [spec.world_size for spec in specs] == [2, 2]
    with pytest.raises(ConfigError, match="ring of 2"):
        LLM("demo", tensor_parallel=1)


def test_a_daemon_serves_and_leaves(specs: list[EngineSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "RING_PORT": "1501", "RING_RIGHT": "1500"}.items():
        monkeypatch.setenv(name, value)
    served: list[EngineSpec] = []
    monkeypatch.setattr("ringlm.cluster.client.run_rank", lambda spec: served.append(spec) or 0)
    with pytest.raises(SystemExit) as left:
        LLM("demo")
    assert left.value.code == 0
    assert [spec.ring.rank for spec in served if spec.ring] == [1]
    assert specs == []


def test_the_package_gives_the_same_class() -> None:
    assert ringlm.LLM is LLM
