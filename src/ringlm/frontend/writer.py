"""One answer as it is written: the engine's tokens in, pieces of text out. Knows tokens and text, no engine.

    tokens -> text -> up to a stop string -> text, reasoning and calls of tools, told apart

One thread uses a writer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ringlm.cluster.messages import Output
from ringlm.engine.request import StopReason, TokenLogprob
from ringlm.frontend.answer import Choice, Logprob, Piece, ToolCall, ToolCallDelta

if TYPE_CHECKING:
    from ringlm.frontend.detokenizer import Detokenizer
    from ringlm.frontend.stops import StopStrings
    from ringlm.frontend.tools.parser import AnswerParser


class Text(NamedTuple):
    """How tokens become text. `stops` are looked for in what follows the first `min_tokens` tokens."""

    detokenizer: Detokenizer
    stops: StopStrings
    min_tokens: int = 0
    parser: AnswerParser | None = None


class Writer:
    """Answer number `index`. Without `text` it is token ids alone; `name` puts logprobs into words, where they are
    shown. `reason` is why it has ended; `last` the engine's last word, which may come later."""

    def __init__(self, index: int, text: Text | None, name: Callable[[TokenLogprob], Logprob] | None = None) -> None:
        self.index = index
        self.reason: StopReason | None = None
        self.last: Output | None = None
        self.count = 0  # of its tokens
        self.likelihood = 0.0  # the sum of their logprobs, where the engine tells them
        self._text = text
        self._name = name
        self._pieces: list[Piece] = []
        self._tokens: list[int] = []  # those that are in no piece yet
        self._logprobs: list[Logprob] = []

    def push(self, output: Output) -> Piece | None:
        """What the engine's news adds to the answer; None while it shows nothing."""
        if output.finish_reason is not None:
            self.last = output
        if self.reason is not None:
            return None  # a stop string has ended it, and the engine did not know yet
        text = self._read(output)
        said = self._told_apart(text)
        if self._text is not None and self.reason is None and not any(said):
            return None
        piece = Piece(
            text=said[0],
            reasoning=said[1],
            tool_calls=said[2],
            token_ids=tuple(self._tokens),
            logprobs=tuple(self._logprobs),
            finish_reason=None if self.reason is None else str(self.reason),
            index=self.index,
            reasoning_tokens=len(self._tokens) if said[1] else 0,
        )
        self._tokens.clear()
        self._logprobs.clear()
        self._pieces.append(piece)
        return piece

    def choice(self, index: int) -> Choice:
        """The whole answer, once it has ended, as number `index`."""
        whole = joined(self._pieces)
        calls = _assembled(whole.tool_calls)
        stop = None if self._text is None else self._text.stops.found
        return Choice(
            index, whole.text, whole.token_ids, str(self.reason), whole.reasoning, calls, whole.logprobs, stop
        )

    def _read(self, output: Output) -> str:
        """Take the tokens up to a stop string, and see why the answer ends, if it does. The text they complete."""
        text = []
        # The token that stopped the engine is no part of the text, special or not.
        spoken = len(output.tokens) - (output.finish_reason is StopReason.STOP)
        for place, token in enumerate(output.tokens):
            self.count += 1
            self._tokens.append(token)
            if output.logprobs:
                self.likelihood += output.logprobs[place].logprob
                if self._name is not None:
                    self._logprobs.append(self._name(output.logprobs[place]))
            if self._text is not None and place < spoken:
                more = self._text.detokenizer.push((token,))
                text.append(self._text.stops.push(more) if self.count > self._text.min_tokens else more)
                if self._text.stops.found is not None:
                    self.reason = StopReason.STOP
                    return "".join(text)
        self.reason = output.finish_reason
        if self.reason is not None and self._text is not None:
            text.append(self._text.stops.push(self._text.detokenizer.finish()) + self._text.stops.finish())
        return "".join(text)

    def _told_apart(self, text: str) -> tuple[str, str, tuple[ToolCallDelta, ...]]:
        """Text, reasoning, calls of tools. Whole calls make an answer that ended by itself one of TOOL_CALLS."""
        parser = None if self._text is None else self._text.parser
        if parser is None:
            return text, "", ()
        parts = [parser.push(text)]
        if self.reason is not None:
            parts.append(parser.finish())
            if self.reason is StopReason.STOP and parser.called:
                self.reason = StopReason.TOOL_CALLS
        calls = tuple(call for part in parts for call in part.tool_calls)
        return "".join(part.text for part in parts), "".join(part.reasoning for part in parts), calls


def joined(pieces: Sequence[Piece]) -> Piece:
    """Successive pieces of one answer as one."""
    if len(pieces) == 1:
        return pieces[0]
    return Piece(
        text="".join(piece.text for piece in pieces),
        reasoning="".join(piece.reasoning for piece in pieces),
        tool_calls=tuple(call for piece in pieces for call in piece.tool_calls),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=tuple(logprob for piece in pieces for logprob in piece.logprobs),
        finish_reason=pieces[-1].finish_reason,
        index=pieces[-1].index,
        reasoning_tokens=sum(piece.reasoning_tokens for piece in pieces),
    )


def _assembled(deltas: Sequence[ToolCallDelta]) -> tuple[ToolCall, ...]:
    """Whole calls of what came of them."""
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        before = calls.get(delta.index, ToolCall("", "", ""))
        calls[delta.index] = ToolCall(
            delta.id or before.id, delta.name or before.name, before.arguments + delta.arguments
        )
    return tuple(calls[index] for index in sorted(calls))
