"""Grammars, compiled on a thread: one may take half a second, and steps go on meanwhile. Knows requests, no engine."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from ringlm.cluster.messages import Submit, Vocabulary
from ringlm.engine.engine import MAX_WAITING
from ringlm.errors import QueueFullError, RequestError, unforeseen

if TYPE_CHECKING:
    from ringlm.engine.grammar import Grammar, Grammars


class Compiled(NamedTuple):
    """A request, and the grammar that it asked for, or why there is none."""

    request: Submit
    grammar: Grammar | RequestError


class Compiler:
    """Compiles the grammars of requests one by one; `tell` gets each when it is done, on the compiler's thread."""

    def __init__(self, tell: Callable[[Compiled], None]) -> None:
        self._tell = tell
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ringlm-grammars")
        self._grammars: Future[Grammars] | None = None
        self._pending: set[int] = set()

    def learn(self, vocabulary: Vocabulary, ends: Collection[int]) -> None:
        """What tokens stand for, before the first request; `ends` are further end-of-sequence tokens."""
        self._grammars = self._thread.submit(_grammars, vocabulary, {*vocabulary.ends, *ends})

    def compile(self, request: Submit) -> None:
        """Raises RequestError before `learn`, QueueFullError if too many wait."""
        if self._grammars is None:
            raise RequestError("This engine was not told what its tokens stand for, so it can follow no grammar.")
        if len(self._pending) >= MAX_WAITING:
            raise QueueFullError(f"{len(self._pending)} grammars wait to be compiled; try again later.")
        self._pending.add(request.id)
        self._thread.submit(self._work, request, self._grammars)

    def forget(self, id: int) -> bool:
        """No more wait for the grammar of request `id`; whether it was awaited."""
        awaited = id in self._pending
        self._pending.discard(id)
        return awaited

    def _work(self, request: Submit, grammars: Future[Grammars]) -> None:
        shape = request.params.structured_outputs
        try:
            found: Grammar | RequestError = grammars.result().compile((shape and shape.grammar) or "")
        except RequestError as error:
            found = error
        except Exception as error:  # noqa: BLE001 - whoever waits has to know, and the thread has others to serve
            found = RequestError(str(unforeseen("a grammar", error)))
        self._tell(Compiled(request, found))


def _grammars(vocabulary: Vocabulary, ends: Collection[int]) -> Grammars:
    from ringlm.engine.grammar import Grammars

    return Grammars(vocabulary.tokens, vocabulary.special, ends)
