"""RingConfig: who this rank is and where its neighbours are. Reads settings, opens nothing.

Sources, the earlier beats the later: arguments, the environment (RING_*, a launcher's: `environment.py`), a file
(RING_CONFIG's JSON, or a cluster file). All are checked here, so that a wrong one is one clear line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ringlm.errors import ConfigError
from ringlm.ring.address import Address, is_loopback, parse_address, parse_port
from ringlm.ring.environment import MASTER_PORT, launcher, master_host, master_port
from ringlm.ring.seal import MODES, Mode

DEFAULT_PORT = 7600
MAX_WORLD_SIZE = 256

_JSON_FIELDS = ("master_ip", "master_port", "port", "right_ip", "right_port", "rank", "world_size")


@dataclasses.dataclass(frozen=True)
class Node:
    """One `[[node]]` of a cluster file. Only host and port matter to the ring."""

    host: str
    port: int = DEFAULT_PORT
    device: str | None = None
    model: str | None = None
    weight: float | None = None
    seal: Mode | None = None

    @property
    def address(self) -> Address:
        return Address(self.host, self.port)


@dataclasses.dataclass(frozen=True)
class RingConfig:
    """Everything `connect` needs. Raises ConfigError when the parts contradict each other.

    rank, world_size: this rank, 0 <= rank < world_size.
    port: where this rank listens, for every kind of link; 0 picks a free one.
    right: the right neighbour, rank + 1 modulo world size.
    master: rank 0, where it is given; the rendezvous (a torch TCPStore) when `right` is not.
    secret: shared by all ranks; without one only loopback addresses are bound and dialled.
    seal: how links are sealed: on (encrypted), auth (authenticated only), off, or None: on where a link leaves this
        machine and there is a secret.
    interface: the address or the name of the network interface to listen on.
    connect_timeout_s: how long to wait for the others; timeout_s: for one collective.
    """

    rank: int = 0
    world_size: int = 1
    port: int = 0
    right: Address | None = None
    master: Address | None = None
    secret: bytes | None = dataclasses.field(default=None, repr=False)
    interface: str | None = None
    seal: Mode | None = None
    connect_timeout_s: float = 120.0
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.world_size <= MAX_WORLD_SIZE:
            raise ConfigError(f"world size is {self.world_size}; it must be from 1 to {MAX_WORLD_SIZE}.")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"rank is {self.rank}, but world size {self.world_size} has ranks 0 to {self.world_size - 1}."
            )
        parse_port(self.port, "the port this rank listens on", zero=True)
        if self.seal not in (None, *MODES):
            raise ConfigError(f"--seal (or RING_SEAL) is {self.seal!r}; it must be one of {', '.join(MODES)}.")
        if self.world_size == 1:
            return
        if self.right is None and self.master is None:
            raise ConfigError(
                f"rank {self.rank} of {self.world_size} does not know its right neighbour: "
                "set RING_RIGHT (and RING_RIGHT_IP), or MASTER_ADDR and MASTER_PORT, or give --nodes or --config."
            )
        if self.secret is not None and not self.secret:
            raise ConfigError("the secret is empty; write one with: openssl rand -hex 16")
        if self.secret is None and self.seal not in (None, "off"):
            raise ConfigError(
                f"--seal {self.seal} needs a secret, from which its keys come: set RING_SECRET or --secret-file to the "
                "same value on every rank."
            )
        if self.secret is None:
            for what, address in (("right neighbour", self.right), ("master", self.master)):
                if address is not None and not is_loopback(address.host):
                    raise ConfigError(
                        f"the {what} {address} is another machine; links beyond loopback need a shared secret: "
                        "set RING_SECRET or --secret-file to the same value on every rank."
                    )

    def replace(self, **changes: Any) -> RingConfig:
        """A checked copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @staticmethod
    def present(environ: Mapping[str, str] | None = None) -> bool:
        """Whether the environment describes a ring."""
        environ = os.environ if environ is None else environ
        return (
            any(environ.get(name) for name in ("RING_CONFIG", "RING_RANK", "RING_WORLD_SIZE"))
            or launcher(environ) is not None
        )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **changes: Any) -> RingConfig:
        """From RING_* and a launcher's variables (torchrun, mpirun, srun, …); `changes` beat them. Raises ConfigError.

        RING_* and a launcher's variables that disagree are refused, as are a rank without a world size.
        """
        environ = os.environ if environ is None else environ
        if not cls.present(environ):
            raise ConfigError(
                "no ring in the environment: set RING_RANK, RING_WORLD_SIZE, RING_PORT and RING_RIGHT, "
                "or start the ranks with 'ringlm launch' or torchrun."
            )
        path = environ.get("RING_CONFIG")
        return cls._from_fields(_read_json(Path(path)) if path else {}, environ, changes)

    @classmethod
    def from_json(cls, path: str | Path, **changes: Any) -> RingConfig:
        """From a RING_CONFIG file: master_ip, master_port, port, right_ip, right_port, rank, world_size."""
        return cls._from_fields(_read_json(Path(path)), {}, changes)

    @classmethod
    def from_nodes(cls, nodes: Sequence[Node], rank: int, **changes: Any) -> RingConfig:
        """From the nodes of a cluster file, in rank order."""
        if not 0 <= rank < len(nodes):
            raise ConfigError(f"node rank is {rank}, but there are {len(nodes)} nodes, 0 to {len(nodes) - 1}.")
        addresses = [node.address for node in nodes]
        for address in addresses:
            if addresses.count(address) > 1:
                raise ConfigError(f"two nodes are {address}; give each a host or a port of its own.")
        fields: dict[str, Any] = {
            "rank": rank,
            "world_size": len(nodes),
            "port": nodes[rank].port,
            "right": addresses[(rank + 1) % len(nodes)] if len(nodes) > 1 else None,
            "seal": os.environ.get("RING_SEAL") or nodes[rank].seal,
        }
        if "secret" not in changes:
            fields["secret"] = read_secret(os.environ)
        return cls(**(fields | changes))

    @classmethod
    def _from_fields(
        cls, file: Mapping[str, Any], environ: Mapping[str, str], changes: Mapping[str, Any]
    ) -> RingConfig:
        started_by = launcher(environ)

        def setting(field: str, ring: str, other: str = "") -> tuple[str, str] | None:
            """The value and the name of the variable or field that gave it."""
            ours, theirs = environ.get(ring), environ.get(other)
            if ours and theirs and ours != theirs:
                raise ConfigError(f"{ring} is {ours} but {other} is {theirs}; unset one of them.")
            if ours:
                return ours, ring
            if theirs:
                return theirs, other
            return (str(file[field]), f"'{field}' in RING_CONFIG") if field in file else None

        def number(found: tuple[str, str] | None, what: str) -> int:
            if found is None:
                raise ConfigError(f"{what} is missing; a ring needs RING_RANK and RING_WORLD_SIZE on every rank.")
            try:
                return int(found[0])
            except ValueError:
                raise ConfigError(f"{found[1]} is {found[0]!r}; it must be a whole number.") from None

        rank_name, size_name = (started_by.rank, started_by.world_size) if started_by else ("RANK", "WORLD_SIZE")
        rank = number(setting("rank", "RING_RANK", rank_name), "RING_RANK")
        world_size = number(setting("world_size", "RING_WORLD_SIZE", size_name), "RING_WORLD_SIZE")
        port = setting("port", "RING_PORT")
        right_port = setting("right_port", "RING_RIGHT")
        right_ip = setting("right_ip", "RING_RIGHT_IP")
        meeting_ip = setting("master_ip", "RING_MASTER_IP", "MASTER_ADDR")
        meeting_port = setting("master_port", "RING_MASTER_PORT", "MASTER_PORT")
        fields: dict[str, Any] = {"rank": rank, "world_size": world_size}
        if port:
            fields["port"] = parse_port(port[0], port[1])
        if right_port:
            host = right_ip[0] if right_ip else "127.0.0.1"
            fields["right"] = Address(host, parse_port(right_port[0], right_port[1]))
        if meeting_ip or meeting_port or (started_by and not right_port and world_size > 1):
            host = meeting_ip[0] if meeting_ip else master_host(environ, started_by) if started_by else "127.0.0.1"
            free = master_port(environ, started_by) if started_by else MASTER_PORT
            fields["master"] = Address(host, parse_port(*meeting_port) if meeting_port else free)
        if environ.get("RING_INTERFACE"):
            fields["interface"] = environ["RING_INTERFACE"]
        if environ.get("RING_SEAL"):
            fields["seal"] = environ["RING_SEAL"]
        if "secret" not in changes:
            fields["secret"] = read_secret(environ)
        fields |= changes
        if right_port and "port" not in fields and world_size > 1:
            raise ConfigError("RING_RIGHT is set but RING_PORT is not; RING_PORT is where this rank listens.")
        return cls(**fields)


