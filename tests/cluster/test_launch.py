"""`ringlm launch` over ssh, and what it starts again: a ring between addresses of loopback, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from ringlm.cluster.hosts import Host, parse_hosts, ring_of
from ringlm.cluster.launch import _survives
from ringlm.cluster.local import free_ports
from ringlm.cluster.order import Order
from ringlm.cluster.rank_process import RankProcess
from ringlm.errors import ConfigError
from ringlm.frontend.cli import main

SECRET = "0123456789abcdef-launched"


@pytest.fixture
def ssh(tmp_path: Path) -> dict[str, str]:
    """An environment in which ssh is a fake, which writes down who is called, and the ring's secret is in a file."""
    script = tmp_path / "bin" / "ssh"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "fake_ssh.py"} "$@"\n')
    script.chmod(0o755)
    (tmp_path / "secret").write_text(SECRET)
    return {
        "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}",
        "FAKE_SSH_LOG": str(tmp_path / "ssh.log"),
        "RING_SECRET_FILE": str(tmp_path / "secret"),
        "MARK": str(tmp_path),  # by which to find all processes of a test
    }


class Launch:
    """A launch over two hosts; `said` is its stderr, line by line."""

    def __init__(self, environ: dict[str, str], hosts: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "ringlm", "launch", "--port", str(free_ports(1)[0]), "--hosts", hosts]
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen([*command, *arguments], env=os.environ | environ, text=True, **pipes)
        self.mark = f"MARK={environ['MARK']}".encode()
        self.log = Path(environ["FAKE_SSH_LOG"])
        self.said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.heard: list[str] = []
        threading.Thread(target=self._listen, args=(self.process.stderr,), daemon=True).start()

    def _listen(self, stream: IO[str]) -> None:
        for line in stream:
            self.said.put(line)
        self.said.put(None)

    def until(self, words: str | None = None) -> str:
        """What it says, to the line with these words or to its end."""
        while (line := self.said.get(timeout=90)) is not None:
            self.heard.append(line)
            if words is not None and words in line:
                return line
        assert words is None, self.heard
        return "".join(self.heard)

    def finish(self) -> tuple[int, str, str]:
        assert self.process.stdout is not None
        out, err = self.process.stdout.read(), self.until()
        return self.process.wait(90), out, err

    def processes(self) -> dict[int, bytes]:
        """All that were started by it, with their command lines."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                ours = self.mark in (process / "environ").read_bytes().split(b"\0")
                if ours and int(process.name) != self.process.pid:
                    found[int(process.name)] = (process / "cmdline").read_bytes()
        return found

    def gone(self) -> bool:
        deadline = time.monotonic() + 90
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.processes()


@contextlib.contextmanager
def launched(environ: dict[str, str], hosts: str, *arguments: str) -> Iterator[Launch]:
    launch = Launch(environ, hosts, *arguments)
    try:
        yield launch
    finally:
        launch.process.kill()
        launch.process.wait()
        assert launch.gone(), launch.processes()


def test_ranks_run_on_hosts_and_the_secret_is_nowhere_to_be_seen(ssh: dict[str, str], tiny_llama: Path) -> None:
    bench = ["bench", "-m", str(tiny_llama), "-p", "8", "-n", "64", "-r", "1", "--json"]
    with launched(ssh, "me@127.0.0.2,127.0.0.3", "--", *bench) as launch:
        seen = 0
        while launch.process.poll() is None:
            for pid in launch.processes():
                with contextlib.suppress(OSError):
                    shown = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
                    assert SECRET.encode() not in shown
                    seen += 1
            time.sleep(0.1)
        assert seen
        status, out, err = launch.finish()
        assert status == 0, err
        assert json.loads(out)["world_size"] == 2
        (called,) = launch.log.read_text().splitlines()  # the other host is this machine
        assert " me@127.0.0.2 -T -o BatchMode=yes " in called
        assert SECRET not in called


@pytest.mark.parametrize("hosts", ["me@127.0.0.2,127.0.0.3", "127.0.0.2,me@127.0.0.3"])
def test_sigterm_drains_wherever_rank_0_is(ssh: dict[str, str], tiny_llama: Path, hosts: str) -> None:
    with launched(ssh, hosts, "--", "serve", "-m", str(tiny_llama), "--port", "0") as launch:
        assert launch.until("ready: http://").startswith(f"[rank 0 {hosts.partition(',')[0]}] ringlm: ready")
        launch.process.send_signal(signal.SIGTERM)
        status, _, err = launch.finish()
        assert status == 0, err
        assert "ending; answers under way" in err
        assert launch.gone()


@pytest.mark.parametrize("killed", ["launcher", "link", "far end"])
def test_nothing_is_left_of_what_is_cut_off(ssh: dict[str, str], tiny_llama: Path, killed: str) -> None:
    hosts = "127.0.0.2,me@127.0.0.3"
    serve = ["serve", "-m", str(tiny_llama), "--port", "0", "--rejoin-timeout", "0"]
    with launched(ssh, hosts, "--", *serve) as launch:
        launch.until("ready: http://")
        far_end = next(pid for pid, line in launch.processes().items() if b"ringlm.cluster.remote\0" in line)
        link = int(launch.log.read_text().split()[0])
        pid = {"launcher": launch.process.pid, "link": link, "far end": far_end}[killed]
        os.kill(pid, signal.SIGKILL)
        status, _, err = launch.finish()
        # Of the others' ends rank 0 tells, with 1, unless it takes so long that it is ended.
        assert status in ((-9,) if killed == "launcher" else (1, 137)), err
        assert launch.gone()


def test_a_daemon_that_is_killed_comes_back(ssh: dict[str, str], tiny_llama: Path) -> None:
    """The launcher starts it again, and the ring takes it in again; where it may not any more, rank 0 goes on."""
    http = free_ports(1)[0]
    serve = ["serve", "-m", str(tiny_llama), "--port", str(http)]
    with launched(ssh, "127.0.0.2,me@127.0.0.3", "--restarts", "1", "--", *serve) as launch:
        launch.until("ready: http://")
        daemon = next(pid for pid, line in launch.processes().items() if is_daemon(line))
        os.kill(daemon, signal.SIGKILL)
        launch.until("rank 1 me@127.0.0.3 ended with status 137; started again in 0.5 s (restarts left: 1)")
        launch.until("[rank 1 me@127.0.0.3] ringlm: rank 1 of 2 ready")
        deadline = time.monotonic() + 90
        while (status := main(["status", f"127.0.0.1:{http}"])) != 0 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert status == 0
        daemon = next(pid for pid, line in launch.processes().items() if is_daemon(line))
        os.kill(daemon, signal.SIGKILL)
        launch.until("rank 1 ended with status 137; rank 0 goes on")
        launch.process.send_signal(signal.SIGTERM)
        ended, _, err = launch.finish()
        assert ended == 0, err


def is_daemon(command: bytes) -> bool:
    """Whether it is the engine process of a rank other than 0."""
    return b"ringlm.cluster.worker\0" in command and b"--channel" not in command


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--hosts", "nowhere,me@127.0.0.3"], 1, "ConnectError: rank 0 could not be started on nowhere"),
        (["--python", "/no/python"], 2, "ConfigError: there is no /no/python on me@127.0.0.2; name a Python with"),
    ],
)
def test_a_host_that_starts_nothing(
    ssh: dict[str, str], tiny_llama: Path, arguments: list[str], status: int, says: str
) -> None:
    run = ["run", "-m", str(tiny_llama), "--prompt", "x"]
    with launched(ssh, "me@127.0.0.2,me@127.0.0.3", *arguments, "--", *run) as launch:
        ended, out, err = launch.finish()
        assert (ended, out) == (status, "")
        assert says in err
        assert "[rank 0 " in err  # what ssh or the shell had to say


def test_hosts() -> None:
    assert parse_hosts("a,me@b, fe80::1%en0") == (Host("a"), Host("b", "me"), Host("fe80::1%en0"))
    assert [Host("127.0.0.1").here, Host("127.0.0.1", "me").here, Host("no.invalid").here] == [True, False, False]
    ring = ring_of(parse_hosts("a,a,10.0.0.2"), 7600)
    assert [config.port for config in ring] == [7600, 7601, 7600]
    assert [str(config.right) for config in ring] == ["a:7601", "10.0.0.2:7600", "a:7600"]
    assert [config.interface for config in ring] == [None, None, "10.0.0.2"]
    assert len({config.secret for config in ring}) == 1
    for text in ("", "a,", "-a", "a b", "me@", "a;b"):
        with pytest.raises(ConfigError, match="write HOST or USER@HOST"):
            parse_hosts(text)


@pytest.mark.parametrize(
    ("code", "starts", "status"),
    [("sys.exit(1)", 3, 1), ("os.kill(os.getpid(), 9)", 3, -9), ("sys.exit(2)", 1, 2), ("sys.exit(0)", 1, 0)],
)
def test_what_is_started_again(monkeypatch: pytest.MonkeyPatch, code: str, starts: int, status: int) -> None:
    monkeypatch.setattr("ringlm.cluster.rank_process._BACKOFF_S", 0.01)
    started = []

    def start(order: Order, parent_fd: int, **streams: Any) -> subprocess.Popen[bytes]:
        started.append(order)
        return subprocess.Popen([sys.executable, "-c", f"import os, sys; {code}"], **streams)

    monkeypatch.setattr(Order, "start", start)
    rank = RankProcess(1, Order(argv=[], environment={}), None, None, 2, 0)
    rank.start()
    deadline = time.monotonic() + 90
    while (ended := rank.poll()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (ended, len(started)) == (status, starts)
    assert rank.close() == status


@pytest.mark.parametrize(
    ("command", "survives"),
    [
        ("serve -m MODEL", True),
        ("run -m MODEL", False),
        ("run -m MODEL --rejoin-timeout 0.5", True),
        ("run -m MODEL --rejoin-timeout=90", True),
        ("serve --rejoin-timeout 0 -m MODEL", False),
        ("serve --rejoin-timeout=0.0", False),
    ],
)
def test_whose_rank_0_survives_a_daemon(command: str, survives: bool) -> None:
    assert _survives(command.split()) is survives
