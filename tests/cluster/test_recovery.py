"""A rank is lost in the middle of answers, and they go on as if it had not been."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from ringlm.cluster.client import EngineClient
from ringlm.cluster.messages import Output
from ringlm.cluster.settings import Settings
from ringlm.cluster.spec import EngineSpec
from ringlm.engine.request import SamplingParams, StopReason
from ringlm.ring.address import Address
from tests.cluster.rings import Daemon, ProcessRing, process_ring
from tests.tiny import save_llama

SETTINGS = Settings(dtype="float32", context=1024)
PROMPT = [1, 5, 9]
GREEDY = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
SAMPLED = GREEDY.replace(temperature=1.0, seed=7)
WITHIN_S = 60.0


def answers(
    client: EngineClient, after: int = 0, then: Callable[[], None] = lambda: None
) -> tuple[list[list[int]], list[StopReason | None]]:
    """A greedy and a sampled answer, at once, and why they ended; `then` is called after so many tokens of them."""
    requests = [client.submit(PROMPT, GREEDY), client.submit(PROMPT, SAMPLED)]
    tokens: dict[int, list[int]] = {request: [] for request in requests}
    reasons: dict[int, StopReason | None] = {}
    deadline = time.monotonic() + WITHIN_S
    while len(reasons) < len(requests):
        assert time.monotonic() < deadline
        event = client.next_event(1.0)
        if not isinstance(event, Output):
            continue
        assert event.error is None
        tokens[event.id] += event.tokens
        if event.finish_reason is not None:
            reasons[event.id] = event.finish_reason
        if after and sum(map(len, tokens.values())) >= after:
            after = 0
            then()
    return list(tokens.values()), [reasons[request] for request in requests]


def kill(ring: ProcessRing, rank: int) -> None:
    os.kill(ring.pid(rank), signal.SIGKILL)


def joining(ring: ProcessRing, **changes: object) -> Daemon:
    """A rank that joins, as `ringlm join` starts it."""
    first = ring.specs[0].ring
    assert first is not None
    own = first.replace(rank=0, world_size=1, port=0, right=None)
    engine = EngineSpec(model=ring.specs[0].model, ring=own, join=Address("127.0.0.1", first.port), threads=1)
    return ring.daemon(msgspec.structs.replace(engine, **changes))


def test_a_killed_daemon_is_started_again(tiny_llama: Path, tmp_path: Path) -> None:
    with process_ring(str(tiny_llama), 2, tmp_path, settings=SETTINGS, rejoin_timeout_s=60.0) as ring:
        undisturbed = answers(ring.client)

        def restart() -> None:
            kill(ring, 1)
            ring.daemons[0] = ring.daemon(ring.specs[1])

        assert answers(ring.client, 50, restart) == undisturbed
        assert (ring.client.ready.epoch, ring.client.ready.recoveries) == (1, 1)
        requests_come_and_go_while_a_rank_is_missing(ring, undisturbed)
        ring.client.close()
        assert ring.daemons[0].process.wait(90) == 0


def requests_come_and_go_while_a_rank_is_missing(ring: ProcessRing, undisturbed: object) -> None:
    client = ring.client
    running = client.submit(PROMPT, GREEDY)
    assert client.next_event(90.0) is not None
    kill(ring, 1)
    while client.recovering is None:
        client.next_event(0.1)
    assert client.recovering.rank == 1
    client.cancel(running)
    while not (isinstance(event := client.next_event(90.0), Output) and event.finish_reason is not None):
        pass
    assert (event.id, event.finish_reason) == (running, StopReason.CANCELED)
    ring.daemons[0] = ring.daemon(ring.specs[1])
    assert answers(client) == undisturbed
    assert client.recovering is None


def test_three_ranks_go_on_as_two(tiny_llama: Path, tmp_path: Path) -> None:
    with process_ring(str(tiny_llama), 3, tmp_path, settings=SETTINGS, rejoin_timeout_s=1.0) as ring:
        undisturbed = answers(ring.client)
        assert answers(ring.client, 50, lambda: kill(ring, 1)) == undisturbed
        assert ring.client.ready.world_size == 2
        who_dies_while_it_is_taken_in_is_not_awaited(ring, undisturbed)
        kill(ring, 0)  # for whom the last waits in vain
        assert ring.daemons[1].process.wait(90) == 1
        assert "PeerLostError: rank 0 " in ring.daemons[1].said()
        assert "The ring was not formed again: rank 0 could not be reached" in ring.daemons[1].said()


def who_dies_while_it_is_taken_in_is_not_awaited(ring: ProcessRing, undisturbed: object) -> None:
    newcomer = joining(ring)
    while ring.client.recovering is None:
        ring.client.next_event(0.1)
    assert ring.client.recovering.rank is None
    newcomer.kill()
    assert answers(ring.client) == undisturbed
    assert (ring.client.ready.world_size, ring.client.recovering) == (2, None)


def test_two_ranks_go_on_as_three_again(tiny_llama: Path, tmp_path: Path) -> None:
    with process_ring(str(tiny_llama), 3, tmp_path, settings=SETTINGS, rejoin_timeout_s=1.0) as ring:
        undisturbed = answers(ring.client)
        assert answers(ring.client, 50, lambda: kill(ring, 1)) == undisturbed
        ring.daemons[0] = ring.daemon(ring.specs[1])
        while ring.client.ready.world_size == 2:  # until it is taken in, in the middle of answers
            assert answers(ring.client) == undisturbed
        ready = ring.client.ready
        assert (ready.world_size, ready.full_world_size, ready.epoch, ready.recoveries) == (3, 3, 2, 2)
        assert answers(ring.client) == undisturbed
        ring.client.close()
        assert [daemon.process.wait(90) for daemon in ring.daemons] == [0, 0]


def test_a_spare_takes_the_place_of_a_lost_rank(tiny_llama: Path, tmp_path: Path) -> None:
    with process_ring(str(tiny_llama), 2, tmp_path, settings=SETTINGS, rejoin_timeout_s=60.0) as ring:
        undisturbed = answers(ring.client)
        joining(ring)
        assert answers(ring.client, 50, lambda: kill(ring, 1)) == undisturbed
        assert (ring.client.ready.world_size, ring.client.ready.recoveries) == (2, 1)


def test_daemons_rejoin_a_rank_0_that_is_started_again(tiny_llama: Path, tmp_path: Path) -> None:
    with process_ring(str(tiny_llama), 3, tmp_path, settings=SETTINGS, rejoin_timeout_s=60.0) as ring:
        undisturbed = answers(ring.client)
        kill(ring, 0)
        ring.client.close()
        ring.client = EngineClient.start(ring.specs[0])
        assert answers(ring.client) == undisturbed
        assert ring.client.ready.epoch == 1
        ring.client.close()
        assert [daemon.process.wait(90) for daemon in ring.daemons] == [0, 0]


def test_rank_0_goes_on_alone(tiny_llama: Path, tmp_path: Path) -> None:
    with process_ring(str(tiny_llama), 2, tmp_path, settings=SETTINGS, rejoin_timeout_s=0.5) as ring:
        undisturbed = answers(ring.client)
        assert answers(ring.client, 50, lambda: kill(ring, 1)) == undisturbed
        assert ring.client.ready.world_size == 1


def test_who_does_not_belong_there_is_refused_and_disturbs_nobody(tiny_llama: Path, tmp_path: Path) -> None:
    another = save_llama(tmp_path / "another", seed=1)
    with process_ring(str(tiny_llama), 2, tmp_path, settings=SETTINGS, rejoin_timeout_s=60.0) as ring:
        undisturbed = answers(ring.client)
        model = joining(ring, model=str(another))
        setting = joining(ring, settings=Settings(dtype="bfloat16"))
        twin = ring.daemon(msgspec.structs.replace(ring.specs[1], ring=ring.specs[1].ring.replace(port=0)))
        assert model.process.wait(90) == 1
        assert "refused this rank: this rank has the model" in model.said()
        assert setting.process.wait(90) == 2
        assert "the rank that joins was started with dtype bfloat16 and rank 0 with float32" in setting.said()
        assert twin.process.wait(90) == 1
        assert "rank 1 is connected to rank 0 already; give every rank a number of its own" in twin.said()
        assert answers(ring.client) == undisturbed
        assert ring.client.ready.recoveries == 0
