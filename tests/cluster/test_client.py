"""The client of local ranks: several requests at once, refusals, long silences, and an end that leaves nothing."""

from __future__ import annotations

import os
import signal
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringlm.cluster.client import EngineClient
from ringlm.cluster.messages import Embedding, Output
from ringlm.cluster.settings import Settings
from ringlm.cluster.spec import EngineSpec
from ringlm.engine.request import SamplingParams, StopReason
from ringlm.errors import ModelError, RingError
from tests.tiny import save_llama

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def client(tiny_llama: Path) -> Iterator[EngineClient]:
    spec = EngineSpec(model=str(tiny_llama), settings=Settings(dtype="float32", max_seqs=4), local_ranks=2, threads=1)
    with EngineClient.start(spec) as client:
        yield client


def until_end(client: EngineClient, *requests: int) -> dict[int, tuple[list[int], Output]]:
    """The tokens and the last news of each request."""
    tokens: dict[int, list[int]] = {request: [] for request in requests}
    last: dict[int, Output] = {}
    while len(last) < len(requests):
        event = client.next_event(90.0)
        assert event is not None
        if event.id in tokens:
            tokens[event.id] += event.tokens
            if event.finish_reason is not None or event.error is not None:
                last[event.id] = event
    return {request: (tokens[request], last[request]) for request in requests}


def test_ready_says_what_was_loaded(client: EngineClient) -> None:
    ready = client.ready
    assert (ready.model, ready.world_size, ready.context, ready.vocabulary) == ("llama", 2, 4096, 131)
    assert [rank.device for rank in ready.ranks] == ["cpu", "cpu"]
    assert all(0 < rank.weights_bytes < rank.peak_bytes for rank in ready.ranks)


def test_requests_at_once_equal_requests_alone(client: EngineClient) -> None:
    prompts = [[1, 5, 9], list(range(3, 90)), [7], [4, 4, 4, 4], [120] * 30, [2, 3]]
    alone = [until_end(client, request)[request][0] for request in (client.submit(p, GREEDY) for p in prompts)]
    requests = [client.submit(prompt, GREEDY) for prompt in prompts]
    together = until_end(client, *requests)
    assert [together[request][0] for request in requests] == alone
    assert all(len(tokens) == 12 for tokens in alone)


def test_a_request_is_cancelled_and_another_goes_on(client: EngineClient) -> None:
    endless, brief = client.submit([1, 5, 9], ENDLESS), client.submit([1, 5, 9], GREEDY)
    client.cancel(endless)
    client.cancel(999_999)  # unknown: left alone
    ended = until_end(client, endless, brief)
    assert ended[endless][1].finish_reason is StopReason.CANCELED
    assert ended[brief][1].finish_reason is StopReason.LENGTH


def test_a_bad_request_is_refused_and_hurts_nobody(client: EngineClient) -> None:
    bad, good = client.submit([1, 10_000], GREEDY), client.submit([1], GREEDY)
    ended = until_end(client, bad, good)
    assert ended[bad][1].error is not None
    assert "10000" in ended[bad][1].error.replace(",", "")
    assert ended[good][1].finish_reason is StopReason.LENGTH


def test_the_end_of_an_engine_is_told_and_stays_told(tiny_llama: Path) -> None:
    with EngineClient.start(EngineSpec(model=str(tiny_llama), threads=1)) as client:
        os.kill(client._processes[0].pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(RingError, match="ended by signal 9"):
                client.next_event(90.0)
        with pytest.raises(RingError, match="ended by signal 9"):
            client.submit([1], GREEDY)


def test_the_error_that_ended_the_start_is_raised(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        EngineClient.start(EngineSpec(model=str(model), local_ranks=2, threads=1))


def test_close_ends_every_process(tiny_llama: Path) -> None:
    client = EngineClient.start(EngineSpec(model=str(tiny_llama), local_ranks=2, threads=1))
    client.submit([1, 5, 9], ENDLESS)
    client.close()
    client.close()
    assert [process.poll() for process in client._processes] == [0, 0]
    with pytest.raises(RingError, match="closed"):
        client.submit([1], GREEDY)


def test_the_figures_come_while_it_works_and_after(client: EngineClient) -> None:
    until_end(client, client.submit([1, 5, 9], GREEDY))
    before = client.stats
    assert before is not None
    request = client.submit([1, 5, 9, 4], GREEDY.replace(max_tokens=400))
    until_end(client, request)
    after = client.stats
    assert after is not None
    assert (after.running, after.waiting, after.blocks_in_use) == (0, 0, 0)
    assert after.generated_tokens - before.generated_tokens == 400
    assert after.prompt_tokens - before.prompt_tokens == 4
    assert 400 <= after.steps - before.steps <= 402
    assert 0.0 < after.ring_s < after.step_s
    assert 0.0 < after.forward_s < after.step_s
    ((link,), (earlier,)) = after.links, before.links
    assert link.rank == 1
    assert link.sent_bytes - earlier.sent_bytes > 400 * 36 * 4  # the residual's size in float32, at least once a step
    assert link.received_bytes > earlier.received_bytes
    assert link.round_trip_s is not None
    assert 0.0 < link.round_trip_s < 5.0


def test_vectors_come_beside_answers(client: EngineClient) -> None:
    answer, vector = client.submit([1, 5, 9], GREEDY), client.embed([1, 5, 9])
    found, ended = None, None
    while found is None or ended is None:
        event = client.next_event(90.0)
        if isinstance(event, Embedding) and event.id == vector:
            found = array("f", event.vector)
        elif isinstance(event, Output) and event.id == answer and event.finish_reason is not None:
            ended = event
    assert len(found) == 36
    assert sum(value * value for value in found) == pytest.approx(1.0)
    client.embed([1, 10_000])
    refused = client.next_event(90.0)
    assert isinstance(refused, Output)
    assert "10000" in str(refused.error).replace(",", "")
