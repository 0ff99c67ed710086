"""What comes later, for threads and for event loops. Knows nothing of what it is."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Generator
from typing import Any, TypeVar

_T = TypeVar("_T")


class Reply(concurrent.futures.Future[_T]):
    """A Future for which any number of threads (`result`) and coroutines (`await`) may wait; none can cancel it."""

    def __init__(self) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()

    def __await__(self) -> Generator[Any, None, _T]:
        return asyncio.wrap_future(self).__await__()
