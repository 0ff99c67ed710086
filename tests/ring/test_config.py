"""RingConfig: every source, who beats whom, and every mistake in one clear line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ringlm.errors import ConfigError
from ringlm.ring.address import Address, is_loopback, parse_address
from ringlm.ring.config import Node, RingConfig, load_cluster_file, parse_nodes, read_secret

RING = {"RING_RANK": "0", "RING_WORLD_SIZE": "2", "RING_PORT": "1500", "RING_RIGHT": "1501"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}


def test_two_terminals() -> None:
    config = RingConfig.from_env(RING)
    assert (config.rank, config.world_size, config.port) == (0, 2, 1500)
    assert config.right == Address("127.0.0.1", 1501)
    assert (config.master, config.secret, config.interface) == (None, None, None)


def test_torchrun() -> None:
    config = RingConfig.from_env(TORCHRUN)
    assert (config.rank, config.world_size, config.right) == (1, 2, None)
    assert config.master == Address("127.0.0.1", 29501)
    assert RingConfig.from_env({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}).master == Address(
        "127.0.0.1", 29500
    )


def test_the_rest_of_the_environment() -> None:
    more = {
        "RING_RIGHT_IP": "192.168.0.7",
        "RING_MASTER_IP": "192.168.0.2",
        "RING_MASTER_PORT": "1234",
        "RING_SECRET": " hush \n",
        "RING_INTERFACE": "eth1",
        "RING_SEAL": "auth",
    }
    config = RingConfig.from_env(RING | more)
    assert config.right == Address("192.168.0.7", 1501)
    assert config.master == Address("192.168.0.2", 1234)
    assert (config.secret, config.interface, config.seal) == (b"hush", "eth1", "auth")
    assert "hush" not in repr(config)


def test_both_may_say_the_same() -> None:
    assert RingConfig.from_env(RING | TORCHRUN | {"RANK": "0"}).rank == 0


@pytest.mark.parametrize(
    ("environ", "present"),
    [
        ({}, False),
        ({"RANK": "0"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RING_RANK": "0"}, True),
        ({"RING_WORLD_SIZE": "2"}, True),
        ({"RING_CONFIG": "x"}, True),
        ({"RING_RANK": ""}, False),
        ({"RING_PORT": "1", "RING_SECRET": "x"}, False),
    ],
)
def test_present(environ: dict[str, str], present: bool) -> None:
    assert RingConfig.present(environ) is present


WRONG: list[tuple[dict[str, str], str]] = [
    ({}, "no ring in the environment: set RING_RANK, RING_WORLD_SIZE, RING_PORT and RING_RIGHT, or start the ranks"),
    ({"RING_RANK": "0"}, "RING_WORLD_SIZE is missing; a ring needs RING_RANK and RING_WORLD_SIZE on every rank."),
    ({"RING_WORLD_SIZE": "2"}, "RING_RANK is missing; a ring needs RING_RANK and RING_WORLD_SIZE on every rank."),
    (RING | {"RING_RANK": "one"}, "RING_RANK is 'one'; it must be a whole number."),
    (RING | {"RING_RANK": "2"}, "rank is 2, but world size 2 has ranks 0 to 1."),
    (RING | {"RING_RANK": "-1"}, "rank is -1, but world size 2 has ranks 0 to 1."),
    (RING | {"RING_WORLD_SIZE": "0"}, "world size is 0; it must be from 1 to 256."),
    (RING | {"RING_WORLD_SIZE": "257"}, "world size is 257; it must be from 1 to 256."),
    (RING | {"RING_PORT": "70000"}, "RING_PORT is '70000'; a port is a number from 1 to 65535."),
    (RING | {"RING_PORT": "0"}, "RING_PORT is '0'; a port is a number from 1 to 65535."),
    (RING | {"RING_RIGHT": "http"}, "RING_RIGHT is 'http'; a port is a number from 1 to 65535."),
    (RING | {"RING_MASTER_PORT": "x"}, "RING_MASTER_PORT is 'x'; a port is a number from 1 to 65535."),
    (RING | {"RING_PORT": ""}, "RING_RIGHT is set but RING_PORT is not; RING_PORT is where this rank listens."),
    (RING | {"RING_RIGHT": ""}, "rank 0 of 2 does not know its right neighbour: set RING_RIGHT (and RING_RIGHT_IP),"),
    (RING | {"RING_RIGHT_IP": "192.168.0.7"}, "the right neighbour 192.168.0.7:1501 is another machine; links beyond"),
    (
        TORCHRUN | {"MASTER_ADDR": "192.168.0.2"},
        "the master 192.168.0.2:29501 is another machine; links beyond loopback",
    ),
    (RING | {"RANK": "1"}, "RING_RANK is 0 but RANK is 1; unset one of them."),
    (RING | {"WORLD_SIZE": "4"}, "RING_WORLD_SIZE is 2 but WORLD_SIZE is 4; unset one of them."),
    (
        TORCHRUN | {"RING_MASTER_PORT": "1"},
        "RING_MASTER_PORT is 1 but MASTER_PORT is 29501; unset one of them.",
    ),
    (
        TORCHRUN | {"RING_MASTER_IP": "localhost"},
        "RING_MASTER_IP is localhost but MASTER_ADDR is 127.0.0.1; unset one of them.",
    ),
    (
        RING | {"RING_SECRET_FILE": "/nowhere/x"},
        "the secret file /nowhere/x cannot be read: No such file or directory.",
    ),
    (RING | {"RING_SECRET": "  "}, "the secret is empty; write one with: openssl rand -hex 16"),
    (RING | {"RING_CONFIG": "/nowhere/x"}, "RING_CONFIG: /nowhere/x cannot be read: No such file or directory."),
]


@pytest.mark.parametrize(("environ", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_with_the_environment(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RingConfig.from_env(environ)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_arguments_beat_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ring.json"
    path.write_text(json.dumps({"rank": 0, "world_size": 3, "port": 10, "right_port": 11, "right_ip": "localhost"}))
    config = RingConfig.from_env({"RING_CONFIG": str(path), "RING_RANK": "2", "RING_PORT": "20"}, port=30)
    assert (config.rank, config.world_size, config.port) == (2, 3, 30)
    assert config.right == Address("localhost", 11)
    assert RingConfig.from_env({k: v for k, v in RING.items() if k != "RING_PORT"}, port=7).port == 7
    missing = RING | {"RING_SECRET_FILE": "/nowhere"}
    assert RingConfig.from_env(missing, secret=b"mine").secret == b"mine"  # the file is not even looked for


def test_the_json_file(tmp_path: Path) -> None:
    fields = {"master_ip": None, "master_port": 1, "port": "1500", "right_ip": None, "right_port": 1501}
    path = tmp_path / "ring.json"
    path.write_text(json.dumps(fields | {"rank": 1, "world_size": 2}))
    config = RingConfig.from_json(path, timeout_s=3.0)
    assert (config.rank, config.port, config.timeout_s) == (1, 1500, 3.0)
    assert config.right == Address("127.0.0.1", 1501)
    assert config.master == Address("127.0.0.1", 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON: "),
        (
            "[1]",
            "holds no object; its fields are master_ip, master_port, port, right_ip, right_port, rank, world_size.",
        ),
        ('{"rnak": 1}', "has an unknown field 'rnak'; known are master_ip, "),
        ('{"rank": true}', "'rank' is True; it must be a number or a string."),
        ('{"rank": [1]}', "'rank' is [1]; it must be a number or a string."),
        ('{"rank": "x", "world_size": 2}', "'rank' in RING_CONFIG is 'x'; it must be a whole number."),
        ('{"rank": 0, "world_size": 2, "port": -1}', "'port' in RING_CONFIG is '-1'; a port is a number from 1 to"),
    ],
)
def test_what_is_wrong_with_a_json_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ring.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        RingConfig.from_env({"RING_CONFIG": str(path)})
    assert message in str(caught.value)
    assert "RING_CONFIG" in str(caught.value)


CLUSTER = """
[[node]]
host = "mac-a.local"
device = "mps"
weight = 2

