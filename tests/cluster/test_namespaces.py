"""Ranks on hosts of their own, with addresses of their own: network namespaces on one switch."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.namespaces import Switched, needs_namespaces

PROGRAM = """
import sys
from ringlm import LLM, SamplingParams
from ringlm.errors import RingLMError
try:
    with LLM(sys.argv[1], dtype="float32") as llm:
        print("ready", flush=True)
        params = SamplingParams(max_tokens=int(sys.argv[2]), temperature=0, ignore_eos=True)
        print(*llm.generate([[1, 5, 9]], params)[0].token_ids, flush=True)
except RingLMError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""
# For every line of its input rank 0 answers; it says when half of that is there, and at the end how often the ring was
# formed again.
ANSWERING = """
import sys
from ringlm.cluster.client import EngineClient, serve_rank
from ringlm.cluster.settings import Settings
from ringlm.cluster.spec import EngineSpec
from ringlm.ring import RingConfig
from tests.cluster.test_recovery import answers
ring = RingConfig.from_env()
settings = Settings(dtype="float32", context=1024)
spec = EngineSpec(model=sys.argv[1], settings=settings, ring=ring, threads=1, rejoin_timeout_s=60.0)
if ring.rank:
    serve_rank(spec)
with EngineClient.start(spec) as client:
    for _ in sys.stdin:
        print(answers(client, 200, lambda: print("half", flush=True)), client.ready.recoveries, sep="; ", flush=True)
"""


@pytest.fixture
def three_hosts() -> Iterator[Switched]:
    with Switched(3) as hosts:
        yield hosts


@needs_namespaces
def test_three_hosts_answer_together(three_hosts: Switched, tiny_llama: Path) -> None:
    with three_hosts.programs(PROGRAM, str(tiny_llama), "8") as ranks:
        out, err = ranks[0].communicate(timeout=90)
        assert ranks[0].returncode == 0, err
        assert len(out.split()) == 9  # "ready" and the tokens
        assert [process.wait(90) for process in ranks[1:]] == [0, 0]


@needs_namespaces
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_an_unplugged_host_is_named_by_the_others(three_hosts: Switched, tiny_llama: Path, victim: int) -> None:
    with three_hosts.programs(PROGRAM, str(tiny_llama), "4000") as ranks:
        assert ranks[0].stdout is not None
        assert ranks[0].stdout.readline() == "ready\n"
        time.sleep(0.5)
        three_hosts.unplug(victim)
        deadline = time.monotonic() + 90.0
        for rank, process in enumerate(ranks):
            if rank != victim:
                _, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
                assert process.returncode == 1
                assert f"PeerLostError: rank {victim} " in err


@needs_namespaces
def test_answers_are_the_same_over_a_slow_cable_and_one_that_was_out_for_a_while(
    three_hosts: Switched, tiny_llama: Path
) -> None:
    with three_hosts.programs(ANSWERING, str(tiny_llama)) as ranks:

        def half_an_answer() -> None:
            print(file=ranks[0].stdin, flush=True)
            assert line(ranks[0]) == "half"

        half_an_answer()
        undisturbed = line(ranks[0])
        three_hosts.throttle(1, "2mbit")
        half_an_answer()
        assert line(ranks[0]) == undisturbed  # without a recovery
        half_an_answer()
        three_hosts.unplug(2)
        time.sleep(6.5)  # longer than silence is borne
        three_hosts.plug(2)
        assert line(ranks[0]) == undisturbed.replace("; 0", "; 1")


def line(process: subprocess.Popen[str]) -> str:
    """The next that it says; its own deadlines end it if there is none."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip()
