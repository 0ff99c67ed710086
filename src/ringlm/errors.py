"""Every error that ringlm raises on purpose.

    RingLMError
    ├── ConfigError              a setting is missing, wrong, or contradicts another
    ├── ModelError               a model's files are missing, damaged or not understood
    ├── RequestError             a request asks for what cannot be done
    │   └── QueueFullError       too many wait before it
    └── RingError                something between the ranks went wrong
        ├── ConnectError         the ring could not be formed
        ├── AuthenticationError  a peer does not hold the same secret
        ├── PeerLostError        a rank died, stopped or was cut off (`.rank` names it)
        ├── CollectiveTimeoutError  a peer did not take part in time (`.rank` names it)
        └── DesyncError          ranks called different collectives (`.rank` names the other)

A message says what happened, to which rank or file, and what to do. `exit_status` is what the
command line exits with: 2 for a mistake of the user's, 1 for a failure of the system.
"""

from __future__ import annotations

from typing import ClassVar


class RingLMError(Exception):
    """Base of every error raised on purpose."""

    exit_status: ClassVar[int] = 1

    @property
    def kind(self) -> str:
        """The name of the error of this module that it is, or is a special case of."""
        return next(kind.__name__ for kind in type(self).__mro__ if kind.__module__ == __name__)


class ConfigError(RingLMError):
    """A setting is missing, wrong, or contradicts another; both places are named."""

    exit_status = 2


class ModelError(RingLMError):
    """A model's files are missing, damaged or not understood; file and tensor are named."""

    exit_status = 2


class RequestError(RingLMError):
    """A request asks for what cannot be done, such as a prompt longer than the context."""

    exit_status = 2


class QueueFullError(RequestError):
    """As many requests wait as may; the same one may do later."""


class RingError(RingLMError):
    """Something between the ranks went wrong."""


class ConnectError(RingError):
    """The ring could not be formed: unreachable, refused, or mismatched peers."""


class AuthenticationError(RingError):
    """A peer does not hold the same secret."""

    exit_status = 2


class PeerError(RingError):
    """A `RingError` that one peer caused. `rank` is that peer's."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class PeerLostError(PeerError):
    """A rank died, stopped or was cut off."""


class CollectiveTimeoutError(PeerError):
    """A peer is connected but did not take part in a collective in time."""


class DesyncError(PeerError):
    """Ranks called different collectives, or the same one with different sizes or dtypes."""


def unforeseen(what: str, error: Exception) -> RingLMError:
    """The error that ends `what` because of a bug, for those who wait elsewhere; `error` is its cause."""
    known = RingLMError(f"{what} has ended by a mistake of ringlm's own: {type(error).__name__}: {error}")
    known.__cause__ = error
    return known
