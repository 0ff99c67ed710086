"""Seeded faults of any rank, and of the cables between ranks, in any phase, while answers stream:

    python -m tests.cluster.faults --runs 200 --seed 1 --jobs 2

Every request ends with the undisturbed run's tokens, or, with recovery off, with a clear error within WITHIN_S; nothing
hangs, no process and no block of the cache is left. What it does not know: how to start and end rings (`supervised`).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ringlm.cluster.client import EngineClient
from ringlm.cluster.messages import Output
from ringlm.engine.request import SamplingParams
from ringlm.errors import RingLMError
from tests.cables import Cables, Relay
from tests.cluster.supervised import Supervised, Wrong
from tests.tiny import VOCABULARY, save_llama

PHASES = ("connecting", "loading", "prefill", "decode", "idle", "recovering", "draining")
FAULTS = ("kill", "stop", "delay", "throttle", "cut", "half-close", "stall", "damage")
WORLDS = (2, 3, 4)
WITHIN_S = 10.0  # for an error
PATIENCE_S = 150.0  # for anything at all; who needs longer hangs
LONG_S = 6.5  # longer than silence is borne

GREEDY = SamplingParams(max_tokens=120, temperature=0, ignore_eos=True)
REQUESTS = (
    ([1, 5, 9], GREEDY),
    ([1, 5, 9], GREEDY.replace(temperature=1.0, seed=7)),
    ([1 + at * at % (VOCABULARY - 1) for at in range(700)], GREEDY.replace(max_tokens=40)),
)
TOKENS = sum(params.max_tokens or 0 for _, params in REQUESTS)


@dataclasses.dataclass(frozen=True)
class Run:
    """What is to happen; all else is drawn from `seed`."""

    seed: str
    world_size: int
    phase: str
    fault: str
    recovery: bool


def plan(count: int, seed: int, worlds: tuple[int, ...] = WORLDS) -> list[Run]:
    """`count` runs: every phase with every fault and every world size once, in random order, and so on. Those that may
    share a ring follow each other."""
    draw = random.Random(seed)
    cells = list(itertools.product(worlds, PHASES, FAULTS))
    runs: list[Run] = []
    while len(runs) < count:
        draw.shuffle(cells)
        for world_size, phase, fault in cells[: count - len(runs)]:
            recovery = phase == "recovering" or draw.random() < 0.75
            runs.append(Run(f"{seed}.{len(runs)}", world_size, phase, fault, recovery))
    return sorted(runs, key=lambda run: (run.world_size, run.recovery))


class Answers:
    """Requests of one client, and what has come of them."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        ids = [client.submit(*request) for request in REQUESTS]
        self.tokens: dict[int, list[int]] = {request: [] for request in ids}
        self.unfinished = set(ids)

    @property
    def total(self) -> int:
        return sum(map(len, self.tokens.values()))

    def stream(self, until: Callable[[], bool], limit_s: float = PATIENCE_S) -> None:
        """Until then, or all are finished. Raises what ended the engine, and Wrong after the limit."""
        deadline = time.monotonic() + limit_s
        while self.unfinished and not until():
            if time.monotonic() > deadline:
                raise Wrong(f"hangs: {self.total} of {TOKENS} tokens after {limit_s:g} s")
            event = self._client.next_event(0.05)
            if isinstance(event, Output) and event.id in self.tokens:
                if event.error is not None:
                    raise Wrong(f"a request was refused: {event.error}")
                self.tokens[event.id] += event.tokens
                if event.finish_reason is not None:
                    self.unfinished.discard(event.id)

    def finish(self) -> list[list[int]]:
        """All tokens, by request; nothing is held for them any more."""
        self.stream(lambda: False)
        stats = self._client.stats
        if stats is None or stats.running or stats.waiting or stats.blocks_in_use:
            raise Wrong(f"blocks are held, or requests: {stats}")
        return list(self.tokens.values())


