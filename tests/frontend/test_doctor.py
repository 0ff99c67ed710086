"""`ringlm doctor`: what findings mean, what is shown, what is refused; and two hosts with a slow cable between them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ringlm.cluster import examination
from ringlm.cluster.agreement import Capabilities, propose
from ringlm.cluster.examination import Examined, Findings, Interface
from ringlm.cluster.local import free_ports
from ringlm.cluster.memory import Memory
from ringlm.cluster.settings import Settings
from ringlm.errors import ConfigError, ConnectError
from ringlm.frontend import doctor
from ringlm.frontend.cli import main
from ringlm.frontend.diagnosis import Machine, MachineLink, Outlook, Report, advice, expect, refuse
from ringlm.frontend.doctor_view import show_links, show_machines, show_outlook
from ringlm.weights.files import open_model
from tests.frontend.test_join import lobby
from tests.namespaces import Meshed, needs_namespaces

ETH = Interface("eth0", 1000, wireless=False)
FOUND = Findings(
    host="a", system="Linux", python="3.12.1", ringlm="0.1.0", protocol=7, torch="2.13.0+cpu", device="cpu",
    devices=["cpu Some"], threads=4, dtype="bfloat16", read_bytes_per_s=20e9, flops=1e12, interfaces={"10.0.0.1": ETH},
)  # fmt: skip
GIGABIT = 117e6


def machine(rank: int, **changes: Any) -> Machine:
    return Machine(rank, f"10.0.0.{rank + 1}", 16 << 30, msgspec.structs.replace(FOUND, host="abc"[rank], **changes))


def link(there: float = GIGABIT, back: float = GIGABIT, trip_s: float = 1e-4, **changes: Any) -> MachineLink:
    return msgspec.structs.replace(MachineLink(0, 1, "eth0", "eth0", trip_s, there, back), **changes)


TWO = [machine(0), machine(1)]


def test_nothing_is_said_of_what_is_well() -> None:
    assert advice(TWO, [link()], None) == []
    refuse(TWO, [link()])


ADVICE: list[tuple[list[Machine], MachineLink, str]] = [
    (
        TWO,
        link(there=12e6),
        r"^The link between rank 0 \(a\) and rank 1 \(b\) carries 96 Mbit/s from rank 0 \(a\) to rank",
    ),
    (
        TWO,
        link(back=12e6),
        r"carries 96 Mbit/s from rank 1 \(b\) to rank 0 \(a\), and 936 Mbit/s the other way: another",
    ),
    (TWO, link(12e6, 12e6), r"carries 96 Mbit/s of the 1 Gbit/s claimed: try another cable, port or switch\.$"),
    ([machine(rank, interfaces={}) for rank in (0, 1)], link(12e6, 12e6), r"carries only 96 Mbit/s: prompts wait"),
    (
        [TWO[0], machine(1, interfaces={"x": Interface("wlan0", 0, wireless=True)})],
        link(20e6, 18e6, other_interface="wlan0"),
        r"carries 144 Mbit/s over Wi-Fi, of rank 1 \(b\): a cable is faster",
    ),
    (TWO, link(trip_s=4e-3), r"takes 4\.0 ms for a round trip"),
    (TWO, MachineLink(0, 1, why="timed out."), r"was not measured, and the ring would lead round it: timed out\.$"),
    ([TWO[0], machine(1, torch="2.12.0")], link(), r"^torch is 2\.13\.0\+cpu on rank 0, 2\.12\.0 on rank 1: "),
    (
        [TWO[0], machine(1, devices=["cpu", "cuda:0 GPU"])],
        link(),
        r"rank 1 \(b\) computes on its cpu and has cuda:0 GPU",
    ),
]


@pytest.mark.parametrize(("machines", "measured", "says"), ADVICE, ids=[says for *_, says in ADVICE])
def test_what_would_help(machines: list[Machine], measured: MachineLink, says: str) -> None:
    (said,) = advice(machines, [measured], None)
    assert re.search(says, said), said


def test_what_must_be_mended() -> None:
    with pytest.raises(
        ConfigError, match=r"rank 1 \(b\) has torch 2\.9\.1, and 2\.11 is the oldest that will do; there: "
    ):
        refuse([TWO[0], machine(1, torch="2.9.1")], [link()])
    with pytest.raises(ConnectError, match=r"rank 0 \(a\) does not reach rank 1 \(b\), .* timed out\. On b let it in"):
        refuse(TWO, [MachineLink(0, 1, why="timed out.")])
    refuse(
        [*TWO, machine(2)], [link(), MachineLink(0, 2, why="timed out."), link(rank=1, other=2)]
    )  # it leads round it


def outlook(model: Path, machines: list[Machine], links: list[MachineLink]) -> Outlook:
    files = open_model(str(model))
    settings = Settings(dtype="float32")
    ranks = [Capabilities(one.rank, "cpu", ["float32"], settings, Memory(one.address, 1 << 34)) for one in machines]
    return expect(files, propose(ranks, files), machines, links)


def test_what_a_model_would_do(tiny_llama: Path) -> None:
    """A step reads each rank's weights and waits for a sum twice a layer, and three more."""
    alone = outlook(tiny_llama, TWO[:1], [])
    assert (alone.sums, alone.limit, alone.slowest) == (0, "memory", None)
    assert alone.tokens_per_s == pytest.approx(20e9 / alone.shares[0].read_bytes)
    slow = link(there=1e6, trip_s=2e-3)
    both = outlook(tiny_llama, TWO, [slow])
    hidden = 36 * 4
    assert (both.sums, both.limit, both.slowest) == (2 * 3 + 3, "links", (0, 1))
    assert both.sum_s == pytest.approx(1e-3 + hidden / 1e6)
    assert both.tokens_per_s == pytest.approx(1 / (both.read_s + 9 * both.sum_s))
    assert both.prompt_tokens_per_s < 1e6 / (2 * 3 * hidden)
    assert outlook(tiny_llama, TWO, []).sum_s < 1e-4  # on one machine


