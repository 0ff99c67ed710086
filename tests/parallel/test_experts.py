"""The mixture layer alone: against transformers' blocks, split over ranks, and reading only what is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ringlm.parallel.communicator import Alone, Communicator
from ringlm.parallel.experts import Expert, Experts, MixtureOfExperts, Router, Routes
from ringlm.parallel.linear import Dense
from ringlm.parallel.packed import PackedMatrix, Segment, Workspace
from ringlm.parallel.packed_experts import PackedExperts
from ringlm.parallel.prologue import Gate, RmsNorm
from ringlm.weights.packed import BLOCK, Packed, quantize, unpack
from tests.parallel.local import run_ranks

HIDDEN, COLUMNS, EXPERTS = 72, 50, 7
CPU = torch.device("cpu")
SILU = Gate()


def weights(seed: int = 0, experts: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    """A router (experts, HIDDEN), gates and ups (experts, 2 * COLUMNS, HIDDEN), downs (experts, HIDDEN, COLUMNS)."""
    torch.manual_seed(seed)
    shapes = (experts, HIDDEN), (experts, 2 * COLUMNS, HIDDEN), (experts, HIDDEN, COLUMNS)
    return tuple(torch.randn(shape) * 0.2 for shape in shapes)  # type: ignore[return-value]


def reference(kind: str, chosen: int, normalized: bool) -> Any:
    """transformers' block with those weights."""
    from transformers.models.mixtral import modeling_mixtral as mixtral
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "num_experts_per_tok": chosen, "num_local_experts": EXPERTS}
    if kind == "mixtral":
        block: Any = mixtral.MixtralSparseMoeBlock(mixtral.MixtralConfig(intermediate_size=COLUMNS, **sizes))
    else:
        sizes |= {"moe_intermediate_size": COLUMNS, "norm_topk_prob": normalized}
        block = qwen3_moe.Qwen3MoeSparseMoeBlock(qwen3_moe.Qwen3MoeConfig(**sizes))
    router, gate_up, down = weights()
    block.load_state_dict({"gate.weight": router, "experts.gate_up_proj": gate_up, "experts.down_proj": down})
    return block


def cut(gate_up: Tensor, down: Tensor, columns: slice) -> list[Expert]:
    """Every expert's part with those columns."""
    halves = gate_up.unflatten(1, (2, COLUMNS))[:, :, columns].flatten(1, 2)
    return [Expert(Dense(up), Dense(out)) for up, out in zip(halves, down[:, :, columns], strict=True)]