class Struck(Protocol):
    """A ring that faults can befall; see Supervised."""

    world_size: int

    def ways(self, rank: int, other: int | None) -> list[Relay]: ...
    def pid(self, rank: int) -> int: ...
    def signal(self, rank: int, number: int) -> None: ...
    def go_on(self, pid: int) -> None: ...


class Strike:
    """One fault of `rank`, or of any, which ends by itself. `text` says what it was; `harmless`: no ring should
    end by it; `first_dies`: rank 0's process does."""

    def __init__(self, ring: Struck, fault: str, draw: random.Random, rank: int | None = None) -> None:
        self._ring = ring
        self._draw = draw
        self._healing: list[threading.Timer] = []
        self._rank = draw.randrange(ring.world_size) if rank is None else rank
        self.harmless = fault in ("delay", "throttle")
        self.first_dies = fault == "kill" and self._rank == 0
        other = draw.choice([None, *(rank for rank in range(ring.world_size) if rank != self._rank)])
        self._ways = ring.ways(self._rank, other)
        self.text = f"{fault} of rank {self._rank}"
        if fault not in ("kill", "stop"):
            self.text += "'s cables" if other is None else f"'s cable to rank {other}"
        self.at = time.monotonic()
        {"kill": self._kill, "stop": self._stop, "half-close": self._half_close}.get(fault, self._weather)(fault)

    def over(self) -> None:
        """Wait until what was to end has ended."""
        for timer in self._healing:
            timer.join()

    def _kill(self, _: str) -> None:
        self._ring.signal(self._rank, signal.SIGKILL)

    def _stop(self, _: str) -> None:
        pid, pause_s = self._ring.pid(self._rank), self._pause()
        self._ring.signal(self._rank, signal.SIGSTOP)
        self._later(pause_s, lambda: self._ring.go_on(pid))

    def _half_close(self, _: str) -> None:
        for relay in self._ways:
            relay.half_close(self._draw)

    def _weather(self, fault: str) -> None:
        for relay in self._ways:
            if fault == "damage":
                relay.damage(self._draw)
            elif fault == "cut":
                relay.weather.open = False
                relay.cut()
            elif fault == "delay":
                relay.weather.delay_s = 0.03
            elif fault == "throttle":
                relay.weather.bytes_per_s = 50_000
            else:
                relay.weather.stalled = True
        pause_s = self._pause() if fault == "stall" else self._draw.uniform(0.1, 2.0)
        self._later(pause_s, lambda: [relay.clear() for relay in self._ways])

    def _pause(self) -> float:
        pause_s = self._draw.choice([0.5, LONG_S])
        self.harmless = pause_s < LONG_S
        self.text += f" for {pause_s:g} s"
        return pause_s

    def _later(self, pause_s: float, what: Callable[[], object]) -> None:
        self._healing.append(threading.Timer(pause_s, what))
        self._healing[-1].start()


