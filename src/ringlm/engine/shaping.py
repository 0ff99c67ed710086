"""What a request does to its logits before the temperature: masks, biases, penalties. Knows one request's tokens, no
distributions.

The order is vLLM's: bad tokens and early ends are masked, biases added, repetition, frequency and presence penalized
(Keskar et al., "CTRL", 2019, and OpenAI's API). Each step gives what transformers' logits processors give.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from ringlm.engine.logits import Floats
from ringlm.engine.request import SamplingParams
from ringlm.errors import RequestError


class Occurrences:
    """How often each token has occurred, kept as tokens come. `listed` counts as there, but as never written."""

    def __init__(self, listed: Collection[int] = ()) -> None:
        self._slots = {token: slot for slot, token in enumerate(dict.fromkeys(listed))}
        self._ids = np.array(list(self._slots), np.intp)  # with room at the end
        self._counts = np.zeros(len(self._ids), np.float32)

    def add(self, token: int) -> None:
        """`token` has been written once more."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            room = max(64, slot)
            self._ids = np.concatenate([self._ids, np.zeros(room, np.intp)])
            self._counts = np.concatenate([self._counts, np.zeros(room, np.float32)])
        self._ids[slot] = token
        self._counts[slot] += 1

    def arrays(self) -> tuple[NDArray[np.intp], Floats]:
        """The distinct tokens (D,), and how often each was written (D,)."""
        return self._ids[: len(self._slots)], self._counts[: len(self._slots)]


class Shaping:
    """One request's parameters, made ready, and its tokens' counts. Preemption changes nothing here."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], stop_ids: Collection[int], vocabulary: int
    ) -> None:
        self._params = params
        self._ends = [token for token in stop_ids if 0 <= token < vocabulary] if params.min_tokens else []
        self._free = len(prompt) + params.min_tokens  # from this length on it may end
        self._bad = [int(ids[0]) for ids in params.bad_token_ids if len(ids) == 1]
        self._bad_after = [(list(ids[:-1]), ids[-1]) for ids in params.bad_token_ids if len(ids) > 1]
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.intp)
        self._biases = np.fromiter(params.logit_bias.values(), np.float32)
        self._occurrences: Occurrences | None = None
        if params.repetition_penalty != 1.0:
            self._occurrences = Occurrences(prompt)
        elif params.presence_penalty or params.frequency_penalty:
            self._occurrences = Occurrences()

    @classmethod
    def of(
        cls, params: SamplingParams, prompt: Sequence[int], stop_ids: Collection[int], vocabulary: int
    ) -> Shaping | None:
        """What `params` do to the logits of a request that ends with `stop_ids`; None if nothing.

        Raises RequestError for token ids that the model does not have.
        """
        bad = [token for ids in params.bad_token_ids for token in ids]
        for name, tokens in (("logit_bias", list(params.logit_bias)), ("bad_token_ids", bad)):
            wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
            if wrong is not None:
                raise RequestError(f"{name} has token {wrong}; token ids of this model are 0 to {vocabulary - 1}.")
        shaping = cls(params, prompt, stop_ids, vocabulary)
        return None if shaping.only_masks and not (bad or shaping._ends) else shaping

    @property
    def only_masks(self) -> bool:
        """Whether nothing but masking is done, so that the best logits suffice where there are enough of them."""
        return self._occurrences is None and not self._bias_ids.size

    def add(self, token: int) -> None:
        """The request has got `token`."""
        if self._occurrences is not None:
            self._occurrences.add(token)

    def masked(self, tokens: list[int]) -> list[int]:
        """The ids that must not follow `tokens`, the prompt's included; one may be there twice."""
        found = self._bad + [last for before, last in self._bad_after if tokens[-len(before) :] == before]
        return found + self._ends if len(tokens) < self._free else found

    def apply(self, row: Floats, tokens: list[int], ids: NDArray[np.int32] | None) -> Floats:
        """`row` as it counts after `tokens`, copied: logits (V,), or where it only masks (k,) of the tokens `ids`."""
        row = row.copy()
        masked = self.masked(tokens)
        if masked:
            row[masked if ids is None else np.isin(ids, masked)] = -np.inf
        if self._bias_ids.size:
            row[self._bias_ids] += self._biases
        if self._occurrences is not None:
            self._penalize(row, *self._occurrences.arrays())
        return row

    def masking(self, tokens: list[int]) -> list[str]:
        """The names of the parameters that mask what must not follow `tokens`."""
        names = ["bad_token_ids"] if self._bad or self._bad_after else []
        return [*names, "min_tokens"] if self._ends and len(tokens) < self._free else names

    def _penalize(self, row: Floats, ids: NDArray[np.intp], counts: Floats) -> None:
        params, values = self._params, row[ids]
        if params.repetition_penalty != 1.0:
            factor = params.repetition_penalty
            values = np.where(values > 0.0, values / factor, values * factor)
        values -= params.frequency_penalty * counts
        values -= params.presence_penalty * (counts > 0)
        row[ids] = values
