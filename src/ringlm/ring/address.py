"""Host and port: parsing, printing, and which addresses are this machine's own. Opens no connection."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import uuid
from pathlib import Path
from typing import NamedTuple

from ringlm.errors import ConfigError


class Address(NamedTuple):
    """A host (name, IPv4 or IPv6 without brackets) and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_port(text: str | int, where: str, *, zero: bool = False) -> int:
    """A TCP port from `text`; `where` names the setting in the error. Raises ConfigError."""
    try:
        port = int(text)
    except ValueError:
        port = -1
    if not (0 if zero else 1) <= port <= 65535:
        raise ConfigError(f"{where} is {text!r}; a port is a number from 1 to 65535.")
    return port


def parse_address(text: str, where: str, default_port: int | None = None) -> Address:
    """`host:port`, `[v6]:port`, or a bare host where there is a default port. Raises ConfigError."""
    text = text.strip()
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        host = host if bracket else ""
    elif text.count(":") > 1:  # a bare IPv6 address
        host, port = text, ""
    else:
        host, colon, port = text.partition(":")
        port = colon + port
    if not host or (port and port[0] != ":") or (not port and default_port is None):
        raise ConfigError(f"{where} holds {text!r}; write HOST:PORT, or [IPV6]:PORT.")
    return Address(host, parse_port(port[1:], where) if port else int(default_port or 0))


def is_loopback(host: str) -> bool:
    """Whether `host` can only be this machine. A name counts when all its addresses are loopback."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # unknown, or no name at all
        return False
    return bool(found) and all(ipaddress.ip_address(str(a[4][0]).partition("%")[0]).is_loopback for a in found)


def interface_address(interface: str) -> str:
    """`interface` as an address, or the IPv4 address of the interface of that name (Linux)."""
    try:
        socket.getaddrinfo(interface, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        return interface
    except (OSError, UnicodeError):
        pass
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", interface.encode()[:15])
            answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
        return socket.inet_ntoa(answer[20:24])
    except (ImportError, OSError):
        raise ConfigError(
            f"--interface {interface}: no such network interface here; give its name or its address."
        ) from None


def own_address() -> str:
    """The address of this machine at which most others would reach it; its name where no route leads anywhere."""
    try:
        return address_towards(Address("203.0.113.1", 9))  # nobody's
    except OSError:
        return socket.gethostname()


def address_towards(other: Address) -> str:
    """The address of this machine from which `other` is reached. Raises OSError."""
    family = socket.getaddrinfo(other.host, other.port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting UDP sends nothing
        probe.connect(tuple(other))
        return str(probe.getsockname()[0])


def local_addresses() -> list[str]:
    """The IPv4 addresses of this machine's interfaces, where the system tells (Linux)."""
    found = []
    for _, name in socket.if_nameindex():
        with contextlib.suppress(ConfigError):
            found.append(interface_address(name))
    return found


def machine_id() -> str:
    """Equal for two processes exactly when they share cores: this boot of this machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else f"{uuid.getnode():012x}"


def network_id() -> str:
    """Equal for two processes exactly when they share a loopback interface: machine and network namespace."""
    try:
        namespace = os.readlink("/proc/self/ns/net")
    except OSError:  # not Linux: one namespace a machine
        namespace = ""
    return machine_id() + namespace
