"""The real SmolLM2 tokenizer, in a cache of the tests' own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringlm.frontend.model import Model
from ringlm.frontend.tokenizer import Tokenizer


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Caches, history and environment of the tests, not of who runs them."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        for name in [name for name in os.environ if name.startswith("RING_")]:
            patch.delenv(name)
        yield folder


@pytest.fixture(scope="session")
def demo(demo_gguf: Path) -> Model:
    return Model(demo_gguf, "gguf")


@pytest.fixture(scope="session")
def tokenizer(home: Path, demo: Model) -> Tokenizer:
    found = Tokenizer.open(demo)
    assert found is not None
    return found
