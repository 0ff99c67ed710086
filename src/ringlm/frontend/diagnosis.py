"""What the findings of a doctor mean: what must be mended, what would help, and what a model could do there at best.

Pure: knows machines, links and bytes by what was measured of them, opens nothing and shows nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from ringlm.cluster.agreement import Proposal
from ringlm.cluster.examination import Findings, Interface
from ringlm.errors import ConfigError, ConnectError
from ringlm.models.config import read_config
from ringlm.models.sizes import holdings
from ringlm.weights.files import ModelFiles

TORCH: Final = (2, 11)
_CLAIMED: Final = 0.6  # of what an interface claims is little
_ONE_SIDED: Final = 1.5  # times as fast in one direction as in the other is much
_SLOW_BYTES_PER_S: Final = 60e6  # half a gigabit
_LONG_S: Final = 1e-3  # a round trip
_NEAR_S: Final = 30e-6  # a sum between ranks of one machine
_UNEVEN: Final = 1.25  # times as long as it would be with another split


class Machine(msgspec.Struct, frozen=True):
    """A rank and its machine. Bytes are those free where it would compute."""

    rank: int
    address: str
    free_bytes: int
    findings: Findings

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.findings.host})"


class MachineLink(msgspec.Struct, frozen=True):
    """The link between two ranks, the lower first, and their interfaces' names; None: `why` it was not measured."""

    rank: int
    other: int
    interface: str = ""
    other_interface: str = ""
    round_trip_s: float | None = None
    to_other_bytes_per_s: float | None = None
    from_other_bytes_per_s: float | None = None
    why: str = ""

    @property
    def slower_bytes_per_s(self) -> float:
        return min(self.to_other_bytes_per_s or 0.0, self.from_other_bytes_per_s or 0.0)


class Share(msgspec.Struct, frozen=True):
    """What a rank does in a step of one token."""

    rank: int
    read_bytes: int
    seconds: float


class Outlook(msgspec.Struct, frozen=True):
    """What a model can do at best. `sums` a step wait for a link each, `sum_s`; the slowest is between `slowest`, None
    on one machine. `limit` is what takes most of a step: memory or links. `even_s` is what reading would take if every
    rank had what suits it, by `split`."""

    model: str
    dtype: str
    quant: str
    shares: list[Share]
    sums: int
    sum_s: float
    slowest: tuple[int, int] | None
    tokens_per_s: float
    prompt_tokens_per_s: float
    limit: str
    even_s: float
    split: list[float]

    @property
    def read_s(self) -> float:
        """Of the rank that takes longest."""
        return max(share.seconds for share in self.shares)


class Report(msgspec.Struct):
    """All that was found, in the order in which it is; `problem` is what must be mended before the rest is known."""

    machines: list[Machine] = []
    links: list[MachineLink] = []
    outlook: Outlook | None = None
    advice: list[str] = []
    problem: str | None = None


def refuse(machines: Sequence[Machine], links: Sequence[MachineLink]) -> None:
    """Raises the first thing that must be mended before these machines are a ring."""
    for machine in machines:
        found = machine.findings
        if tuple(map(int, re.findall(r"\d+", found.torch)[:2])) < TORCH:
            raise ConfigError(
                f"{machine} has torch {found.torch}, and {'.'.join(map(str, TORCH))} is the oldest that will do; "
                "there: python -m pip install --upgrade torch"
            )
    for link in links:
        if link.why and link.other == link.rank + 1:
            one, other = machines[link.rank], machines[link.other]
            raise ConnectError(
                f"{one} does not reach {other}, and no better neighbour is there for it: {link.why} "
                f"On {other.findings.host} let it in, such as by: sudo ufw allow from {one.address}"
            )


def advice(machines: Sequence[Machine], links: Sequence[MachineLink], outlook: Outlook | None) -> list[str]:
    """What would help, the most important first: a sentence each."""
    said = [sentence for link in links for sentence in _of_link(machines, link)]
    for version in ("ringlm", "torch"):
        if len({getattr(machine.findings, version) for machine in machines}) > 1:
            each = ", ".join(f"{getattr(machine.findings, version)} on rank {machine.rank}" for machine in machines)
            said.append(f"{version} is {each}: the same everywhere is what was tested.")
    for machine in machines:
        gpus = [name for name in machine.findings.devices if not name.startswith("cpu")]
        if gpus and machine.findings.device == "cpu":
            said.append(f"{machine} computes on its cpu and has {', '.join(gpus)}: leave --device out there.")
    if outlook is not None and outlook.read_s > _UNEVEN * outlook.even_s:
        split = ",".join(f"{weight:g}" for weight in outlook.split)
        said.append(f"Ranks wait for the slowest: --split {split} would give each what it reads in the same time.")
    return said


