"""In which order machines make a ring, by what their links can do: neighbours are those with the best links.

Rank 0 has pairs of machines measured, in turns of which each machine is in one pair at most. Where the links are alike
the order of joining stays. What it does not know: how a link is measured, and what ranks do in the ring.
"""

from __future__ import annotations

import ipaddress
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from ringlm.cluster.joining import Gauge, Gauged, Member
from ringlm.cluster.messages import MeasuredLink
from ringlm.cluster.rendezvous import Rendezvous
from ringlm.ring.config import RingConfig
from ringlm.ring.gauge import LIMIT_S, Reading
from ringlm.ring.handshake import Place

MOST_HOSTS: Final = 24  # more take too long to measure: a second for each
_ALL_S: Final = 30.0
_HOP_BYTES: Final = 1 << 20  # by which a round trip and a rate become one number
_UNKNOWN_S: Final = 1e3  # a hop between two that do not reach each other
_BETTER: Final = 1.5  # another order must be so many times as good, or that of joining stays
_EXACT: Final = 8  # nodes: 5,040 orders

log = logging.getLogger("ringlm")

Costs = Sequence[Sequence[float]]  # seconds of a hop, by node and node


class Pair(NamedTuple):
    """Two places by number, the lower first, which has dialled; `reading` None: `why` it was not measured."""

    one: int
    other: int
    reading: Reading | None
    why: str = ""


class Arranged(NamedTuple):
    """The members behind rank 0 in their order, and what was measured between ranks of different hosts."""

    members: list[Member]
    links: list[MeasuredLink]


def arrange(
    rendezvous: Rendezvous, own: Place, members: list[Member], config: RingConfig, known: Sequence[MeasuredLink]
) -> Arranged:
    """`members` in their best order behind rank 0, which listens at `own`: those without a rank so far are measured
    where there are two or more, on several hosts, which the log tells. Others keep their order, and what is `known`."""
    if len(members) < 2 or len({own.network, *(member.place.network for member in members)}) < 2:
        return Arranged(members, [])
    if any(member.rank > 0 for member in members):
        now = {0: 0} | {member.rank: rank for rank, member in enumerate(members, 1)}
        kept = [link for link in known if {link.rank, link.other} <= now.keys()]
        moved = [msgspec.structs.replace(link, rank=now[link.rank], other=now[link.other]) for link in kept]
        return Arranged(members, moved)
    pairs = measure(rendezvous, own, members, config)
    best = ordered(members, own, pairs)
    came = [0, *(members.index(member) + 1 for member in best)]  # by rank
    links = []
    for one, other, reading, why in pairs:
        low, high = sorted((came.index(one), came.index(other)))
        if reading is None:
            log.warning("the link between ranks %d and %d could not be measured: %s", low, high, why)
            continue
        out, back = reading.out_bytes_per_s, reading.in_bytes_per_s
        if came.index(one) == high:
            out, back = back, out
        links.append(MeasuredLink(low, high, reading.round_trip_s, out, back))
        log.info(
            "ranks %d and %d: round trip %.2f ms, %.0f Mbit/s there, %.0f Mbit/s back",
            low, high, reading.round_trip_s * 1e3, out / 125e3, back / 125e3,
        )  # fmt: skip
    if best != members:
        log.info("by these links ranks 1 to %d go to who joined as number %s", len(best), ", ".join(map(str, came[1:])))
    return Arranged(best, sorted(links, key=lambda link: (link.rank, link.other)))


def measure(rendezvous: Rendezvous, own: Place, members: Sequence[Member], config: RingConfig) -> list[Pair]:
    """What links there are between rank 0, at place 0, and members, at 1, 2, …: one of each pair of hosts that are not
    the same. Takes half a minute at most; raises nothing for a link that cannot be measured."""
    places = [own, *(member.place for member in members)]
    first = list({place.network: index for index, place in reversed([*enumerate(places)])}.values())[::-1]
    stop, found = time.monotonic() + _ALL_S, []
    for turn in turns(len(first)) if len(first) <= MOST_HOSTS else ():
        if time.monotonic() > stop:
            break
        pairs = [(first[one], first[other]) for one, other in turn]
        words = [Gauge(_reach(places[other], places[one])) for one, other in pairs]
        asked = [(members[one - 1], word) for (one, _), word in zip(pairs, words, strict=True) if one > 0]
        rendezvous.ask(asked)
        mine = [Gauged.by(config, word) for (one, _), word in zip(pairs, words, strict=True) if one == 0]
        said = mine + rendezvous.answers([member for member, _ in asked], LIMIT_S + 2.0)  # rank 0's pair comes first
        found += [Pair(*pair, one.reading, one.why) for pair, one in zip(pairs, said, strict=True)]
    return sorted(found, key=lambda pair: pair[:2])


