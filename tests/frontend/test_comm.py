"""`ringlm bench comm`: its rows at tiny sizes, its mistakes, and that nothing of it is left."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringlm.cluster.comm_bench import Row
from ringlm.frontend import plot
from ringlm.frontend.cli import main

QUICK = ["bench", "comm", "--sizes", "1K,6K", "--seconds", "0.01"]


def row(backend: str, world_size: int, nbytes: int, us: float) -> Row:
    return Row(
        backend=backend,
        world_size=world_size,
        dtype="float32",
        bytes=nbytes,
        us_p50=us,
        us_p90=2 * us,
        us_p99=3 * us,
        gb_per_s=nbytes / us / 1e3,
        algorithm="direct",
    )


def children(pid: int) -> set[int]:
    found = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in found.splitlines()]
    return {child for child, parent in pairs if parent == pid}


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_json_has_a_row_for_each_backend_size_and_world_size(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--world-size", "2,3", "--dtype", "bfloat16", "--against", "gloo", "--json"]) == 0
    out = capfd.readouterr().out
    assert out.count("\n") == 1
    rows = json.loads(out)["rows"]
    assert [(r["world_size"], r["bytes"], r["backend"]) for r in rows] == [
        (2, 1024, "ring"), (2, 1024, "gloo"), (2, 6144, "ring"), (2, 6144, "gloo"),
        (3, 1024, "ring"), (3, 1024, "gloo"), (3, 6144, "ring"), (3, 6144, "gloo"),
    ]  # fmt: skip
    for r in rows:
        assert set(r) >= {"backend", "world_size", "dtype", "bytes", "us_p50", "us_p90", "gb_per_s"}
        assert r["dtype"] == "bfloat16"
        assert 0 < r["us_p50"] <= r["us_p90"] <= r["us_p99"]
        assert r["gb_per_s"] > 0
    assert rows[0]["algorithm"] == "direct"


def test_the_ring_alone_in_a_pipe_is_plain_text(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(QUICK) == 0
    captured = capfd.readouterr()
    title, columns, *lines = captured.out.splitlines()
    assert "float32" in title
    assert columns.split() == ["ranks", "bytes", "algorithm", "ring", "us", "p90", "GB/s"]
    assert [line.split()[:3] for line in lines] == [["2", "1K", "direct"], ["2", "6K", "direct"]]
    assert "gloo" not in captured.out
    assert "\x1b" not in captured.out + captured.err
    assert captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--sizes 1K,x", "--sizes holds 'x'"),
        ("--sizes 1K,", "--sizes holds ''"),
        ("--sizes -4", "--sizes holds '-4'"),
        ("--sizes 0", "--sizes holds 0"),
        ("--sizes 6", "--sizes holds 6; float32 takes 4 bytes"),
        ("--sizes 1K,1024", "--sizes has a number twice"),
        ("--world-size 1", "--world-size is 1; give 2 to"),
        ("--world-size 0", "--world-size is 0; give 2 to"),
        ("--world-size 2,two", "--world-size holds 'two'"),
        ("--dtype int7", "--dtype int7 is not known"),
        ("--against mpi", "--against mpi is not known; choose gloo or nccl"),
        ("--against nccl --device cpu", "--against nccl needs --device cuda"),
        ("--device tpu", "--device tpu is not known"),
        ("--seconds 0", "--seconds is 0"),
        ("--plot x.jpg", "--plot x.jpg is neither PNG nor SVG"),
        ("--plot nowhere/x.svg", "there is no folder nowhere"),
        ("--sizes", "--sizes"),
        ("more", "unexpected extra argument"),
    ],
)
def test_a_mistake_is_one_line(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "comm", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_nccl_without_cuda_is_one_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([*QUICK, "--against", "nccl"]) == 2
    err = capfd.readouterr().err
    assert "ConfigError: nccl needs CUDA" in err
    assert err.count("\n") == 1


def test_inside_a_ring_it_does_not_start(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RING_RANK", "0")
    monkeypatch.setenv("RING_WORLD_SIZE", "2")
    assert main(QUICK) == 2
    assert "starts its ranks itself" in capsys.readouterr().err


def test_help_shows_both_kinds_of_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "comm", "--help"]) == 0
    assert "--against" in capsys.readouterr().out
    assert main(["bench", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--concurrency" in said
    assert "ringlm bench comm" in said
    assert main(["--help"]) == 0
    assert "bench comm" in capsys.readouterr().out


def test_algorithms_are_shown_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "comm", "--algorithms", "--world-size", "2,3"]) == 0
    said = capsys.readouterr().out
    assert "2 ranks, mesh\n    all_reduce      to 524,288 bytes   direct" in said
    assert "3 ranks, chain" in said


def test_ctrl_c_leaves_no_rank() -> None:
    command = [
        sys.executable,
        "-m",
        "ringlm",
        "bench",
        "comm",
        "--sizes",
        "1K",
        "--seconds",
        "100",
        "--against",
        "gloo",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 90.0
            while len(ranks := children(process.pid)) < 2:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=90.0)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (130, "", "")
    while any(map(running, ranks)):
        assert time.monotonic() < deadline + 30.0
        time.sleep(0.05)


def test_a_rank_that_is_killed_ends_the_others() -> None:
    command = [sys.executable, "-m", "ringlm", "bench", "comm", "--sizes", "1K", "--seconds", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 90.0
            while len(ranks := children(process.pid)) < 2:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.05)
            os.kill(max(ranks), signal.SIGKILL)
            out, err = process.communicate(timeout=90.0)
        finally:
            process.kill()
    assert (process.returncode, out) == (1, "")
    assert err.count("\n") == 1
    assert "rank 1" in err
    assert not any(map(running, ranks))


def test_a_plot_without_matplotlib_is_refused_before_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*QUICK, "--plot", str(tmp_path / "x.svg")]) == 2
    err = capsys.readouterr().err
    assert "--plot needs matplotlib: pip install 'ringlm[plot]'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["x.svg", "x.PNG"])
def test_a_plot_is_drawn(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(backend, n, size, size / n) for backend in ("ring", "gloo") for n in (2, 3) for size in (1024, 6144)]
    path = tmp_path / name
    plot.check(path)
    plot.draw(rows, path)
    assert path.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")