def _of_link(machines: Sequence[Machine], link: MachineLink) -> Iterator[str]:
    one, other = machines[link.rank], machines[link.other]
    name = f"The link between {one} and {other}"
    if link.why or link.to_other_bytes_per_s is None or link.from_other_bytes_per_s is None:
        yield f"{name} was not measured, and the ring would lead round it: {link.why}"
        return
    there, back, slow = link.to_other_bytes_per_s, link.from_other_bytes_per_s, link.slower_bytes_per_s
    ends = [_interface(one, link.interface), _interface(other, link.other_interface)]
    claimed = min((end.mbit_s * 125e3 for end in ends if end is not None and end.mbit_s > 0), default=0.0)
    wireless = [str(end) for end in (one, other) if (found := ends[end is other]) is not None and found.wireless]
    if wireless:
        yield f"{name} carries {speed(slow)} over Wi-Fi, of {' and '.join(wireless)}: a cable is faster and steadier."
    elif max(there, back) > _ONE_SIDED * slow:
        way = f"from {one} to {other}" if there < back else f"from {other} to {one}"
        yield (
            f"{name} carries {speed(slow)} {way}, and {speed(max(there, back))} the other way: another program sends "
            "there, too, a limit is set, or the cable is bad."
        )
    elif slow < _CLAIMED * claimed:
        yield f"{name} carries {speed(slow)} of the {speed(claimed)} claimed: try another cable, port or switch."
    elif slow < _SLOW_BYTES_PER_S:
        yield f"{name} carries only {speed(slow)}: prompts wait for it; gigabit Ethernet carries 940 Mbit/s."
    if link.round_trip_s is not None and link.round_trip_s > _LONG_S:
        yield f"{name} takes {link.round_trip_s * 1e3:.1f} ms for a round trip, and every token waits for many of them."


def _interface(machine: Machine, name: str) -> Interface | None:
    return next((one for one in machine.findings.interfaces.values() if one.name == name), None)


def expect(files: ModelFiles, proposal: Proposal, machines: Sequence[Machine], links: Sequence[MachineLink]) -> Outlook:
    """What these ranks could do with a model at best: each reads its weights as fast as memory gives them, and every
    sum takes what the slowest link needs."""
    settings, config = proposal.settings, read_config(files.config, files.name)
    ranks, item = len(machines), 4 if settings.dtype == "float32" else 2
    read = [machine.findings.read_bytes_per_s for machine in machines]
    steps = [holding.step for holding in proposal.holdings]
    shares = [Share(rank, nbytes, nbytes / read[rank]) for rank, nbytes in enumerate(steps)]
    even = [speed / sum(read) for speed in read]

    sums = 0 if ranks == 1 else 2 * config.layers + 3  # the embedding's, too; the step message, and the logits
    slowest, sum_s, rate = _sum(ranks, links, config.hidden_size * item)
    step_s = max(share.seconds for share in shares) + sums * sum_s

    devices = [machine.findings.device for machine in machines]
    numbers = holdings(files, proposal.plan, devices, dtype="float32", bits=None)  # of 4 bytes each
    computed_s = max(
        holding.step / 2 / machine.findings.flops for holding, machine in zip(numbers, machines, strict=True)
    )
    sent = 0 if ranks == 1 else 2 * config.layers * config.hidden_size * item * 2 * (ranks - 1) / ranks
    return Outlook(
        model=files.name,
        dtype=settings.dtype,
        quant=settings.quant,
        shares=shares,
        sums=sums,
        sum_s=sum_s,
        slowest=slowest,
        tokens_per_s=1 / step_s,
        prompt_tokens_per_s=1 / (computed_s + sent / rate),
        limit="links" if sums * sum_s > step_s / 2 else "memory",
        even_s=sum(steps) / sum(read),
        split=[round(part / min(even), 1) for part in even],
    )


def _sum(ranks: int, links: Sequence[MachineLink], nbytes: int) -> tuple[tuple[int, int] | None, float, float]:
    """The slowest link, the seconds of a sum of so many bytes, and the bytes per second that the slowest carries."""
    hops = {
        (link.rank, link.other): link.round_trip_s / 2 + nbytes * (ranks - 1) / link.slower_bytes_per_s
        for link in links
        if link.round_trip_s is not None
    }
    if not hops:
        return None, 0.0 if ranks == 1 else _NEAR_S, float("inf")
    rate = min(link.slower_bytes_per_s for link in links if not link.why)
    if any(link.why for link in links):  # up the chain of neighbours, and down again
        chain = {pair: hops.get(pair, _NEAR_S) for pair in itertools.pairwise(range(ranks))}
        return max(chain, key=chain.__getitem__), 2 * sum(chain.values()), rate
    slowest = max(hops, key=hops.__getitem__)
    return slowest, hops[slowest], rate


def speed(bytes_per_s: float) -> str:
    """As networks are sold: 94 Mbit/s, 9.41 Gbit/s."""
    mbit = bytes_per_s / 125e3
    return f"{mbit / 1e3:.3g} Gbit/s" if mbit >= 1e3 else f"{mbit:.3g} Mbit/s"
