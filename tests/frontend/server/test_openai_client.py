"""OpenAI's own client, and Anthropic's, against a server of two ranks: every endpoint, whole and streamed."""

from __future__ import annotations

import asyncio
import subprocess
import urllib.request
from collections.abc import Iterator

import anthropic
import openai
import pytest

from tests.frontend.server.ring import serving

MODEL = "SmolLM2"
ASK = [{"role": "user", "content": "What is the capital of France?"}]
KEY = "a-secret"
GREEDY = {"model": MODEL, "temperature": 0.0, "max_tokens": 12}


@pytest.fixture(scope="module")
def launched() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A ring that serves, and its base URL."""
    with serving("--context", "2048", "--served-model-name", MODEL, RINGLM_API_KEY=KEY) as launched:
        yield launched


@pytest.fixture(scope="module")
def url(launched: tuple[subprocess.Popen[str], str]) -> str:
    return launched[1]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=90) as made:
        yield made


def test_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=ASK, **GREEDY)
    assert "Paris" in (whole.choices[0].message.content or "")
    stream = client.chat.completions.create(messages=ASK, stream=True, stream_options={"include_usage": True}, **GREEDY)
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_chat_by_the_clients_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(messages=ASK, **GREEDY) as stream:  # type: ignore[call-overload]
        kinds = [event.type for event in stream]
        assert "Paris" in (stream.get_final_completion().choices[0].message.content or "")
    assert "content.delta" in kinds


def test_responses(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "input": "What is the capital of France?", "temperature": 0.0, "max_output_tokens": 12}
    whole = client.responses.create(**asked)  # type: ignore[call-overload]
    assert "Paris" in whole.output_text
    *_, last = client.responses.create(**asked, stream=True)  # type: ignore[call-overload]
    assert last.response.output_text == whole.output_text
    assert last.response.usage.input_tokens_details.cached_tokens >= 0
    later = client.responses.create(
        model=MODEL, input="And of Italy?", previous_response_id=whole.id, temperature=0.0, max_output_tokens=12
    )
    assert "Rome" in later.output_text


def test_messages(url: str, client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": ASK, "max_tokens": 12, "extra_body": {"temperature": 0.0}}
    with anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key=KEY, max_retries=0, timeout=90) as other:
        whole = other.messages.create(**asked)  # type: ignore[call-overload]
        with other.messages.stream(**asked) as stream:  # type: ignore[arg-type]
            assert stream.get_final_text() == whole.content[0].text
        count = other.messages.count_tokens(model=MODEL, messages=ASK)  # type: ignore[arg-type]
    usage = whole.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == count.input_tokens
    assert whole.content[0].text == client.chat.completions.create(messages=ASK, **GREEDY).choices[0].message.content


def test_several_answers_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, n=2, seed=5, max_tokens=6, logprobs=True, top_logprobs=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 6
        for token in choice.logprobs.content:
            assert token.logprob <= 0
            assert len(token.top_logprobs) == 3
    again = client.chat.completions.create(model=MODEL, messages=ASK, n=2, seed=5, max_tokens=6)
    assert [choice.message.content for choice in again.choices] == [choice.message.content for choice in answer.choices]


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt=["The capital of France is", "1, 2, 3,"], logprobs=2, **GREEDY)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert "Paris" in whole.choices[0].text
    assert whole.choices[1].text.startswith(" 4")
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or ()) == whole.choices[0].text
    texts = ["", ""]
    for chunk in client.completions.create(prompt=["The capital of France is", "1, 2, 3,"], stream=True, **GREEDY):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_embeddings(client: openai.OpenAI) -> None:
    vectors = client.embeddings.create(model=MODEL, input=["A cat sleeps.", "A cat is asleep.", "Bonds fell."]).data
    plain = client.embeddings.create(model=MODEL, input="A cat sleeps.", encoding_format="float").data
    assert plain[0].embedding == pytest.approx(vectors[0].embedding, abs=1e-4)
    cat, same, other = (each.embedding for each in vectors)
    assert sum(x * x for x in cat) == pytest.approx(1, abs=1e-4)

    def likeness(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert likeness(cat, same) > likeness(cat, other)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "ringlm"


def test_errors(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="gpt", messages=ASK)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, messages=ASK, temperature=1000)
    assert error.value.param == "temperature"
    stranger = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_many_at_once_and_one_who_leaves(url: str, client: openai.OpenAI) -> None:
    alone = client.completions.create(prompt="1, 2, 3,", **GREEDY).choices[0].text

    async def scenario() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=90) as many:
            long = await many.completions.create(model=MODEL, prompt="1, 2, 3,", max_tokens=2000, stream=True)
            async for _ in long:
                break
            await long.close()
            answers = await asyncio.gather(*(many.completions.create(prompt="1, 2, 3,", **GREEDY) for _ in range(6)))
            return [answer.choices[0].text for answer in answers]

    assert asyncio.run(scenario()) == [alone] * 6
    request = urllib.request.Request(url.replace("/v1", "/metrics"), headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as response:
        assert 'ringlm_requests_total{finish_reason="canceled"} 1.0' in response.read().decode()


def test_the_end_waits_for_the_last_answer(launched: tuple[subprocess.Popen[str], str], client: openai.OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt="1, 2, 3,", max_tokens=100, temperature=0.0, stream=True)
    chunks = [next(stream)]
    launched[0].terminate()
    chunks += stream
    assert chunks[-1].choices[0].finish_reason == "length"
    assert sum(chunk.choices[0].text.count(",") for chunk in chunks) > 20
    assert launched[0].wait(90) == 0
