"""The main job, as a user does it: the demo model answers, in one terminal and in two, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringlm.cluster.local import free_ports
from tests.tiny import save_llama

RINGLM = [sys.executable, "-m", "ringlm"]
MARK = f"ringlm-test-{os.getpid()}"  # in the environment of what is started here, to tell it from others
ASK = ["run", "-m", "demo", "--dtype", "float32", "--prompt", "What is the capital of France?"]
TELL = [*ASK[:5], "--prompt", "Tell me a story that never ends.", "--max-tokens", "2000", "--temperature", "0"]
BRIEF = ["--max-tokens", "24", "--temperature", "0", "--json"]


def ringlm(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*RINGLM, *arguments], env=os.environ | environment | {"MARK": MARK}, text=True, **pipes)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def engines() -> set[int]:
    """Every engine process that was started from here, by id."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"MARK={MARK}".encode() in (process / "environ").read_bytes()
            if ours and b"ringlm.cluster.worker" in (process / "cmdline").read_bytes():
                found.add(int(process.name))
        except OSError:
            continue  # it has just ended
    return found


@pytest.fixture(scope="module")
def alone(demo_gguf: Path) -> dict[str, object]:
    """What one rank answers."""
    status, out, err = finish(ringlm(*ASK, *BRIEF))
    assert (status, err) == (0, "")
    return json.loads(out)


def test_one_rank_answers_with_sense(alone: dict[str, object]) -> None:
    assert "Paris" in str(alone["text"])
    assert alone["finish_reason"] == "stop"
    assert alone["world_size"] == 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_launched_ranks_say_the_same(alone: dict[str, object], world_size: int) -> None:
    before = engines()
    status, out, err = finish(ringlm("launch", "-n", str(world_size), "--", *ASK, *BRIEF))
    assert status == 0, err
    answer = json.loads(out)  # and nothing else was on stdout
    assert answer["world_size"] == world_size
    for same in ("text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens"):
        assert answer[same] == alone[same]
    assert engines() <= before


def test_two_terminals_say_the_same(alone: dict[str, object]) -> None:
    left, right = map(str, free_ports(2))
    world = {"RING_WORLD_SIZE": "2"}
    daemon = ringlm(*ASK[:5], "-i", RING_RANK="1", RING_PORT=right, RING_RIGHT=left, **world)
    first = ringlm(*ASK, *BRIEF, "--throughput", RING_RANK="0", RING_PORT=left, RING_RIGHT=right, **world)
    status, out, err = finish(first)
    assert status == 0, err
    assert json.loads(out)["token_ids"] == alone["token_ids"]
    assert finish(daemon) == (0, "", "")


def started(process: subprocess.Popen[str], count: int, before: set[int]) -> set[int]:
    """The engines of a launch, once there are `count`."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if len(engines() - before) == count:
            return engines() - before
        time.sleep(0.05)
    raise AssertionError(f"no {count} engines; the launch ended with {process.poll()}")


def gone(processes: set[int], within_s: float = 90.0) -> bool:
    deadline = time.monotonic() + within_s
    while engines() & processes and time.monotonic() < deadline:
        time.sleep(0.05)
    return not engines() & processes


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_to_the_launcher_ends_all(demo_gguf: Path, number: signal.Signals, status: int) -> None:
    before = engines()
    process = ringlm("launch", "-n", "2", "--", *TELL)
    ranks = started(process, 2, before)
    time.sleep(1.5)  # some ranks load, some answer: whatever they do, they end
    process.send_signal(number)
    assert finish(process)[0] == status
    assert gone(ranks)


def test_a_killed_daemon_ends_the_launch_and_is_named(demo_gguf: Path) -> None:
    before = engines()
    process = ringlm("launch", "-n", "2", "--", *TELL)
    ranks = started(process, 2, before)
    assert process.stdout is not None
    process.stdout.read(1)  # the answer has begun
    daemons = [rank for rank in ranks if b"--channel" not in Path(f"/proc/{rank}/cmdline").read_bytes()]
    os.kill(daemons[0], signal.SIGKILL)
    status, _, err = finish(process)
    assert status == 1
    assert "[rank 0] ringlm: PeerLostError: rank 1 " in err
    assert gone(ranks)


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["-m", "/no/such/model"], {}, "/no/such/model"),
        (["-m", "demo", "--quant", "int5"], {}, "int5"),
        (["-m", "demo", "--backend", "mpi"], {}, "mpi"),
        (["-m", "demo", "--split", "1,1"], {}, "world size 1"),
        (["-m", "demo"], {"RING_RANK": "5", "RING_WORLD_SIZE": "2"}, "rank is 5"),
        (["-m", "demo"], {"RING_RANK": "0", "RING_WORLD_SIZE": "2", "RANK": "1", "WORLD_SIZE": "2"}, "RANK is 1"),
        (["-m", "demo", "--nonsense"], {}, "--nonsense"),
    ],
)
def test_mistakes_get_one_line_and_status_2(
    demo_gguf: Path, arguments: list[str], environment: dict[str, str], says: str
) -> None:
    status, out, err = finish(ringlm("run", *arguments, "--prompt", "hi", **environment))
    assert (status, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_more_ranks_than_heads_are_refused_by_all_in_one_voice(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "tiny", num_attention_heads=2, num_key_value_heads=1)
    status, out, err = finish(ringlm("launch", "-n", "3", "--", "run", "-m", str(model), "--prompt", "hi"))
    assert (status, out) == (2, "")
    for rank in range(3):
        assert (
            f"[rank {rank}] ringlm: ConfigError: world size 3 needs at least 3 query heads; model 'tiny' has 2." in err
        )


def test_different_models_are_refused_and_both_named(tiny_llama: Path, demo_gguf: Path) -> None:
    left, right = map(str, free_ports(2))
    world = {"RING_WORLD_SIZE": "2"}
    daemon = ringlm("run", "-m", str(tiny_llama), RING_RANK="1", RING_PORT=right, RING_RIGHT=left, **world)
    first = ringlm(*ASK, RING_RANK="0", RING_PORT=left, RING_RIGHT=right, **world)
    try:
        for process in (first, daemon):
            status, out, err = finish(process)
            assert (status, out) == (1, "")
            assert "llama" in err
            assert "SmolLM2" in err
            assert "whose configuration and shapes and weights differ" in err
    finally:
        for process in (first, daemon):
            process.kill()


def test_a_wrong_secret_is_refused_by_both(tiny_llama: Path) -> None:
    left, right = map(str, free_ports(2))
    world = {"RING_WORLD_SIZE": "2"}
    model = ("run", "-m", str(tiny_llama), "--prompt", "hi")
    daemon = ringlm(*model, RING_RANK="1", RING_PORT=right, RING_RIGHT=left, RING_SECRET="peace", **world)
    first = ringlm(*model, RING_RANK="0", RING_PORT=left, RING_RIGHT=right, RING_SECRET="war", **world)
    for process in (first, daemon):
        status, out, err = finish(process)
        assert (status, out) == (2, "")
        assert "secret" in err
        assert "peace" not in err
        assert "war" not in err.replace("warning", "")