def turns(count: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of 0 … count - 1 once, in turns of pairs that have nobody in common."""
    ring = [*range(count), *([-1] * (count % 2))]  # who meets -1 rests
    for _ in range(len(ring) - 1):
        met = [(ring[i], ring[-1 - i]) for i in range(len(ring) // 2)]
        yield sorted((min(pair), max(pair)) for pair in met if -1 not in pair)
        ring[1:] = [ring[-1], *ring[1:-1]]


def ordered(members: Sequence[Member], own: Place, pairs: Sequence[Pair]) -> list[Member]:
    """`members` in the order of the ring behind rank 0; those of one host are beside each other where another order
    than that of joining is better."""
    places = [own, *(member.place for member in members)]
    between = {frozenset((places[pair.one].network, places[pair.other].network)): hop_s(pair.reading) for pair in pairs}

    def cost(one: Place, other: Place) -> float:
        same = one.network == other.network
        return 0.0 if same else between.get(frozenset((one.network, other.network)), _UNKNOWN_S)

    order = best_order([[cost(one, other) for other in places] for one in places])
    return [members[index - 1] for index in order[1:]]


def hop_s(reading: Reading | None) -> float:
    """Seconds for a MiB to the other side."""
    return _UNKNOWN_S if reading is None else reading.round_trip_s / 2 + _HOP_BYTES / reading.bytes_per_s


def best_order(costs: Costs) -> list[int]:
    """All nodes, 0 first, so that the slowest hop between neighbours is as fast as it can be, and then the sum of all;
    that from the last to the first counts only there, since a chain does without it. As they are, where that is nearly
    as good. Exact up to 8 nodes, else found from a greedy order by turning parts of it round."""
    nodes = len(costs)
    given = list(range(nodes))

    def price(order: Sequence[int]) -> tuple[float, float]:
        hops = [costs[one][other] for one, other in itertools.pairwise(order)]
        return max(hops), sum(hops) + costs[order[-1]][0]

    if nodes < 3:
        return given
    if nodes <= _EXACT:
        best = min(([0, *rest] for rest in itertools.permutations(given[1:])), key=price)
    else:
        best = _improved(_greedy(costs), price)
    worth = any(_BETTER * ours < theirs for ours, theirs in zip(price(best), price(given), strict=True))
    return best if worth else given


def _greedy(costs: Costs) -> list[int]:
    order, left = [0], set(range(1, len(costs)))
    while left:
        order.append(min(left, key=lambda node: (costs[order[-1]][node], node)))
        left.remove(order[-1])
    return order


def _improved(order: list[int], price: Callable[[Sequence[int]], tuple[float, float]]) -> list[int]:
    best = price(order)
    while True:
        turned = (
            [*order[:start], *reversed(order[start:end]), *order[end:]]
            for start, end in itertools.combinations(range(1, len(order) + 1), 2)
        )
        found = min(turned, key=price)
        if price(found) >= best:
            return order
        order, best = found, price(found)


def _reach(place: Place, seen_from: Place) -> list[tuple[str, int]]:
    """Where to try, those first that look most like an own address: they are of one network, perhaps of one cable."""

    def distance(one: tuple[str, int]) -> int:
        try:
            theirs, own = ipaddress.ip_address(one[0]), map(ipaddress.ip_address, seen_from.hosts)
            return min(int(theirs) ^ int(host) for host in own if host.version == theirs.version)
        except ValueError:  # a name, or nothing to compare it to
            return 1 << 128

    there = [(one.host, one.port) for one in place.addresses(seen_from.network) if one.host not in seen_from.hosts]
    return sorted(there, key=distance)