def packed_experts(
    gate_up: Tensor, down: Tensor, bits: int, unpack_from: int = 1 << 30, gate: Gate = SILU
) -> PackedExperts:
    """All of them, packed, of which `unpack_from` tokens and more go by unpacking."""
    workspace = Workspace(unpack_from)

    def pack(weight: Tensor) -> PackedMatrix:
        rows = quantize(weight, bits)
        segment = Segment(rows, len(weight), CPU)
        if weight.numel():
            segment.fill(0, rows)
        return PackedMatrix([segment], weight.shape[1], 0, torch.float32, workspace)

    return PackedExperts([Expert(pack(up), pack(out)) for up, out in zip(gate_up, down, strict=True)], gate, workspace)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize(
    ("kind", "chosen", "normalized"),
    [("qwen3", 3, False), ("qwen3", 2, True), ("qwen3", 7, True), ("mixtral", 2, True)],
)
def test_a_mixture_is_transformers_block(
    kind: str, chosen: int, normalized: bool, tokens: int, world_size: int
) -> None:
    router, gate_up, down = weights()
    norm = RmsNorm(torch.rand(HIDDEN) + 0.5, 1e-6)
    residual = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
    with torch.inference_mode():
        expected = residual + reference(kind, chosen, normalized)(norm(residual)[None])[0]

    def rank(comm: Communicator) -> Tensor:
        columns = slice(COLUMNS * comm.rank // world_size, COLUMNS * (comm.rank + 1) // world_size)
        experts = Experts(cut(gate_up, down, columns), SILU)
        found = residual.clone()
        MixtureOfExperts(norm, Router(Dense(router), chosen, normalized), experts, comm, led=False).add_to(found)
        assert world_size == 1 or dict(comm.calls) == {"all_reduce": 1}  # type: ignore[attr-defined]
        return found

    for found in run_ranks(world_size, rank):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_where_ranks_differ_all_follow_the_choice_of_rank_0() -> None:
    router, gate_up, down = weights()
    norm = RmsNorm(torch.ones(HIDDEN), 1e-6)
    residual = torch.randn(5, HIDDEN)

    def rank(comm: Communicator) -> tuple[Tensor, Tensor]:
        own = router.roll(comm.rank, 0)  # another opinion on every rank
        experts = Experts(cut(gate_up, down, slice(25 * comm.rank, 25 * comm.rank + 25)), SILU)
        found = residual.clone()
        MixtureOfExperts(norm, Router(Dense(own), 2, True), experts, comm, led=True).add_to(found)
        return found

    expected = residual.clone()
    whole = Experts(cut(gate_up, down, slice(0, COLUMNS)), SILU)
    MixtureOfExperts(norm, Router(Dense(router), 2, True), whole, Alone(), led=True).add_to(expected)
    for found in run_ranks(2, rank):
        torch.testing.assert_close(found, expected)


class Counting:
    """A storage that tells how many products were made of it, and of how many tokens."""

    def __init__(self, weight: Tensor) -> None:
        self.dense, self.tokens = Dense(weight), list[int]()

    nbytes = 0

    def __call__(self, x: Tensor, bias: Any = None, prologue: Any = None) -> Tensor:
        self.tokens.append(len(x))
        return self.dense(x, bias, prologue)

    def rows(self, indices: Tensor) -> Tensor:
        raise NotImplementedError


def test_an_expert_takes_all_its_tokens_at_once_and_the_others_are_not_touched() -> None:
    _, gate_up, down = weights()
    experts = [Expert(Counting(up), Counting(out)) for up, out in zip(gate_up, down, strict=True)]
    routes = Routes(torch.rand(4, 2), torch.tensor([[3, 1], [3, 6], [1, 3], [6, 3]]))
    Experts(experts, SILU)(torch.randn(4, HIDDEN), routes)
    expected = [[], [2], [], [4], [], [], [2]]
    assert [expert.gate_up.tokens for expert in experts] == expected  # type: ignore[attr-defined]
    assert [expert.down.tokens for expert in experts] == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize("unpack_from", [1 << 30, 0])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("tokens", "gate"), [(1, SILU), (2, Gate(gelu=True)), (3, SILU), (9, SILU)])
def test_packed_experts_are_near_the_weights_that_they_hold(
    bits: int, tokens: int, gate: Gate, unpack_from: int
) -> None:
    router, gate_up, down = weights(1)
    x = torch.randn(tokens, HIDDEN)
    routes = Router(Dense(router), 3, True)(x)
    held = [unpack(quantize(part.flatten(0, 1), bits))[:, : part.shape[2]].view(part.shape) for part in (gate_up, down)]
    exact = Experts(cut(*held, slice(0, COLUMNS)), gate)(x, routes)
    found = packed_experts(gate_up, down, bits, unpack_from, gate)(x, routes)
    assert ((found - exact).norm() / exact.norm()).item() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize(("chosen", "normalized"), [(3, True), (3, False), (EXPERTS, True)])
