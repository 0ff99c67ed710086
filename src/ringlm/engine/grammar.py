"""Answers of a prescribed shape: which tokens may come next, by llguidance. Knows tokens as bytes, and one request's
place in its grammar; no logits, and no words of whoever prescribed it. Rank 0 only, and imported once somebody asks.

A mask takes 10 to 400 us, in code without the interpreter's lock: a thread makes those of a step while the model runs.
"""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ringlm.engine.logits import Floats
from ringlm.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher

_KEPT: Final = 32  # compiled grammars: who asks for one mostly asks again
_USES: Final = 64  # of each: requests share its lexer, whose states add up until they are too many
# Of llguidance's bounds, which keep a step's part under some 20 ms, this one alone is lower, for memory.
_MAX_LEXER_STATES: Final = 50_000
_SAID: Final = 400  # characters of an error
_LISTING: Final = re.compile(r"\n\s*\d+ \| |\n<state>")  # what llguidance adds to its errors


class Grammar:
    """Where one request is in its grammar. `ended`: an end-of-sequence token has been taken; `complete`: nothing else
    can follow; `error`: why it cannot go on."""

    def __init__(self, matcher: LLMatcher, ends: Collection[int], vocabulary: int) -> None:
        self.ended = self.complete = False
        self.error: str | None = None
        self._matcher = matcher
        self._ends = ends
        self._vocabulary = vocabulary
        self._new: int | None = None  # a token that the matcher has not been told
        self._mask: NDArray[np.uint32] = np.empty(0, np.uint32)  # of the next token, a bit each

    def add(self, token: int) -> None:
        """The request has got `token`."""
        self._new = token
        self.ended = token in self._ends

    def masked(self, row: Floats) -> Floats:
        """Logits (V,), with -inf for what must not come next; after `Masks.made` for this step."""
        allowed = np.unpackbits(self._mask.view(np.uint8), count=self._vocabulary, bitorder="little")
        return np.where(allowed, row, np.float32(-np.inf))


class Grammars:
    """Compiles grammars over `tokens`, the bytes of every token of a model; those of `special` ones are their names,
    which no text of a grammar means. `ends` are end-of-sequence tokens, which are allowed where an answer may end."""

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], ends: Collection[int]) -> None:
        from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper

        if not ends:
            raise RequestError("The model has no end-of-sequence token, so no grammar can end its answers.")
        described = TokenizerWrapper(_Described(tokens, special, min(ends)))
        self._tokenizer = LLTokenizer(described, eos_token=sorted(ends))
        self._limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        self._ends = frozenset(ends)
        self._compiled: OrderedDict[str, tuple[LLMatcher, int]] = OrderedDict()  # with how often it may be used yet

    def compile(self, text: str) -> Grammar:
        """The beginning of `text`, a grammar as llguidance reads it. RequestError for one that it cannot use. For one
        thread at a time."""
        from llguidance import LLMatcher

        matcher, uses = self._compiled.pop(text, (None, 0))
        if matcher is None or not uses:
            matcher, uses = LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits), _USES
            if matcher.is_error():
                raise RequestError(f"An answer of that shape cannot be enforced: {_reason(matcher)}.")
        self._compiled[text] = matcher, uses - 1
        if len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        return Grammar(matcher.deep_copy(), self._ends, self._tokenizer.vocab_size)


class Masks:
    """Makes the masks of each step, several at once where there are several. `close` ends its threads."""

    def __init__(self) -> None:
        from llguidance import LLExecutor

        self._executor = LLExecutor()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ringlm-masks")

    @contextlib.contextmanager
    def made(self, grammars: Sequence[Grammar]) -> Iterator[None]:
        """The masks are made while the block runs, and are there after it."""
        making = self._thread.submit(self._make, grammars)
        try:
            yield
        finally:
            making.result()  # llguidance bounds how long that takes

    def close(self) -> None:
        self._thread.shutdown()

    def _make(self, grammars: Sequence[Grammar]) -> None:
        late = [(one._matcher, one._new) for one in grammars if one._new is not None]
        if late:
            self._executor.consume_token_par(late)
        masks = np.empty((len(grammars), -(-grammars[0]._vocabulary // 32)), np.uint32)
        places = [(one._matcher, index) for index, one in enumerate(grammars)]
        self._executor.unsafe_compute_mask_ptr(places, masks.ctypes.data, masks.strides[0], len(masks))
        for one, mask in zip(grammars, masks, strict=True):
            one._new, one._mask = None, mask
            one.complete = one._matcher.is_stopped()
            if one._matcher.is_error():
                one.error = _reason(one._matcher)


class _Described:
    """A tokenizer as llguidance wants it described. It never tokenizes here, as grammars say `no_forcing`."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], end: int) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, end

    def __call__(self, text: bytes) -> list[int]:
        return []


def _reason(matcher: LLMatcher) -> str:
    said = " ".join(_LISTING.split(matcher.get_error())[0].split())
    return said.rstrip(".") if len(said) <= _SAID else f"{said[:_SAID]} …"
