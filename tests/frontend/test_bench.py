"""The benchmark's rows and figures, over an engine that answers at once."""

from __future__ import annotations

import json

import pytest

from ringlm.cluster.client import EngineClient
from ringlm.cluster.spec import EngineSpec
from ringlm.frontend.cli import main
from tests.frontend.fake import FakeEngine


class Benched(FakeEngine):
    """Answers with as many tokens as it is asked for, and counts as an engine client."""

    def __init__(self) -> None:
        super().__init__(lambda prompt: [], context=64)

    def submit(self, prompt_tokens: list[int], params: object) -> int:
        self._answer = lambda prompt: [7] * params.max_tokens
        return super().submit(prompt_tokens, params)

    def __enter__(self) -> Benched:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[EngineSpec]:
    specs: list[EngineSpec] = []

    def start(spec: EngineSpec, on_progress: object = None) -> Benched:
        specs.append(spec)
        return Benched()

    monkeypatch.setattr(EngineClient, "start", start)
    return specs


def test_json_has_a_row_for_each_test_and_concurrency(
    started: list[EngineSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "bench",
                "-m",
                "demo",
                "-p",
                "32",
                "-n",
                "8",
                "--concurrency",
                "1,3",
                "-r",
                "2",
                "--quant",
                "int4",
                "--json",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["backend"], result["world_size"]) == ("fake", "ring", 2)
    assert [(row["test"], row["concurrency"]) for row in result["rows"]] == [
        ("pp32", 1), ("tg8", 1), ("pp32", 3), ("tg8", 3)
    ]  # fmt: skip
    assert all(row["tokens_per_s"] > 0 and 0 < row["ms_p50"] <= row["ms_p90"] for row in result["rows"])
    for row in result["rows"]:
        names = ["ttft_ms"] + ["inter_token_ms"] * row["test"].startswith("tg")
        assert {name for name in row if name.endswith("_p50")} == {f"{name}_p50" for name in ("ms", *names)}
        assert all(0 < row[f"{name}_p50"] <= row[f"{name}_p90"] <= row[f"{name}_p99"] for name in names)
    assert 0 <= result["comm_share"] <= 1
    assert result["ranks"][1] == {"host": "", "device": "cpu", "threads": 1, "weights_bytes": 100, "peak_bytes": 200}
    (spec,) = started
    assert (spec.settings.max_seqs, spec.settings.context, spec.settings.quant) == (3, 32, "int4")


def test_a_table_in_a_pipe_is_plain_text(started: list[EngineSpec], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "-m", "demo", "-p", "0", "-n", "8", "-r", "1"]) == 0
    out = capsys.readouterr().out
    assert "tg8" in out
    assert "pp" not in out.replace("rank 0: cpu", "")
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("-p 0 -n 0", "nothing to measure"),
        ("--concurrency 1,x", "--concurrency 1,x is not a list"),
        ("--concurrency 2,2", "different numbers"),
        ("-n 1", "-n 0 or 2 and more"),
        ("-r 0", "-r must be 1 or more"),
        ("--plot x.jpg", "neither PNG nor SVG"),
        ("-p 100", "--context 64 is less than the 100 tokens"),
        ("--max-seqs 2 --concurrency 4", "--max-seqs 2 is less than the concurrency of 4"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: str, words: str, started: list[EngineSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "-m", "demo", "-p", "8", "-n", "8", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1
