"""A model whose logits are a seeded function of the tokens in its cache: wrong contents, positions, blocks or
order change what it says. And a world of ranks, as threads, that runs it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from ringlm.engine.engine import Engine
from ringlm.engine.follower import follow
from ringlm.engine.grammar import Grammar, Grammars
from ringlm.engine.news import Output
from ringlm.engine.request import SamplingParams, StopReason
from ringlm.engine.runner import Runner
from ringlm.models.batch import Batch
from ringlm.parallel.communicator import Communicator
from ringlm.parallel.shard import Range, RankShard
from tests.parallel.local import LocalGroup

VOCABULARY = 23
EOS = 2
CONTEXT = 24
BLOCK = 4  # positions of a cache block
SEQUENCE = CONTEXT // BLOCK  # blocks that hold any sequence


@dataclass
class FakeConfig:
    vocabulary: int = VOCABULARY
    eos_token_ids: tuple[int, ...] = (EOS,)
    context: int = CONTEXT


class FakeCache:
    """Token ids where a real cache has keys and values, and what depends on all tokens before, as those do."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.block, self.positions = blocks, BLOCK, blocks * BLOCK
        self.tokens = np.full(self.positions, -1)
        self.digests = np.zeros(self.positions, np.int64)

    def write(self, places: np.ndarray, start: int, tokens: np.ndarray) -> None:
        """Write a sequence's tokens from position `start` on; what lies before must be what this sequence wrote."""
        digest = 0
        self.tokens[places[start:]] = tokens
        for position, place in enumerate(places.tolist()):
            digest = hash((digest, int(self.tokens[place])))
            if position >= start:
                self.digests[place] = digest
            assert self.tokens[place] >= 0, "a position was read that was never written"
            assert self.digests[place] == digest, "a position was written behind other tokens"


def logits_after(tokens: Sequence[int]) -> np.ndarray:
    """(V,) float32, with many equal ones."""
    digest = hashlib.blake2b(np.asarray(tokens, np.int64).tobytes(), digest_size=8).digest()
    normal = np.random.default_rng(int.from_bytes(digest, "big")).standard_normal(VOCABULARY)
    return (np.round(normal * 6) / 2).astype(np.float32)


def vector_after(tokens: Sequence[int]) -> np.ndarray:
    """The embedding of `tokens`, as FakeModel has it."""
    logits = logits_after(tokens)
    return logits / np.linalg.norm(logits)


