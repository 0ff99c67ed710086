"""Whether ranks have memory for what they would hold: each by itself, and those that share a machine together."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ringlm.cluster import memory
from ringlm.cluster.agreement import Capabilities, Refused, decide_together, propose
from ringlm.cluster.memory import Memory, fits, free_blocks, host_memory, refuse_unfit
from ringlm.cluster.settings import Settings
from ringlm.errors import ConfigError
from ringlm.models.sizes import Holding
from ringlm.parallel.communicator import Communicator
from ringlm.weights import open_model
from tests.cluster.rings import process_ring
from tests.parallel.local import run_ranks
from tests.tiny import save_llama

GB = 10**9
RANKS = [Holding(4 * GB, GB // 2), Holding(2 * GB, GB // 4)]
APART = [Memory("a", 6 * GB), Memory("b", 6 * GB)]
TOGETHER = [Memory("a", 8 * GB), Memory("a", 8 * GB)]


def test_blocks_for_which_all_have_memory() -> None:
    """A tenth of what the weights leave is for computing."""
    assert free_blocks(RANKS, APART) == 3
    assert free_blocks(RANKS, TOGETHER) == 2
    assert free_blocks(RANKS, [Memory("a", 3 * GB), APART[1]]) < 0
    assert free_blocks([Holding(4 * GB, 0), RANKS[1]], APART) == 14  # a rank without heads


def test_each_rank_by_itself_and_those_of_a_machine_together() -> None:
    assert fits(RANKS, APART, 4) == [True, True]
    assert fits(RANKS, APART, 5) == [False, True]
    assert fits(RANKS, TOGETHER, 2) == [True, True]
    assert fits(RANKS, TOGETHER, 3) == [False, False]


def test_a_rank_that_joins_late_has_seen_the_memory_that_others_took() -> None:
    assert fits(RANKS, [TOGETHER[0], Memory("a", GB)], 2) == [True, True]


def test_a_refusal_shows_the_arithmetic() -> None:
    refuse_unfit(RANKS, APART, blocks=4, quant="none")
    with pytest.raises(ConfigError) as apart:
        refuse_unfit(RANKS, APART, blocks=5, quant="none")
    assert str(apart.value) == (
        "rank 0 needs 6.50 GB (weights 4.00 GB, cache 2.50 GB for 320 tokens), and 6.00 GB are free there. "
        "Take a smaller --context, --quant int4, another --split, or one more machine."
    )
    with pytest.raises(ConfigError) as together:
        refuse_unfit(RANKS, TOGETHER, blocks=3, quant="int4")
    assert "ranks 0 and 1 share their memory and need 8.25 GB (weights 6.00 GB, cache 2.25 GB" in str(together.value)
    assert "int4" not in str(together.value)


def capable(rank: int, free: int, **settings: object) -> Capabilities:
    return Capabilities(rank, "cpu", ["float32"], Settings(**settings), Memory(str(rank), free))


def test_a_cache_takes_no_more_than_there_is_and_holds_a_sequence_at_least(tiny_llama: Path) -> None:
    files = open_model(tiny_llama)

    def blocks(free: int, **settings: int) -> int | None:
        return propose([capable(0, GB, **settings), capable(1, free)], files).settings.blocks

    plenty = propose([capable(0, GB), capable(1, GB)], files)
    assert (plenty.settings.max_seqs, plenty.settings.blocks) == (16, 16 * 4096 // 64)
    assert blocks(GB, max_seqs=3, context=65) == 3 * 2
    weights, block, _ = plenty.holdings[1]
    assert blocks(weights + 100 * block * 10 // 9 + 10) == 100
    assert blocks(10) == 64


def test_all_ranks_are_refused_in_the_same_words(tiny_llama: Path) -> None:
    files = open_model(tiny_llama)
    words = []

    def rank(comm: Communicator) -> None:
        with pytest.raises(Refused) as error:
            decide_together(comm, files, capable(comm.rank, 10_000 if comm.rank else GB))
        words.append(str(error.value))

    run_ranks(2, rank)
    assert words[0] == words[1]
    assert words[0].startswith("rank 1 needs 0.")


@pytest.mark.parametrize(("others", "led"), [("a", False), ("b", True)])
def test_rank_0_leads_where_hardware_differs(tiny_llama: Path, others: str, led: bool) -> None:
    files = open_model(tiny_llama)

    def rank(comm: Communicator) -> bool:
        mine = msgspec.structs.replace(capable(comm.rank, GB), hardware=others if comm.rank else "a")
        return decide_together(comm, files, mine).led

    assert run_ranks(3, rank) == [led] * 3


def test_a_ring_that_does_not_fit_is_refused_before_it_loads(tmp_path: Path) -> None:
    patient = {"max_position_embeddings": 1 << 24, "head_dim": 64, "num_key_value_heads": 9, "num_hidden_layers": 12}
    folder = save_llama(tmp_path / "patient", **patient)
    with (
        pytest.raises(ConfigError, match="ranks 0 and 1 share their memory and need"),
        process_ring(str(folder), 2, tmp_path, settings=Settings(context=1 << 24)) as ring,
    ):
        pytest.fail(f"{ring} has loaded")


def test_control_groups_limit_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = host_memory().free
    assert whole > 0
    for folder, limit, used in ((tmp_path, "max", 0), (tmp_path / "box", 5000, 3000), (tmp_path / "box/me", 9000, 900)):
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 7\ninactive_file 500\n")
    groups = tmp_path / "groups"
    groups.write_text("0::/box/me\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_GROUPS", groups)
    assert host_memory().free == 5000 - 3000 + 500
    inside = host_memory().pool
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("4000")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("3900")
    (tmp_path / "memory/memory.stat").write_text("total_inactive_file 11\n")
    groups.write_text("4:memory:/elsewhere\n1:cpu:/\n0::/\n")  # the older kind, seen from within a container
    assert host_memory().free == 111
    assert host_memory().pool != inside  # another container of this machine
    groups.unlink()
    assert host_memory().free > 5000
