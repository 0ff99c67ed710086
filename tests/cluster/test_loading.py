"""What a rank keeps from one ring to the next, and what it loads again."""

from __future__ import annotations

import weakref
from pathlib import Path

import msgspec

from ringlm.cluster.loading import Loader
from ringlm.cluster.settings import Settings
from ringlm.cluster.spec import EngineSpec

SETTINGS = Settings(dtype="float32", context=256, max_seqs=2)


def test_a_shard_that_is_loaded_is_kept_and_its_cache_is_not(tiny_llama: Path) -> None:
    loader = Loader(EngineSpec(model=str(tiny_llama), settings=SETTINGS, threads=1, rejoin_timeout_s=7.0))
    first = loader.load(None, SETTINGS)
    assert first.rejoin_timeout_s == 7.0
    again = loader.load(None, SETTINGS, epoch=3)
    assert again.runner.model is first.runner.model
    assert again.runner.cache is not first.runner.cache
    assert again.ready.epoch == 3


def test_another_shard_is_loaded_once_the_last_is_gone(tiny_llama: Path) -> None:
    loader = Loader(EngineSpec(model=str(tiny_llama), settings=SETTINGS, threads=1))
    first = weakref.ref(loader.load(None, SETTINGS).runner.model)
    there: list[bool] = []
    wider = msgspec.structs.replace(SETTINGS, context=512)
    loaded = loader.load(None, wider, on_progress=lambda done, total: there.append(first() is not None))
    assert loaded.runner.model.config.context == 512
    assert there
    assert not any(there)
