"""`ringlm doctor`: what these machines and the links between them can do, and what is in the way of a ring.

One command a machine: `ringlm doctor -n N` on rank 0's, `ringlm doctor HOST` on each of the others, as with `serve` and
`join`; it goes their ways, with their secret. Knows how to ask and to show; diagnosis.py knows what it means.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from ringlm.cluster.agreement import Capabilities, check_memory, fast_dtypes, propose
from ringlm.cluster.examination import Examined, Interface, examine
from ringlm.cluster.joining import End, Gauge, Gauged, Member, Offer
from ringlm.cluster.ordering import Pair, measure, ordered
from ringlm.cluster.rendezvous import Rendezvous
from ringlm.cluster.settings import Settings
from ringlm.errors import ConfigError, ConnectError, RingLMError
from ringlm.frontend import console
from ringlm.frontend.command_options import DoctorOptions
from ringlm.frontend.diagnosis import Machine, MachineLink, Outlook, Report, advice, expect, refuse
from ringlm.frontend.doctor_view import show_links, show_machines, show_outlook
from ringlm.frontend.join import dial_rank0, hear_offer
from ringlm.frontend.model import resolve
from ringlm.frontend.options import split_weights
from ringlm.frontend.secret import invite, secret_to_join, secret_to_lead
from ringlm.ring.address import Address, own_address, parse_address, parse_port
from ringlm.ring.cards import own_place
from ringlm.ring.config import DEFAULT_PORT, Node, RingConfig, load_cluster_file, parse_nodes, read_secret
from ringlm.ring.gauge import Gauges
from ringlm.ring.listener import Listener, open_listener
from ringlm.weights.files import ModelFiles, open_model

_COME_S = 600.0  # for the others to be started
_FAREWELL = "all machines are examined."


def doctor(options: DoctorOptions) -> None:
    """The whole command. Raises, after what was found before it, the first thing that must be mended."""
    part = _part(options)
    report = Report()
    try:
        model = None if options.model is None else open_model(resolve(options.model, options.format).path)
        with _listening(part.ring) as listener:
            if part.rank0 is not None:
                _be_examined(part.rank0, part.ring, _examine_here(options), listener)
                return
            capabilities = _examine(part, options, listener, report)
        if not options.json:
            show_machines(report)
            show_links(report)
        refuse(report.machines, report.links)
        if model is not None:
            report.outlook = _outlook(model, options, report, capabilities)
        report.advice = advice(report.machines, report.links, report.outlook)
        if not options.json:
            show_outlook(report)
    except RingLMError as error:
        report.problem = str(error)
        raise
    finally:
        if options.json and part.rank0 is None:
            print(msgspec.json.encode(report).decode(), flush=True)


# -- who does what -----------------------------------------------------------------------------


class _Part(NamedTuple):
    """What this machine does: it examines so many `others`, or is examined by `rank0`."""

    ring: RingConfig
    others: int
    rank0: Address | None


def _part(options: DoctorOptions) -> _Part:
    given = [name for name in ("rank0", "world_size", "nodes", "config") if getattr(options, name) is not None]
    if len(given) > 1:
        raise ConfigError("HOST, -n, --nodes and --config each say who is examined; give one of them.")
    interface = options.interface or os.environ.get("RING_INTERFACE")
    port = parse_port(os.environ.get("RING_PORT") or 0, "RING_PORT", zero=True)
    nodes = _nodes(options)
    if not nodes and options.node_rank is not None:
        raise ConfigError("--node-rank needs --nodes or --config, which say where the ranks are.")
    if nodes and not 0 <= (options.node_rank if options.node_rank is not None else -1) < len(nodes):
        raise ConfigError(f"which of the {len(nodes)} nodes is this? Give --node-rank 0 to {len(nodes) - 1}.")
    rank0 = None if options.rank0 is None else parse_address(options.rank0, "HOST[:PORT]", DEFAULT_PORT)
    if nodes:
        port = nodes[options.node_rank or 0].port
        rank0 = nodes[0].address if options.node_rank else None
    if rank0 is not None:
        ring = RingConfig(port=port, secret=secret_to_join(options.secret_file, rank0), interface=interface)
        return _Part(ring, 0, rank0)
    count = len(nodes) or (1 if options.world_size is None else options.world_size)
    if count < 1:
        raise ConfigError(f"-n is {count}; it must be 1 or more.")
    secret = secret_to_lead(options.secret_file) if count > 1 else read_secret(os.environ, options.secret_file)
    return _Part(RingConfig(port=port or DEFAULT_PORT, secret=secret, interface=interface), count - 1, None)


def _nodes(options: DoctorOptions) -> tuple[Node, ...]:
    if options.nodes is not None:
        return parse_nodes(options.nodes)
    return load_cluster_file(options.config) if options.config is not None else ()


@contextlib.contextmanager
def _listening(ring: RingConfig) -> Iterator[Listener]:
    """A listener that measures with whoever asks. Raises ConfigError, which names who has the port."""
    try:
        listener = open_listener(ring)
    except ConfigError as error:
        holder = _holder(ring.port)
        raise ConfigError(f"{error} It is {holder}." if holder else str(error)) from None
    gauges = Gauges()
    listener.gauges = gauges
    try:
        yield listener
    finally:
        listener.close()
        gauges.close()


def _holder(port: int) -> str | None:
    """The process that listens at a port, where the system tells."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for link in psutil.net_connections("tcp"):
            if link.status == psutil.CONN_LISTEN and link.laddr.port == port and link.pid:
                return f"process {link.pid}, {psutil.Process(link.pid).name()}"
    return None