class FakeModel:
    """Rank `comm.rank`'s part. `poison` is a token after which every logit is NaN."""

    device = torch.device("cpu")

    def __init__(self, comm: Communicator, vocabulary: Range, poison: int | None = None) -> None:
        none = Range(0, 0)
        self.config = FakeConfig()
        self.shard = RankShard(none, none, none, vocabulary, none)
        self.comm = comm
        self.poison = poison
        self.batches: list[Batch] = []
        self.seen: list[np.ndarray] = []  # by row of the last batch, the tokens up to it

    def forward_states(self, batch: Batch, cache: FakeCache, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A state is the logits, so that a vector is `vector_after`'s."""
        logits = self.forward(batch, cache)
        return logits, torch.from_numpy(np.stack([self._logits(self.seen[row]) for row in rows]))

    def forward(self, batch: Batch, cache: FakeCache) -> Tensor:
        self.batches.append(batch)
        rows: list[np.ndarray] = []
        for span in batch.spans:
            end = span.start + span.length
            here = slice(span.offset, span.offset + span.length)
            assert batch.positions[here].tolist() == list(range(span.start, end))
            pages = np.array(span.blocks)
            places = pages[np.arange(end) // BLOCK] * BLOCK + np.arange(end) % BLOCK
            cache.write(places, span.start, batch.tokens[here].numpy())
            rows += [cache.tokens[places[: position + 1]] for position in range(span.start, end)]
        self.seen = rows
        wanted = [rows[row] for row in batch.wanted.tolist()]
        self._assert_in_step(rows)
        logits = np.stack([self._logits(row) for row in wanted]) if wanted else np.empty((0, VOCABULARY), np.float32)
        return torch.from_numpy(np.ascontiguousarray(logits[:, self.shard.vocabulary.slice]))

    def _logits(self, tokens: np.ndarray) -> np.ndarray:
        logits = logits_after(tokens)
        return np.full_like(logits, np.nan) if tokens[-1] == self.poison else logits

    def _assert_in_step(self, rows: list[np.ndarray]) -> None:
        checksum = torch.tensor([sum(int(row.sum()) * len(row) for row in rows)], dtype=torch.float64)
        assert self.comm.all_reduce(checksum.clone()) == checksum * self.comm.world_size


# vocabulary rows by rank; with three ranks one of them holds none
VOCABULARIES = {
    1: [Range(0, VOCABULARY)],
    2: [Range(0, 7), Range(7, VOCABULARY)],
    3: [Range(0, 11), Range(11, 11), Range(11, VOCABULARY)],
}


class World:
    """An engine, and followers on threads. Leaving it stops them, and raises what any of them raised."""

    def __init__(
        self,
        world_size: int = 1,
        *,
        max_seqs: int = 3,
        blocks: int | None = None,
        max_waiting: int = 256,
        token_budget: int = 8,
        poison: int | None = None,
    ) -> None:
        blocks = max_seqs * SEQUENCE if blocks is None else blocks
        self.group = LocalGroup(world_size, timeout_s=90.0)
        self.failures: list[BaseException] = []
        self.models: list[FakeModel] = []
        runners = []
        for comm, vocabulary in zip(self.group.ranks, VOCABULARIES[world_size], strict=True):
            model = FakeModel(comm, vocabulary, poison)
            self.models.append(model)
            runners.append(Runner(model, FakeCache(blocks), comm))
        self.engine = Engine(
            runners[0], self.group.ranks[0], max_seqs=max_seqs, max_waiting=max_waiting, token_budget=token_budget
        )
        self.threads = [threading.Thread(target=self._follow, args=(runner,), daemon=True) for runner in runners[1:]]
        for thread in self.threads:
            thread.start()

    def _follow(self, runner: Runner) -> None:
        try:
            follow(runner, runner.comm)
        except BaseException as error:  # noqa: BLE001 - raised again by close
            self.failures.append(error)
            self.group.abort()

    def run(self) -> dict[int, list[Output]]:
        """Steps until there is no work; the news by request."""
        news: dict[int, list[Output]] = {}
        for _ in range(1000):
            if not self.engine.has_work:
                return news
            for delta in self.engine.step():
                news.setdefault(delta.id, []).append(delta)
        raise AssertionError("the engine has work after 1,000 steps")

    def close(self) -> None:
        if not self.failures:
            self.engine.stop()
        for thread in self.threads:
            thread.join(90.0)
            assert not thread.is_alive()
        if self.failures:
            raise self.failures[0]

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.group.abort()
        else:
            self.close()


def blocks_in_use(engine: Engine) -> int:
    return engine.figures.blocks_in_use


def tokens_of(news: list[Output]) -> list[int]:
    return [token for delta in news for token in delta.tokens]


_GRAMMARS = Grammars([bytes([ord("a") + token]) for token in range(VOCABULARY)], [EOS], [EOS])


def grammar_of(params: SamplingParams) -> Grammar | None:
    """What the shape in `params` says of tokens, which are letters from a on."""
    shape = params.structured_outputs
    return None if shape is None else _GRAMMARS.compile('%llguidance {"no_forcing": true}\n' + str(shape.grammar))


def alone(prompt: list[int], params: SamplingParams, **options: int) -> tuple[list[int], StopReason | None]:
    """What a request gives when nothing else runs, on one rank, with its prompt in one piece."""
    with World(1, token_budget=64, **options) as world:
        world.engine.submit(0, prompt, params, grammar_of(params))
        news = world.run()[0]
    return tokens_of(news), news[-1].finish_reason