def read_secret(environ: Mapping[str, str], path: str | Path | None = None) -> bytes | None:
    """The secret from `path`, else RING_SECRET, else the file RING_SECRET_FILE names. Raises ConfigError."""
    if path is None and environ.get("RING_SECRET"):
        return environ["RING_SECRET"].strip().encode()  # as a file's
    path = path or environ.get("RING_SECRET_FILE")
    if not path:
        return None
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"the secret file {path} cannot be read: {error.strerror}.") from None
    if not secret:
        raise ConfigError(f"the secret file {path} is empty; write one with: openssl rand -hex 16 > {path}")
    return secret


def parse_nodes(text: str) -> tuple[Node, ...]:
    """`host:port,host:port` in rank order (`--nodes`). Raises ConfigError."""
    return tuple(Node(*parse_address(part, "--nodes", DEFAULT_PORT)) for part in text.split(","))


def load_cluster_file(path: str | Path) -> tuple[Node, ...]:
    """The `[[node]]` tables of a cluster file, in rank order; its `seal` is every node's. Raises ConfigError."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        tables = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"the cluster file {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the cluster file {path} is not TOML: {error}.") from None
    nodes = tables.get("node")
    if not isinstance(nodes, list) or not nodes:
        raise ConfigError(f"the cluster file {path} has no [[node]] tables; write one a rank, in rank order.")
    shared = {"seal": tables["seal"]} if "seal" in tables else {}
    return tuple(_node(table, shared, f"[[node]] {rank} in {path}") for rank, table in enumerate(nodes))


def _node(table: Any, shared: dict[str, Any], where: str) -> Node:
    types: dict[str, type | tuple[type, ...]] = {
        "host": str,
        "port": int,
        "device": str,
        "model": str,
        "weight": (int, float),
        "seal": str,
    }
    if not isinstance(table, dict) or "host" not in table:
        raise ConfigError(f"{where} has no host.")
    table = shared | table
    for key, value in table.items():
        if key not in types:
            raise ConfigError(f"{where} has an unknown key '{key}'; known are {', '.join(types)}.")
        if not isinstance(value, types[key]) or isinstance(value, bool):
            raise ConfigError(f"{where}: '{key}' is {value!r}, which is of the wrong type.")
    return Node(**(table | {"port": parse_port(table.get("port", DEFAULT_PORT), where)}))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"RING_CONFIG: {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"RING_CONFIG: {path} is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"RING_CONFIG: {path} holds no object; its fields are {', '.join(_JSON_FIELDS)}.")
    for name, value in fields.items():
        if name not in _JSON_FIELDS:
            raise ConfigError(
                f"RING_CONFIG: {path} has an unknown field '{name}'; known are {', '.join(_JSON_FIELDS)}."
            )
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise ConfigError(f"RING_CONFIG: {path}: '{name}' is {value!r}; it must be a number or a string.")
    return {name: value for name, value in fields.items() if value is not None}
