"""`ringlm` with an engine that repeats what it is asked, slowly: for tests in real terminals, and for looking.

python -m tests.frontend.fake_cli run -m demo -i
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from unittest import mock

from ringlm.cluster.messages import Progress
from ringlm.cluster.spec import EngineSpec
from ringlm.errors import PeerLostError
from ringlm.frontend.cli import main
from ringlm.frontend.model import resolve
from ringlm.frontend.tokenizer import Tokenizer
from tests.frontend.fake import EOS, FakeEngine


def start(spec: EngineSpec, on_progress: Callable[[Progress], None] | None = None) -> FakeEngine:
    def answer(prompt: list[int]) -> list[int]:
        tokenizer = Tokenizer.open(resolve("demo"))
        assert tokenizer is not None
        said = tokenizer.decode(prompt).rsplit("user\n")[-1].removesuffix("\nassistant\n")
        return [*tokenizer.encode(f"You said: {said}"), EOS]

    if on_progress is not None:
        on_progress(Progress("connect"))
        time.sleep(float(os.environ.get("FAKE_LOAD_S", "0")) / 3)
    for done in range(0, 101, 20):
        if on_progress is not None:
            on_progress(Progress("load", done * 1_000_000, 100_000_000))
            time.sleep(float(os.environ.get("FAKE_LOAD_S", "0")) / 6)
    fail_after = os.environ.get("FAKE_FAIL_AFTER")
    return FakeEngine(
        answer,
        delay_s=float(os.environ.get("FAKE_DELAY_S", "0")),
        context=256,
        fail_after=None if fail_after is None else int(fail_after),
        failure=PeerLostError("rank 1 is lost.", 1),
    )


if __name__ == "__main__":
    with (
        mock.patch("ringlm.cluster.client.EngineClient.start", start),
        mock.patch("ringlm.frontend.server.lifecycle.HEAD_S", float(os.environ.get("FAKE_HEAD_S", "30"))),
    ):
        sys.exit(main())