[[node]]
host = "fe80::1"
port = 1501
model = "/models/llama"
weight = 0.5
"""


def test_the_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "ring.toml"
    path.write_text(CLUSTER)
    nodes = load_cluster_file(path)
    assert nodes == (Node("mac-a.local", 7600, "mps", None, 2), Node("fe80::1", 1501, None, "/models/llama", 0.5))
    config = RingConfig.from_nodes(nodes, 1, secret=b"s", interface="en0")
    assert (config.rank, config.world_size, config.port, config.interface) == (1, 2, 1501, "en0")
    assert config.right == Address("mac-a.local", 7600)
    assert str(RingConfig.from_nodes(nodes, 0, secret=b"s").right) == "[fe80::1]:1501"


def test_a_cluster_file_says_how_links_are_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ring.toml"
    path.write_text('seal = "auth"\n' + CLUSTER)
    nodes = load_cluster_file(path)
    assert [RingConfig.from_nodes(nodes, rank, secret=b"s").seal for rank in (0, 1)] == ["auth", "auth"]
    monkeypatch.setenv("RING_SEAL", "off")
    assert RingConfig.from_nodes(nodes, 0, secret=b"s").seal == "off"
    assert RingConfig.from_nodes(nodes, 0, secret=b"s", seal="on").seal == "on"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node = [", " is not TOML: "),
        ("", " has no [[node]] tables; write one a rank, in rank order."),
        ("node = 3", " has no [[node]] tables; write one a rank, in rank order."),
        ("[[node]]\nport = 1", "[[node]] 0 in "),
        ("node = [1]", " has no host."),
        ('[[node]]\nhost = "a"\nprot = 1', " unknown key 'prot'; known are host, port, device, model, weight, seal."),
        ('[[node]]\nhost = "a"\nport = "1"', ": 'port' is '1', which is of the wrong type."),
        ('[[node]]\nhost = "a"\nport = true', ": 'port' is True, which is of the wrong type."),
        ('[[node]]\nhost = "a"\nport = 70000', "is 70000; a port is a number from 1 to 65535."),
    ],
)
def test_what_is_wrong_with_a_cluster_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ring.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_cluster_file(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_cluster_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        load_cluster_file(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_cluster_file(tmp_path / "binary.toml")


def test_nodes() -> None:
    nodes = parse_nodes("a:1, b:2,[::1]:3,c")
    assert [node.address for node in nodes] == [("a", 1), ("b", 2), ("::1", 3), ("c", 7600)]
    for text in ("", "a:1,", ":1", "a:x", "a:0", "[::1"):
        with pytest.raises(ConfigError, match="--nodes"):
            parse_nodes(text)
    with pytest.raises(ConfigError, match="node rank is 4, but there are 4 nodes, 0 to 3"):
        RingConfig.from_nodes(nodes, 4)
    with pytest.raises(ConfigError, match="two nodes are a:1; give each a host or a port of its own"):
        RingConfig.from_nodes(parse_nodes("a:1,b:1,a:1"), 0)
    assert RingConfig.from_nodes(parse_nodes("a:1"), 0).world_size == 1


def test_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, empty = tmp_path / "secret", tmp_path / "empty"
    path.write_bytes(b"from the file\n")
    empty.write_bytes(b" \n")
    assert read_secret({}) is None
    assert read_secret({"RING_SECRET": "x", "RING_SECRET_FILE": str(path)}) == b"x"
    assert read_secret({"RING_SECRET_FILE": str(path)}) == b"from the file"
    assert read_secret({"RING_SECRET": "x"}, path) == b"from the file"  # a flag
    with pytest.raises(ConfigError, match="is empty; write one with: openssl rand -hex 16 > "):
        read_secret({}, empty)
    monkeypatch.setenv("RING_SECRET", "y")
    assert RingConfig.from_nodes(parse_nodes("a:1,b:1"), 0).secret == b"y"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"port": 70_000}, "the port this rank listens on is 70000; a port is a number from 1 to 65535."),
        ({"rank": 3, "world_size": 3}, "rank is 3, but world size 3 has ranks 0 to 2."),
        ({"world_size": 2}, "rank 0 of 2 does not know its right neighbour: "),
    ],
)
def test_checked_however_it_is_made(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RingConfig(**fields)
    assert str(caught.value).startswith(message)
    with pytest.raises(ConfigError):
        RingConfig().replace(**fields)


def test_addresses() -> None:
    assert parse_address("host:1", "x") == ("host", 1)
    assert parse_address("::1", "x", 5) == ("::1", 5)
    assert parse_address("[fe80::1%eth0]:9", "x") == ("fe80::1%eth0", 9)
    with pytest.raises(ConfigError, match=r"x holds 'host'; write HOST:PORT, or \[IPV6\]:PORT\."):
        parse_address("host", "x")
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "10.0.0.1", "fe80::1%eth0", "no.invalid", "a..b", ""))


def test_reading_a_configuration_loads_no_torch() -> None:
    code = "import sys, ringlm.ring, ringlm.ring.config; ringlm.ring.RingConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_ring_s_names() -> None:
    import ringlm.ring

    assert all(getattr(ringlm.ring, name) is not None for name in ringlm.ring.__all__)
    with pytest.raises(AttributeError, match=r"module 'ringlm\.ring' has no attribute 'Nothing'"):
        _ = ringlm.ring.Nothing
