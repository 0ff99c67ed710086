"""AsyncLLM: what LLM does, on an event loop that is never held up."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from ringlm import LLM, AsyncLLM, SamplingParams
from ringlm.cluster.client import EngineClient
from ringlm.cluster.spec import EngineSpec
from ringlm.errors import ConfigError, ModelError, RequestError
from ringlm.frontend.answer import Completion
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


def test_it_answers_as_llm_does(specs: list[EngineSpec], engine: FakeEngine, tokenizer: Tokenizer) -> None:
    async def ask() -> tuple[list[Completion], Completion, str, list[list[float]]]:
        async with AsyncLLM("demo", tensor_parallel=2) as llm:
            assert (llm.world_size, llm.context, llm.stats()) == (2, 2048, None)
            several, whole = await asyncio.gather(llm.generate(["Once", [5, 6]], GREEDY), llm.chat(USER, GREEDY))
            streamed = "".join([piece.text async for piece in llm.chat(USER, GREEDY, stream=True)])
            return several, whole, streamed, await llm.embed([[3, 4], [5]])

    several, whole, streamed, vectors = asyncio.run(ask())
    assert engine.closed
    with LLM("demo", tensor_parallel=2) as llm:
        assert llm.generate(["Once", [5, 6]], GREEDY) == several
        assert llm.chat(USER, GREEDY) == whole
        assert llm.embed([[3, 4], [5]]) == vectors == [[3.0, 4.0], [5.0]]
    assert streamed == whole.text
    assert specs[0] == specs[1]


def test_the_loop_goes_on_while_it_starts(
    specs: list[EngineSpec], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object) -> FakeEngine:
        time.sleep(0.2)
        return engine

    monkeypatch.setattr(EngineClient, "start", start)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.005)

    async def ask() -> None:
        ticking = asyncio.create_task(tick())
        llm = await AsyncLLM("demo").start()
        assert ticks > 5
        await llm.close()
        ticking.cancel()

    asyncio.run(ask())


def test_what_is_cancelled_or_left_ends(specs: list[EngineSpec], engine: FakeEngine) -> None:
    engine._answer, engine._delay_s = lambda _: itertools.repeat(500), 0.002

    async def ask() -> None:
        async with AsyncLLM("demo") as llm:
            for waiting in (llm.generate([[1]] * 3, GREEDY.replace(max_tokens=500)), llm.chat(USER)):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(waiting, 0.05)
            async for _ in llm.chat(USER, stream=True):
                break
            await asyncio.to_thread(until, lambda: not engine.running)

    asyncio.run(ask())
    assert set(engine.canceled) == {1, 2, 3, 4, 5}


def test_mistakes(specs: list[EngineSpec]) -> None:
    async def ask() -> None:
        unstarted = AsyncLLM("demo")
        with pytest.raises(ConfigError, match="not started"):
            await unstarted.generate("Once")
        await unstarted.close()
        with pytest.raises(ModelError, match="no such file"):
            await AsyncLLM("no-such-model").start()
        async with AsyncLLM("demo") as llm:
            with pytest.raises(RequestError, match="mix"):
                await llm.generate(["a", 5])  # type: ignore[list-item]
            with pytest.raises(RequestError, match="tool_choice"):
                await llm.chat(USER, tools=[{}], tool_choice="perhaps")

    asyncio.run(ask())
