"""Rank 0's turn: requests from the frontend to the engine, its news back; also while there is no ring to run them on.
Knows no links."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

import msgspec

from ringlm.cluster import messages
from ringlm.cluster.channel import ChannelClosed
from ringlm.cluster.compiling import Compiled, Compiler
from ringlm.cluster.loading import Loaded
from ringlm.cluster.upstream import Asked, Frontend
from ringlm.engine.embedding import Vector
from ringlm.engine.engine import Engine
from ringlm.engine.request import StopReason
from ringlm.errors import PeerError, QueueFullError, RequestError, RingError, RingLMError
from ringlm.ring import Ring

_STATS_S = 1.0
_IDLE_S = 0.5  # an idle rank 0 looks this often whether the ring still holds
_PAUSED_S = 0.1  # how often one without a ring looks whether it has one


class Leader:
    """Between a frontend and an engine that goes from ring to ring. `stepping`: a step is under way; `dismissed`: the
    frontend wants no more."""

    def __init__(self, frontend: Frontend) -> None:
        self.stepping = False
        self.dismissed = False
        self._frontend = frontend
        self._compiler = Compiler(frontend.put)
        self._engine: Engine | None = None
        self._ring: Ring | None = None
        self._recoveries = 0
        self._spares: Callable[[], int] = lambda: 0
        self._stats_due = 0.0  # when to tell the figures again, while there is work

    @property
    def generated(self) -> int:
        """Tokens so far."""
        return 0 if self._engine is None else self._engine.figures.generated_tokens

    def tell(self, message: messages.Progress | messages.Ready | messages.Recovering) -> None:
        self._frontend.send(message)

    def lead(self, loaded: Loaded, ring: Ring | None, spares: Callable[[], int], grows: Callable[[], bool]) -> bool:
        """Step while there is work, until the frontend wants no more, or, and then it returns True, `grows` says that
        the ring is to be formed again with more ranks. `spares` counts those who wait for a place. Raises the PeerError
        that ended the ring."""
        if self._engine is None:
            self._engine = Engine(loaded.runner, loaded.comm, max_seqs=loaded.max_seqs, epoch=loaded.ready.epoch)
        else:
            self._engine.resume(loaded.runner, loaded.comm, epoch=loaded.ready.epoch)
        engine, self._ring = self._engine, ring
        self._recoveries, self._spares = loaded.ready.recoveries, spares
        self.tell(loaded.ready)
        try:
            while True:
                for message in self._frontend.messages(0.0 if engine.has_work else _IDLE_S):
                    if isinstance(message, messages.Shutdown):
                        self.dismissed = True
                        engine.stop()
                        return False
                    self._accept(engine, message)
                if grows():
                    engine.stop(again=True)
                    engine.pause()
                    return True
                if engine.has_work:
                    self.stepping = True
                    news = engine.step()
                    self.stepping = False
                    self._frontend.send(*self._stats(engine), *map(_told, news))
                elif ring is not None:
                    ring.check()
        except ChannelClosed:
            raise RingLMError("its frontend ended without a word.") from None
        except PeerError:
            engine.pause()
            raise
        finally:
            self.stepping, self._ring = False, None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While this lasts there is no ring: requests queue, and the frontend's end ends the block, by SystemExit."""
        over = threading.Event()
        thread = threading.Thread(target=self._listen, args=(over,), name="ringlm-waiting", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def farewell(self) -> None:
        """Let the daemons end in order, if there is a ring."""
        if self._engine is not None:
            with contextlib.suppress(RingError):  # there is none, and who looks for it is told elsewhere
                self._engine.stop()

    def _listen(self, over: threading.Event) -> None:
        try:
            while not over.is_set():
                for message in self._frontend.messages(_PAUSED_S):
                    if isinstance(message, messages.Shutdown):
                        raise ChannelClosed
                    if self._engine is not None:
                        self._accept(self._engine, message)
        except ChannelClosed:
            self.dismissed = True
            # Wherever the main thread waits: for members, for links, for a file.
            signal.pthread_kill(int(threading.main_thread().ident or 0), signal.SIGTERM)

    def _accept(self, engine: Engine, message: Asked) -> None:
        if isinstance(message, messages.Vocabulary):
            self._compiler.learn(message, engine.limits.eos_token_ids)
        elif isinstance(message, messages.Cancel):
            awaited = self._compiler.forget(message.id)
            delta = messages.Output(message.id, [], StopReason.CANCELED) if awaited else engine.cancel(message.id)
            if delta is not None:
                self._frontend.send(*self._stats(engine), delta)
        elif not isinstance(message, Compiled) or self._compiler.forget(message.request.id):
            self._begin(engine, message)

    def _begin(self, engine: Engine, message: messages.Submit | messages.Embed | Compiled) -> None:
        request = message.request if isinstance(message, Compiled) else message
        try:
            if isinstance(message, messages.Embed):
                engine.embed(message.id, message.prompt_tokens)
            elif isinstance(message, messages.Submit):
                if message.params.structured_outputs is None:
                    engine.submit(message.id, message.prompt_tokens, message.params)
                else:
                    self._compiler.compile(message)
            elif isinstance(message.grammar, RequestError):
                raise message.grammar
            else:
                engine.submit(request.id, request.prompt_tokens, message.request.params, message.grammar)
        except RequestError as error:
            self._frontend.send(
                messages.Output(request.id, [], error=str(error), busy=isinstance(error, QueueFullError))
            )

    def _stats(self, engine: Engine) -> list[messages.Stats]:
        """The engine's figures when they are to be told: every second while there is work, and once after it."""
        now = time.monotonic()
        if engine.has_work and now < self._stats_due:
            return []
        self._stats_due = now + _STATS_S
        links = [] if self._ring is None else [messages.LinkStats(*each) for each in self._ring.figures()]
        slow, others = ({}, []) if self._ring is None else (self._ring.slow, self._ring.others())
        figures = messages.Stats(
            **msgspec.structs.asdict(engine.figures),
            links=links,
            spares=self._spares(),
            recoveries=self._recoveries,
            slow=slow,
            others=others,
            at_s=now,
        )
        return [figures]


def _told(news: messages.Output | Vector) -> messages.Output | messages.Embedding:
    """What the frontend is told of it."""
    return messages.Embedding(news.id, news.values.tobytes()) if isinstance(news, Vector) else news
