"""The order of machines in a ring by what their links can do: with made-up links."""

from __future__ import annotations

import itertools
import random

import pytest

from ringlm.cluster.ordering import Pair, best_order, hop_s, ordered, turns
from ringlm.ring.gauge import Reading
from ringlm.ring.handshake import Place
from tests.cluster.test_seating import member

FAST, SLOW = 0.001, 0.1


def costs(nodes: int, slow: set[tuple[int, int]]) -> list[list[float]]:
    pairs = slow | {(other, one) for one, other in slow}
    return [[0.0 if i == j else SLOW if (i, j) in pairs else FAST for j in range(nodes)] for i in range(nodes)]


def slowest(order: list[int], of: list[list[float]]) -> float:
    return max(of[one][other] for one, other in itertools.pairwise(order))


def test_alike_links_leave_the_order_of_joining() -> None:
    assert best_order(costs(5, set())) == [0, 1, 2, 3, 4]
    dice = random.Random(1)
    noisy = [[FAST * dice.uniform(1.0, 1.4) for _ in range(5)] for _ in range(5)]
    assert best_order(noisy) == [0, 1, 2, 3, 4]


def test_neighbours_do_not_meet_over_a_slow_link() -> None:
    assert best_order(costs(3, {(0, 1)})) == [0, 2, 1]
    assert best_order(costs(3, {(1, 2)})) == [0, 1, 2]  # it cannot be avoided: rank 0 stays at the end
    assert slowest(best_order(costs(4, {(1, 2), (2, 3), (0, 3)})), costs(4, {(1, 2), (2, 3), (0, 3)})) == SLOW
    assert best_order(costs(4, {(0, 1), (2, 3)})) == [0, 2, 1, 3]


@pytest.mark.parametrize("nodes", [9, 16, 24])
def test_a_chain_of_many_that_is_hidden_among_slow_links_is_found(nodes: int) -> None:
    hidden = [0, *random.Random(nodes).sample(range(1, nodes), nodes - 1)]
    cables = {frozenset(pair) for pair in itertools.pairwise(hidden)}
    chain = [[FAST if frozenset((i, j)) in cables else SLOW for j in range(nodes)] for i in range(nodes)]
    assert best_order(chain) == hidden


def test_greed_alone_would_end_in_a_corner() -> None:
    """The nearest of all leads to a node from which only slow links go on; turning a part round mends it."""
    nodes = 10
    links = costs(nodes, {(1, other) for other in range(2, nodes)} - {(1, 5)})
    links[0][1] = links[1][0] = FAST / 2
    assert slowest(best_order(links), links) == FAST


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_every_pair_meets_once_and_nobody_twice_at_a_time(count: int) -> None:
    found = [pair for turn in turns(count) for pair in turn]
    assert sorted(found) == list(itertools.combinations(range(count), 2))
    for turn in turns(count):
        assert len({index for pair in turn for index in pair}) == 2 * len(turn)


def reading(mbit_s: float, trip_ms: float = 0.2) -> Reading:
    return Reading("10.0.0.1", ("10.0.0.2", 7600), trip_ms / 1e3, mbit_s * 125e3, 2 * mbit_s * 125e3)


def test_a_hop_is_as_slow_as_its_slower_way() -> None:
    assert hop_s(reading(80.0)) == pytest.approx(1e-4 + (1 << 20) / 10e6)
    assert hop_s(None) > hop_s(reading(0.1))


def test_members_follow_their_links() -> None:
    """Who does not reach each other, or only slowly, is no neighbour where that can be; hosts' ranks stay together."""

    def at(network: str) -> Place:
        return Place(["10.0.0.9"], 7600, network)

    def joined(network: str) -> object:
        one = member(-1)
        return type(one)(one.rank, one.epoch, at(network), one.capabilities)

    b, c, d = joined("b"), joined("c"), joined("d")
    quick = reading(1000.0)
    pairs = [Pair(0, 1, reading(10.0)), Pair(0, 2, quick), Pair(0, 3, quick), Pair(1, 2, quick), Pair(1, 3, None, "no")]
    assert ordered([b, c, d], at("a"), [*pairs, Pair(2, 3, quick)]) == [d, c, b]  # type: ignore[list-item]
    one, two, other = joined("b"), joined("b"), joined("c")
    between = [Pair(0, 1, quick), Pair(0, 2, quick), Pair(1, 2, reading(10.0))]
    assert ordered([one, other, two], at("a"), between) == [one, two, other]  # type: ignore[list-item]
