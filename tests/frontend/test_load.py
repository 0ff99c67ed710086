"""`ringlm bench --url` against a server that a test tells what to do."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from ringlm.frontend.cli import main
from tests.frontend.fake_server import Behaviour, serving

LOAD = ["bench", "-p", "40", "-n", "3", "-r", "2"]


def measured(
    capsys: pytest.CaptureFixture[str], behaviour: Behaviour, *arguments: str, concurrency: str = "1"
) -> dict[str, Any]:
    with serving(behaviour) as url:
        status = main([*LOAD, "--url", url, "--concurrency", concurrency, "--json", *arguments])
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    return json.loads(captured.out)


def test_a_row_for_each_concurrency(capsys: pytest.CaptureFixture[str]) -> None:
    behaviour = Behaviour()
    result = measured(capsys, behaviour, concurrency="1,3")
    assert (result["model"], result["api"]) == ("first", "completions")
    assert [(row["test"], row["concurrency"], row["requests"]) for row in result["rows"]] == [
        ("pp40+tg3", 1, 2), ("pp40+tg3", 3, 6)
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["tokens_per_s"] > 0
        assert row["errors"] == {}
        assert abs(row["prompt_tokens"] - 40) <= 1  # two a word and three
        assert row["completion_tokens"] == 3
        for name in ("ms", "ttft_ms", "inter_token_ms"):
            assert 0 <= row[f"{name}_p50"] <= row[f"{name}_p90"] <= row[f"{name}_p99"]
        assert row["ttft_ms_p50"] <= row["ms_p50"]
    assert result["client_share"] > 0
    prompts = [body["prompt"] for body in behaviour.bodies]
    assert len(set(prompts)) == len(prompts) == (2 + 1) * (1 + 3)  # with the warm-up, and never one twice
    assert all(body["ignore_eos"] and body["stream_options"] == {"include_usage": True} for body in behaviour.bodies)


def test_chat_where_there_is_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    behaviour = Behaviour(completions=False, knows_ignore_eos=False, key="secret")
    result = measured(capsys, behaviour, "--api-key", "secret", "-m", "second")
    assert (result["model"], result["api"]) == ("second", "chat/completions")
    assert result["rows"][0]["completion_tokens"] == 3
    assert all("ignore_eos" not in body and body["model"] == "second" for body in behaviour.bodies)


def test_failures_are_counted_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    tricks = [429, 429, "error", "cut", "empty", "garbage", "hang up"]
    warm_up = [None] * 9
    result = measured(capsys, Behaviour(tricks=[*warm_up, *tricks]), concurrency="9")
    (row,) = result["rows"]
    assert row["errors"] == {
        "http 429": 2, "error in the stream": 1, "cut off": 1, "empty": 1, "unreadable": 1, "connection": 1
    }  # fmt: skip
    assert row["requests"] == 2 * 9 - len(tricks)


def test_a_table_names_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Behaviour(tricks=[None, None, 503])) as url:
        assert main([*LOAD, "--url", url, "--concurrency", "2"]) == 0
    out = capsys.readouterr().out
    assert "pp40+tg3" in out
    assert "1 of 4 requests at 2 failed: http 503" in out
    assert "\x1b" not in out


def test_a_server_that_dies_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Behaviour(dies_after=3)) as url:
        assert main([*LOAD, "--url", url, "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "of 1 requests at once none succeeded; the last: connection" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("behaviour", "arguments", "words"),
    [
        (Behaviour(key="secret"), "", "refuses the key (401): Incorrect API key. Give it with --api-key"),
        (Behaviour(key="secret"), "--api-key wrong", "refuses the key"),
        (Behaviour(), "-m third", "no model 'third', but first, second; mend -m"),
        (Behaviour(), "-p 0", "-p and -n must be 1 or more"),
        (Behaviour(), "--concurrency 0", "--concurrency 0 is not a list"),
        (Behaviour(), "-r 0", "-r must be 1 or more"),
        (Behaviour(), "--quant int4", "takes -m alone"),
        (Behaviour(), "--plot x.jpg", "neither PNG nor SVG"),
        (Behaviour(usage=False), "", "does not say in usage.prompt_tokens"),
    ],
)
def test_a_mistake_is_one_line(
    behaviour: Behaviour, arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(behaviour) as url:
        assert main([*LOAD, "--url", url, *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_an_address_that_leads_nowhere_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        with serving(Behaviour()) as url:
            for address, words in [
                (closed, "nothing answers at"),
                (url.removesuffix("/v1"), "does --url end where the API begins"),
                ("localhost:8000", "is not an address such as"),
                ("http://", "is not an address such as"),
                ("http://[::1", "is not an address such as"),
            ]:
                assert main([*LOAD, "--url", address]) == 2
                err = capsys.readouterr().err
                assert words in err
                assert err.count("\n") == 1


def test_a_plot_is_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    measured(capsys, Behaviour(), "--plot", str(tmp_path / "x.svg"), concurrency="1,2")
    drawn = (tmp_path / "x.svg").read_text()
    assert drawn.startswith("<?xml")