def _examine_here(options: DoctorOptions) -> Examined:
    console.notice("examining this machine, which takes some seconds.")
    return examine(options.device, options.threads)


# -- the machines that are examined ------------------------------------------------------------


def _be_examined(rank0: Address, ring: RingConfig, examined: Examined, listener: Listener) -> None:
    """Tell rank 0 what was found here, and measure links for it until it has all. Raises RingError and ConfigError."""
    with contextlib.closing(dial_rank0(rank0, ring)) as line:
        if not hear_offer(line, rank0).examines:
            raise ConfigError(
                f"at {rank0} a ring is served, which is not examined: see it by 'ringlm status', or end it and type "
                "there: ringlm doctor -n N"
            )
        place = own_place(ring, listener.port, [line.sock])
        try:
            line.say(Member(-1, 0, place, examined.capabilities, examined.findings))
            console.notice(f"this machine is examined; {rank0} shows what is found.")
            while True:
                word = line.hear()
                if isinstance(word, Gauge):
                    line.say(Gauged.by(ring, word))
                elif isinstance(word, End):
                    if word.mistake or word.why != _FAREWELL:
                        raise ConnectError(f"the examination at {rank0} was ended: {word.why}")
                    return
        except OSError as error:
            raise ConnectError(f"the doctor at {rank0} is gone: {error}.") from None


# -- rank 0 ------------------------------------------------------------------------------------


def _examine(part: _Part, options: DoctorOptions, listener: Listener, report: Report) -> list[Capabilities]:
    """Report all machines and the links between them; what each can do. Ranks are as a ring would give them."""
    own = own_place(part.ring, listener.port, [])
    members: list[Member] = []
    pairs: list[Pair] = []
    if part.others:
        why = "rank 0's doctor has ended."
        rendezvous = Rendezvous(listener, "", Offer("", part.others + 1, examines=True), _judge, lambda: None)
        try:
            invite(part.ring, "doctor", part.others, console.notice)
            examined = _examine_here(options)  # while the others come
            members = _gather(rendezvous, part)
            own = rendezvous.place(own)
            console.notice("measuring the links.")
            pairs = measure(rendezvous, own, members, part.ring)
            why = _FAREWELL
        finally:
            rendezvous.close(why)
    else:
        examined = _examine_here(options)
    best = ordered(members, own, pairs)
    came = [0, *(members.index(member) + 1 for member in best)]
    found = [examined.findings, *(member.findings for member in best if member.findings is not None)]
    capabilities = [examined.capabilities, *(member.capabilities for member in best)]
    places = [own, *(member.place for member in best)]
    report.machines = [
        Machine(rank, (place.hosts or [own_address()])[0], capabilities[rank].memory.free, one)
        for rank, (place, one) in enumerate(zip(places, found, strict=True))
    ]
    links = [_link(pair, came, report.machines) for pair in pairs]
    report.links = sorted(links, key=lambda link: (link.rank, link.other))
    return capabilities


def _judge(member: Member) -> None:
    """Raises ConfigError for who is no doctor."""
    if member.findings is None:
        raise ConfigError("machines are examined here, and no ring is formed; type there: ringlm doctor HOST")


def _gather(rendezvous: Rendezvous, part: _Part) -> list[Member]:
    """The others, once all are here. Raises ConnectError."""
    told = 0

    def choose(present: list[Member], waited_s: float) -> dict[int, Member] | None:
        nonlocal told
        if len(present) != told:
            told = len(present)
            console.notice(f"{told} of {part.others} here: {', '.join(member.place.hosts[0] for member in present)}")
        return dict(enumerate(present[: part.others], 1)) if len(present) >= part.others else None

    return list(rendezvous.gather(choose, 0, _COME_S).seats.values())


def _link(pair: Pair, came: list[int], machines: Sequence[Machine]) -> MachineLink:
    """What was measured by places, by ranks."""
    one, other = came.index(pair.one), came.index(pair.other)
    low, high = min(one, other), max(one, other)
    if pair.reading is None:
        return MachineLink(low, high, why=pair.why)
    near = _name(machines[one].findings.interfaces, pair.reading.near)
    far = _name(machines[other].findings.interfaces, pair.reading.far[0])
    out, back = pair.reading.out_bytes_per_s, pair.reading.in_bytes_per_s
    if one > other:
        near, far, out, back = far, near, back, out
    return MachineLink(low, high, near, far, pair.reading.round_trip_s, out, back)


def _name(interfaces: dict[str, Interface], address: str) -> str:
    return interfaces[address].name if address in interfaces else address


def _outlook(
    files: ModelFiles, options: DoctorOptions, report: Report, capabilities: Sequence[Capabilities]
) -> Outlook:
    """What the model would do here. Raises what a ring would refuse."""
    settings = Settings(
        dtype=options.dtype,
        quant=options.quant,
        split=None if options.split is None else split_weights(options.split),
        context=options.context,
    )
    ranks = [msgspec.structs.replace(one, rank=rank) for rank, one in enumerate(capabilities)]
    if options.quant != "none":  # examined without it
        ranks = [msgspec.structs.replace(one, dtypes=fast_dtypes(one.device, options.quant)) for one in ranks]
    ranks[0] = msgspec.structs.replace(ranks[0], settings=settings)
    proposal = propose(ranks, files)
    check_memory(proposal, ranks)
    return expect(files, proposal, report.machines, report.links)