def test_packed_experts_norm_and_route_as_the_parts_do(
    chosen: int, normalized: bool, tokens: int, dtype: torch.dtype
) -> None:
    router, gate_up, down = weights(5)
    norm = RmsNorm((torch.rand(HIDDEN) + 0.5).to(dtype), 1e-6)
    route = Router(Dense(router.to(dtype)), chosen, normalized)
    residual = torch.randn(tokens, HIDDEN)
    experts = packed_experts(gate_up, down, 4)
    found = experts.of_norm(norm, route, residual)
    x = norm(residual)
    parts = experts(x, route(x))
    assert ((found - parts).norm() / parts.norm()).item() < 0.02  # in bfloat16 the parts round the scores
    each = torch.cat([experts.of_norm(norm, route, row[None]) for row in residual])
    assert torch.equal(found, each)  # whatever is computed beside it


def test_of_equal_scores_packed_experts_take_the_first() -> None:
    _, gate_up, down = weights(6)
    norm, route = RmsNorm(torch.ones(HIDDEN), 1e-6), Router(Dense(torch.zeros(EXPERTS, HIDDEN)), 2, True)
    residual, experts = torch.randn(3, HIDDEN), packed_experts(gate_up, down, 4)
    expected = experts(norm(residual), Routes(torch.full((3, 2), 0.5), torch.tensor([[0, 1]] * 3)))
    torch.testing.assert_close(experts.of_norm(norm, route, residual), expected)


def test_threads_find_what_one_finds() -> None:
    router, gate_up, down = weights(2)
    x = torch.randn(6, HIDDEN)
    routes = Router(Dense(router), 3, False)(x)
    experts = packed_experts(gate_up, down, 4)
    alone = experts(x, routes)
    experts._threads = 3
    assert torch.equal(experts(x, routes), alone)


def test_gates_and_ups_may_be_packed_in_different_forms() -> None:
    router, gate_up, down = weights(3)
    x = torch.randn(5, HIDDEN)
    routes = Router(Dense(router), 2, True)(x)
    workspace = Workspace()

    def segment(rows: Packed) -> Segment:
        made = Segment(rows, len(rows.codes), CPU)
        made.fill(0, rows)
        return made

    experts, exact = [], []
    for up, out in zip(gate_up, down, strict=True):
        parts = quantize(up[:COLUMNS], 8), quantize(up[COLUMNS:], 4)
        last = quantize(out, 8)
        experts.append(
            Expert(
                PackedMatrix([segment(part) for part in parts], HIDDEN, 0, torch.float32, workspace),
                PackedMatrix([segment(last)], COLUMNS, 0, torch.float32, workspace),
            )
        )
        held = torch.cat([unpack(part) for part in parts])[:, :HIDDEN].contiguous()
        exact.append(Expert(Dense(held), Dense(unpack(last)[:, :COLUMNS].contiguous())))
    found, expected = PackedExperts(experts, SILU, workspace)(x, routes), Experts(exact, SILU)(x, routes)
    assert ((found - expected).norm() / expected.norm()).item() < 0.02


def test_packed_experts_that_are_not_chosen_are_not_read() -> None:
    _, gate_up, down = weights(4)
    routes = Routes(torch.ones(3, 1), torch.tensor([[2], [5], [2]]))
    whole = packed_experts(gate_up, down, 4)
    x = torch.randn(3, HIDDEN)
    expected = whole(x, routes)
    for index in set(range(EXPERTS)) - {2, 5}:
        for matrix in whole.experts[index]:
            matrix._segments[0].scales.fill_(torch.nan)  # type: ignore[attr-defined]
    assert torch.equal(whole(x, routes), expected)


def test_a_rank_without_columns_adds_nothing() -> None:
    router, gate_up, down = weights()
    x = torch.randn(3, HIDDEN)
    routes = Router(Dense(router), 2, True)(x)
    assert HIDDEN % BLOCK  # and a last block that is not full
    for experts in (Experts(cut(gate_up, down, slice(4, 4)), SILU), packed_experts(gate_up[:, :0], down[:, :, :0], 4)):
        assert torch.equal(experts(x, routes), torch.zeros(3, HIDDEN))