class Campaign:
    """Runs one after the other. A context manager: rings that are still good are kept for the next run."""

    def __init__(self, model: str, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._cables = Cables()
        self._ring: Supervised | None = None
        self._last: Supervised | None = None
        self._expected: dict[int, list[list[int]]] = {}

    def __enter__(self) -> Campaign:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop(orderly=False)
        self._cables.close()

    def drop(self, *, orderly: bool) -> None:
        """End the ring that is kept. Raises Wrong when a process of its is left."""
        ring, self._ring = self._ring, None
        self._last = ring or self._last
        if ring is not None:
            ring.close(orderly=orderly, limit_s=PATIENCE_S / 3)

    def said(self) -> str:
        """What the ranks of the last ring have said, for whoever looks for the cause."""
        last = self._ring or self._last
        return "" if last is None else last.said()

    def run(self, run: Run) -> str:
        """One run; what happened. Raises Wrong, or what else should not be."""
        draw = random.Random(run.seed)
        if run.world_size not in self._expected:
            self._renew(dataclasses.replace(run, recovery=True)).start(PATIENCE_S)
            self._expected[run.world_size] = Answers(self._kept().client).finish()
        if run.phase in ("connecting", "loading"):
            return self._while_starting(run, draw)
        ring = self._ring
        if ring is None or (ring.world_size, ring.recovery) != (run.world_size, run.recovery):
            ring = self._renew(run)
            ring.start(PATIENCE_S)
        strikes: list[Strike] = []
        try:
            told = self._while_serving(run, ring, draw, strikes)
        finally:
            for strike in strikes:
                strike.over()
        return f"{', '.join(strike.text for strike in strikes)}: {told}"

    def _renew(self, run: Run) -> Supervised:
        self.drop(orderly=True)
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        self._ring = Supervised(self._model, run.world_size, folder, self._cables, recovery=run.recovery)
        return self._ring

    def _kept(self) -> Supervised:
        assert self._ring is not None
        return self._ring

    def _check(self, run: Run, tokens: list[list[int]]) -> None:
        if self._kept().client.ready.world_size != run.world_size:
            raise Wrong("a rank could not come back")
        if tokens != self._expected[run.world_size]:
            raise Wrong(f"other tokens: {tokens}, not {self._expected[run.world_size]}")

    def _while_starting(self, run: Run, draw: random.Random) -> str:
        """Whoever ends is started again, and soon there is a ring that answers as it should."""
        ring = self._renew(run)
        strikes: list[Strike] = []
        pause_s = draw.uniform(0.0, 0.3 if run.phase == "connecting" else 0.05)

        def strike() -> None:
            time.sleep(pause_s)
            if not strikes:
                strikes.append(Strike(ring, run.fault, draw))

        tries = ring.start(PATIENCE_S, **{f"when_{run.phase}": strike})
        for one in strikes:
            one.over()
        if not strikes:
            raise Wrong("the phase was missed")
        self._check(run, self._answers_at_last(ring))
        return f"{strikes[0].text}: answers after {tries} start{'s' * (tries > 1)} of rank 0"

    def _answers_at_last(self, ring: Supervised) -> list[list[int]]:
        """A ring that was struck as it became ready may end before it answers, once."""
        try:
            return Answers(ring.client).finish()
        except RingLMError:
            ring.restart_first(PATIENCE_S)
            return Answers(ring.client).finish()

    def _while_serving(self, run: Run, ring: Supervised, draw: random.Random, strikes: list[Strike]) -> str:
        recoveries = ring.client.ready.recoveries
        answers = None if run.phase == "idle" else Answers(ring.client)
        try:
            self._reach(run.phase, ring, draw, answers)
            strikes.append(Strike(ring, run.fault, draw))
            if answers is None:
                time.sleep(draw.uniform(0.0, 3.0))
                answers = Answers(ring.client)
            tokens = answers.finish()
        except RingLMError as error:
            return self._ended(run, ring, strikes, error)
        self._check(run, tokens)
        for strike in strikes:
            strike.over()
        if not run.recovery and (run.phase == "draining" or not strikes[0].harmless):
            self.drop(orderly=False)  # it has ended, or will
        return f"the same, {ring.client.ready.recoveries - recoveries} recoveries"

    def _reach(self, phase: str, ring: Supervised, draw: random.Random, answers: Answers | None) -> None:
        """Be in that phase."""
        if phase == "prefill":
            time.sleep(draw.uniform(0.0, 0.06))
        elif answers is not None:
            after = draw.randrange(3, TOKENS // 2)
            answers.stream(lambda: answers.total >= after)
        victim = draw.randrange(1, ring.world_size)
        if phase == "draining":
            ring.signal(victim, signal.SIGTERM)
            time.sleep(draw.uniform(0.0, 1.2))
        elif phase == "recovering" and answers is not None:
            ring.signal(victim, signal.SIGKILL)
            answers.stream(lambda: ring.client.recovering is not None, WITHIN_S)
            time.sleep(draw.uniform(0.0, 3.0))

    def _ended(self, run: Run, ring: Supervised, strikes: list[Strike], error: RingLMError) -> str:
        """The engine of rank 0 has ended with `error`, as it may: what must follow."""
        after_s = time.monotonic() - strikes[0].at if strikes else 0.0
        first_dies = any(strike.first_dies for strike in strikes)
        if run.recovery and not first_dies:
            raise Wrong(f"rank 0 ended in spite of recovery: {error}") from error
        if strikes and strikes[0].harmless and run.phase != "draining":
            raise Wrong(f"a fault that should be borne ended the ring: {error}") from error
        limit_s = WITHIN_S + (3.0 if run.phase == "idle" else 0.0)  # it may be the next request that meets the fault
        if after_s > limit_s:
            raise Wrong(f"the error took {after_s:.1f} s: {error}") from error
        for strike in strikes:
            strike.over()
        told = f"{type(error).__name__} after {after_s:.1f} s"
        if not run.recovery:
            if still := ring.still_there(PATIENCE_S / 3):
                raise Wrong(f"{told}; ranks {still} do not end") from error
            self.drop(orderly=False)
            return told
        ring.restart_first(PATIENCE_S)
        self._check(run, Answers(ring.client).finish())
        return f"{told}; the same from a new rank 0"


def table(results: list[tuple[Run, bool]]) -> str:
    """Good runs of all, by phase and fault; the world sizes beside each other."""
    cells: dict[tuple[str, str, int], list[bool]] = collections.defaultdict(list)
    for run, good in results:
        cells[run.phase, run.fault, run.world_size].append(good)

    def cell(phase: str, fault: str) -> str:
        each = [cells.get((phase, fault, world_size), []) for world_size in WORLDS]
        return " · ".join(f"{sum(one)}/{len(one)}" if one else "–" for one in each)

    rows = [["phase", *FAULTS], ["---"] * (len(FAULTS) + 1)]
    rows += [[phase, *(cell(phase, fault) for fault in FAULTS)] for phase in PHASES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def carry_out(model: str, folder: Path, runs: list[Run]) -> list[tuple[Run, bool]]:
    """Runs that may share a ring, one after the other; a line is printed of each. Whether each was as it should be."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its rings end with it
    results = []
    with Campaign(model, folder) as campaign:
        for run in runs:
            began = time.monotonic()
            try:
                good, told = True, campaign.run(run)
            except (Wrong, RingLMError, OSError) as error:
                good, told = False, f"WRONG: {type(error).__name__}: {error}\n{campaign.said()}"
                with contextlib.suppress(Wrong):
                    campaign.drop(orderly=False)
            results.append((run, good))
            where = f"{run.world_size} ranks, {run.phase}, recovery {'on' if run.recovery else 'off'}"
            print(f"{run.seed}: {where}: {told} ({time.monotonic() - began:.1f} s)", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="rings at the same time")
    parser.add_argument("--only", help="the seed of one run of these, as its line has it")
    arguments = parser.parse_args()
    os.environ |= {"RINGLM_SHARD_CACHE_GB": "0", "OMP_NUM_THREADS": "1"}
    folder = Path(tempfile.mkdtemp(prefix="ringlm-faults-"))
    model = str(save_llama(folder / "llama"))
    runs = [run for run in plan(arguments.runs, arguments.seed) if arguments.only in (None, run.seed)]
    rings = [list(group) for _, group in itertools.groupby(runs, lambda run: (run.world_size, run.recovery))]
    rings.sort(key=len, reverse=True)
    with multiprocessing.get_context("fork").Pool(arguments.jobs) as jobs:
        each = jobs.imap(functools.partial(carry_out, model, folder), rings)
        results = list(itertools.chain.from_iterable(each))
    good = sum(good for _, good in results)
    print(f"\n{good} of {len(results)} runs as they should be\n\n{table(results)}")
    return 0 if good == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