def test_links_that_lead_by_way_of_others_count_twice(tiny_llama: Path) -> None:
    three = [*TWO, machine(2)]
    chain = [link(), link(rank=1, other=2, round_trip_s=4e-3), MachineLink(0, 2, why="timed out.")]
    found = outlook(tiny_llama, three, chain)
    assert found.slowest == (1, 2)
    assert found.sum_s > 2 * (2e-3 + 5e-5)


def test_a_split_is_proposed_where_one_reads_slower(tiny_llama: Path) -> None:
    machines = [TWO[0], machine(1, read_bytes_per_s=10e9)]
    found = outlook(tiny_llama, machines, [link()])
    assert found.split == [2.0, 1.0]
    assert "Ranks wait for the slowest: --split 2,1 would" in " ".join(advice(machines, [link()], found))
    assert advice(TWO, [link()], outlook(tiny_llama, TWO, [link()])) == []


def test_the_screen(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(TWO, [link(there=12e6), MachineLink(1, 2, why="timed out.")], outlook(tiny_llama, TWO, [link()]))
    show_machines(report)
    show_links(report)
    show_outlook(report)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0", "a", "cpu", "4", "17.2", "GB", "20.0", "GB/s", "1", "TFLOP/s"] in lines
    assert ["ranks", "0,", "1:", "ringlm", "0.1.0,", "Python", "3.12.1,", "torch", "2.13.0+cpu,", "Linux"] in lines
    assert ["0", "–", "1", "eth0", "–", "eth0", "0.10", "ms", "96", "Mbit/s", "936", "Mbit/s"] in lines
    assert ["1", "–", "2", "not", "measured"] in lines
    assert ["Nothing", "is", "in", "the", "way."] in lines


# -- the command -------------------------------------------------------------------------------


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This machine's examination, without taking its time."""
    one = Examined(FOUND, Capabilities(-1, "cpu", ["float32"], Settings(), Memory("here", 1 << 30)))
    monkeypatch.setattr(doctor, "examine", lambda device, threads: one)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("RING_PORT", str(free_ports(1)[0]))


def test_alone(examined: None, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "-m", str(tiny_llama), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["problem"], said["links"], said["advice"]) == (None, [], [])
    assert said["machines"][0]["findings"]["torch"] == "2.13.0+cpu"
    assert said["outlook"]["shares"][0]["read_bytes"] > 0


def test_a_port_that_is_taken_is_named_with_who_has_it(examined: None, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", int(os.environ["RING_PORT"]))):
        assert main(["doctor", "--json"]) == 2
    said = capsys.readouterr()
    assert f"is taken by another program; set RING_PORT to a free one. It is process {os.getpid()}, " in said.err
    assert json.loads(said.out)["problem"].startswith("port ")


WRONG = [
    (["-n", "2", "HOST"], "HOST, -n, --nodes and --config each say who is examined"),
    (["-n", "0"], "-n is 0"),
    (["--node-rank", "1"], "--node-rank needs --nodes or --config"),
    (["--nodes", "a,b"], "which of the 2 nodes is this? Give --node-rank 0 to 1"),
]


@pytest.mark.parametrize(("arguments", "says"), WRONG, ids=[says for _, says in WRONG])
def test_what_is_wrong(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_doctors_and_rings_tell_each_other_apart(
    examined: None, tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RING_SECRET", "right")
    monkeypatch.setenv("RING_PORT", "0")
    with lobby(str(tiny_llama)) as rank0:
        assert main(["doctor", rank0]) == 2
        assert f"at {rank0} a ring is served, which is not examined" in capsys.readouterr().err
    with lobby("", examines=True) as rank0:
        assert main(["join", rank0]) == 2
        assert f"no ring is formed; type here: ringlm doctor {rank0}" in capsys.readouterr().err


def test_a_torch_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, *ended)

    monkeypatch.setattr(examination.subprocess, "run", run)
    ended = 1, b"", b"Traceback\nImportError: libtorch.so: no such file\n"
    with pytest.raises(ConfigError, match=r"torch does not work in .*: ImportError: libtorch\.so: .* -m pip install"):
        examination.examine("auto", None)
    ended = 2, b"", b"--device tpu is not known\n"
    with pytest.raises(ConfigError, match=r"^--device tpu is not known$"):
        examination.examine("tpu", None)


def test_a_model_that_is_not_there(examined: None, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "-m", "/not/here"]) == 2
    assert "/not/here: no such file" in capsys.readouterr().err


# -- two hosts ---------------------------------------------------------------------------------


@pytest.fixture
def hosts() -> Iterator[Meshed]:
    with Meshed(2) as made:
        yield made


@needs_namespaces
def test_a_slow_cable_between_two_hosts_is_named(hosts: Meshed, tiny_llama: Path) -> None:
    hosts.throttle(1, 0, "100mbit")
    first = hosts.start(0, "-m", "ringlm", "doctor", "-n", "2", "-m", str(tiny_llama), "--threads", "1", "--json")
    second = hosts.start(1, "-m", "ringlm", "doctor", hosts.address(0, 1), "--threads", "1")
    out, err = first.communicate(timeout=100)
    assert (first.returncode, second.wait(90)) == (0, 0), err
    report = json.loads(out)
    (measured,) = report["links"]
    assert (measured["rank"], measured["other"], measured["interface"]) == (0, 1, "to1")
    assert measured["from_other_bytes_per_s"] == pytest.approx(100e6 / 8, rel=0.15)
    assert measured["to_other_bytes_per_s"] > 2 * 100e6 / 8
    assert any("carries" in said and "Mbit/s from rank 1 (" in said for said in report["advice"])
    assert report["outlook"]["slowest"] == [0, 1]
