"""`ringlm join` and the secret: what is refused before an engine starts, and by which words."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringlm.cluster.joining import Offer
from ringlm.cluster.local import free_ports
from ringlm.cluster.rendezvous import Rendezvous
from ringlm.cluster.spec import EngineSpec
from ringlm.errors import ConfigError
from ringlm.frontend import join
from ringlm.frontend.cli import main
from ringlm.frontend.secret import kept_at, secret_to_join, secret_to_lead
from ringlm.ring import RingConfig
from ringlm.ring.address import Address
from ringlm.ring.listener import open_listener


@pytest.fixture(autouse=True)
def specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[EngineSpec]:
    """Nothing is kept yet; what would become an engine is noted here instead, and ends with status 7."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    made: list[EngineSpec] = []

    def serve(spec: EngineSpec) -> None:
        made.append(spec)
        raise SystemExit(7)

    monkeypatch.setattr(join, "serve_rank", serve)
    return made


@contextlib.contextmanager
def lobby(model: Path | str, secret: bytes = b"right", examines: bool = False) -> Iterator[str]:
    """The address of a rank 0 that has all its ranks, or examines machines."""
    listener = open_listener(RingConfig(secret=secret, interface="127.0.0.1"))
    rendezvous = Rendezvous(listener, "", Offer(str(model), 2, examines=examines), lambda member: None, lambda: None)
    try:
        yield f"127.0.0.1:{listener.port}"
    finally:
        rendezvous.close("the test is over.")
        listener.close()


def test_what_is_known_here_goes_to_the_engine(
    tiny_llama: Path, specs: list[EngineSpec], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RING_SECRET", "right")
    with lobby(tiny_llama) as rank0, pytest.raises(SystemExit):
        main(["join", rank0, "--device", "cpu", "--threads", "3"])
    (spec,) = specs
    assert (spec.model, spec.device, spec.threads) == (str(tiny_llama), "cpu", 3)
    assert str(spec.join) == rank0
    assert capsys.readouterr().err == f"ringlm: the ring at {rank0} has its 2 ranks; this one waits as a spare.\n"


REFUSED: list[tuple[dict[str, str], list[str], int, str]] = [
    ({"RING_SECRET": "wrong"}, [], 2, "AuthenticationError: rank 0 ({}) holds another secret; give every rank"),
    ({}, [], 2, "has a secret and this rank has none; give every rank the same one."),
    ({"RING_SECRET": "right"}, [], 2, "ModelError: rank 0 serves /not/here, which is not to be had here: "),
    ({"RING_SECRET": "right"}, ["-m", "/nor/here"], 2, "ModelError: /nor/here: no such file"),
    ({"RING_SECRET": "right"}, ["-m", "demo", "--device", "tpu"], 2, "--device tpu is not known"),
    ({"RING_SECRET_FILE": "/no/secret"}, [], 2, "the secret file /no/secret cannot be read: No such file"),
]


@pytest.mark.parametrize(("environ", "arguments", "status", "says"), REFUSED, ids=[says for *_, says in REFUSED])
def test_what_is_in_the_way(
    environ: dict[str, str],
    arguments: list[str],
    status: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with lobby("/not/here") as rank0:
        assert main(["join", rank0, *arguments]) == status
    assert says.format(rank0) in capsys.readouterr().err


def test_nobody_is_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "_SOON_S", 0.1)
    monkeypatch.setattr(join, "_ASK_S", 0.5)
    assert main(["join", f"127.0.0.1:{free_ports(1)[0]}"]) == 1
    soon, late = capsys.readouterr().err.splitlines()
    assert "Connection refused" in soon
    assert soon.endswith("Trying for 0.5 s.")
    assert late.startswith("ringlm: ConnectError: rank 0 could not be reached at 127.0.0.1:")


def test_the_secret_is_made_once_and_for_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = Address("127.0.0.1", 7600), Address("192.0.2.9", 7600)
    assert secret_to_join(None, here) is None
    made = secret_to_lead(None)
    assert re.fullmatch(rb"[0-9a-f]{32}", made)
    assert kept_at().stat().st_mode & 0o777 == 0o600
    assert secret_to_lead(None) == secret_to_join(None, here) == made
    (tmp_path / "given").write_text("given\n")
    assert secret_to_lead(tmp_path / "given") == secret_to_join(tmp_path / "given", elsewhere) == b"given"
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(ConfigError, match="there is no terminal to ask for it here: give --secret-file, or set"):
        secret_to_join(None, elsewhere)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []
    monkeypatch.setattr("getpass.getpass", lambda prompt: asked.append(prompt) or " typed\n")
    assert secret_to_join(None, elsewhere) == b"typed"
    assert asked == ["Secret of the ring at 192.0.2.9:7600: "]
    kept_at().chmod(0o644)
    with pytest.raises(ConfigError, match=r"others may read .*ring\.secret; remove it"):
        secret_to_lead(None)


class Command:
    """A `ringlm` command as a process, and what it has said."""

    def __init__(self, log: Path, *arguments: str, **environ: str) -> None:
        self._log = log
        command = [sys.executable, "-m", "ringlm", *arguments]
        with log.open("w") as said:
            self.process = subprocess.Popen(
                command, env=os.environ | environ, stdin=subprocess.DEVNULL, stderr=said, text=True
            )

    def said(self) -> str:
        return self._log.read_text()

    def until(self, words: str) -> None:
        deadline = time.monotonic() + 90
        while words not in self.said():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def end(self) -> int:
        """Its status after SIGTERM."""
        self.process.terminate()
        return self.process.wait(90)


def test_one_command_here_and_one_there(tiny_llama: Path, tmp_path: Path) -> None:
    """The secret is made, both find it, and each ends in order at a signal."""
    port, http = map(str, free_ports(2))
    common = {"OMP_NUM_THREADS": "1", "RING_INTERFACE": "127.0.0.1"}
    with contextlib.ExitStack() as stack:

        def start(name: str, *arguments: str, **environ: str) -> Command:
            command = Command(tmp_path / name, *arguments, **common, **environ)
            stack.callback(command.process.wait)
            stack.callback(command.process.kill)
            return command

        rank0 = start("0", "serve", "-m", str(tiny_llama), "--world-size", "2", "--port", http, RING_PORT=port)
        rank0.until(f"they need the secret in {kept_at()}")
        assert f"waiting for 1 to join, each by: ringlm join 127.0.0.1:{port}" in rank0.said()
        rank1 = start("1", "join", f"127.0.0.1:{port}")
        rank0.until("ready: http")
        assert kept_at().read_text() not in rank0.said()  # it is for terminals only
        assert main(["status", f"127.0.0.1:{http}"]) == 0
        assert rank0.end() == 0, rank0.said()
        rank1.until("has ended. Waiting for the ring to be formed again.")
        assert rank1.end() == 143
        assert f"joining the ring of 2 ranks at 127.0.0.1:{port}, which serves {tiny_llama}.\n" in rank1.said()
