"""Settings come from rank 0; a daemon that was told otherwise is refused, both named."""

from __future__ import annotations

import msgspec
import pytest

from ringlm.cluster.agreement import Capabilities, agree, fast_dtypes, told
from ringlm.cluster.local import local_ring
from ringlm.cluster.memory import Memory
from ringlm.cluster.settings import Settings
from ringlm.errors import ConfigError, DesyncError


def rank(number: int, dtypes: tuple[str, ...] = ("float32",), **settings: object) -> Capabilities:
    return Capabilities(number, "cpu", list(dtypes), Settings(**settings), Memory("here", 1 << 40))


def test_dtype_auto_is_the_best_that_all_ranks_can_do() -> None:
    fast = ("bfloat16", "float16", "float32")
    assert agree([rank(0, fast), rank(1, fast)], 4096).dtype == "bfloat16"
    assert agree([rank(0, fast), rank(1, ("float16", "float32"))], 4096).dtype == "float16"
    assert agree([rank(0, fast), rank(1)], 4096).dtype == "float32"


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_packed_weights_are_for_bfloat16_on_cuda_and_for_float32_beside_a_cpu(quant: str) -> None:
    cuda, mps, cpu = (fast_dtypes(kind, quant) for kind in ("cuda", "mps", "cpu"))
    assert agree([rank(0, tuple(cuda)), rank(1, tuple(cuda))], 4096).dtype == "bfloat16"
    assert agree([rank(0, tuple(cuda)), rank(1, tuple(mps))], 4096).dtype == "float16"
    assert agree([rank(0, tuple(cuda)), rank(1, tuple(cpu))], 4096).dtype == "float32"


def test_what_rank_0_was_told_holds_for_all() -> None:
    settings = agree([rank(0, dtype="bfloat16", context=100), rank(1)], 4096)
    assert (settings.dtype, settings.context) == ("bfloat16", 100)


@pytest.mark.parametrize(
    ("daemon", "named"),
    [({"dtype": "float16"}, "dtype float16"), ({"context": 64}, "context 64"), ({"split": (1.0, 2.0)}, "split")],
)
def test_a_daemon_told_otherwise_is_refused(daemon: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=f"rank 1 was started with {named}"):
        agree([rank(0), rank(1, **daemon)], 4096)


def test_the_same_on_both_is_no_contradiction() -> None:
    assert agree([rank(0, context=64), rank(1, context=64)], 4096).context == 64


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="--context 5000 is more than the 4096"):
        agree([rank(0, context=5000)], 4096)


def test_a_split_has_one_weight_a_rank() -> None:
    with pytest.raises(ConfigError, match="2 weights for world size 1"):
        agree([rank(0, split=(1.0, 1.0))], 4096)


@pytest.mark.parametrize("settings", [{"dtype": "float8"}, {"quant": "int5"}, {"context": 0}, {"split": (0.0,)}])
def test_impossible_settings_are_refused_at_once(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Settings(**settings)


def test_the_backend_is_agreed_on_as_other_settings_are() -> None:
    assert agree([rank(0, backend="gloo"), rank(1)], 4096).backend == "gloo"
    with pytest.raises(ConfigError, match="rank 1 was started with backend gloo and rank 0 with ring"):
        agree([rank(0), rank(1, backend="gloo")], 4096)


def test_nccl_is_for_cuda_on_every_rank() -> None:
    cuda = [msgspec.structs.replace(rank(number, backend="nccl"), device="cuda") for number in range(2)]
    assert agree(cuda, 4096).backend == "nccl"
    with pytest.raises(ConfigError, match="nccl needs CUDA on every rank, and rank 1 computes on cpu"):
        agree([cuda[0], rank(1)], 4096)
    with pytest.raises(ConfigError, match="rank 0 computes on cpu"):
        agree([rank(0, backend="nccl")], 4096)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x91\xa4\xff\xff\xff\xff", msgspec.msgpack.encode(["rank", 1])])
def test_what_is_no_word_of_a_rank_names_it(data: bytes) -> None:
    with pytest.raises(DesyncError, match=r"rank 3 sent \d+ bytes that are no Capabilities") as caught:
        told(data, Capabilities, 3)
    assert caught.value.rank == 3


def test_a_local_ring_is_sealed_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [ring.seal for ring in local_ring(2)] == [None, None]
    monkeypatch.setenv("RING_SEAL", "auth")
    assert [ring.seal for ring in local_ring(2)] == ["auth", "auth"]
    monkeypatch.setenv("RING_SEAL", "loudly")
    with pytest.raises(ConfigError, match="RING_SEAL"):
        local_ring(2)
