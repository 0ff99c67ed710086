"""`ringlm plan`: figures for people and for programs, and a refusal with its status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ringlm.frontend.cli import main
from tests.weights.write_adapter import save_adapter


def test_the_object(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"plan -m {tiny_llama} --world-size 3 --split 2,1,0 --context 100 --max-seqs 4 --dtype float32 --json"
    assert main(line.split()) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["refused"] is None
    assert (said["model"], said["world_size"], said["context"], said["max_seqs"]) == ("llama", 3, 100, 4)
    first, second, third = said["ranks"]
    assert (first["query_heads"], second["query_heads"], third["query_heads"]) == ([0, 6], [6, 9], [9, 9])
    assert (first["kv_heads"], first["layers"]) == ([0, 2], [0, 3])
    assert (
        first["cache_bytes"] == 4 * 128 * 3 * 2 * 2 * 4 * 4
    )  # sequences, tokens in blocks, layers, k and v, heads, sizes
    assert third["cache_bytes"] == 0
    assert third["weights_bytes"] == 7 * 36 * 4  # norms
    assert all(rank["total_bytes"] == rank["weights_bytes"] + rank["cache_bytes"] for rank in said["ranks"])
    assert all(rank["fits"] for rank in said["ranks"])


def test_the_table(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-m", str(tiny_llama), "-n", "2", "--quant", "int4", "--memory", "16G,800M"]) == 0
    title, head, first, second = capsys.readouterr().out.splitlines()
    assert title.startswith(
        "llama, int4 weights, cache in float32 for 65,536 tokens (at most 16 sequences, each of 4,096)"
    )
    assert head.split()[:3] == ["rank", "query", "heads"]
    assert first.split()[:4] == ["0", "6", "2", "25"]
    assert first.split()[-3:] == ["16.0", "GB", "yes"]
    assert second.split()[-3:] == ["800", "MB", "yes"]
    assert main(["plan", "-m", str(tiny_llama), "-n", "2"]) == 0
    assert "use this machine's memory" in capsys.readouterr().out


def test_an_adapter_s_share(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = save_adapter(tmp_path / "style", tiny_llama, targets="q_proj")
    line = ["plan", "-m", str(tiny_llama), "-n", "2", "--dtype", "float32", "--adapter", str(adapter)]
    found = []
    for arguments in (line, line[:-2]):
        assert main([*arguments, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    with_it, bare = found
    assert (with_it["adapter"], bare["adapter"]) == ("style", None)
    for one, other in zip(with_it["ranks"], bare["ranks"], strict=True):
        heads = one["query_heads"][1] - one["query_heads"][0]
        assert one["weights_bytes"] - other["weights_bytes"] == 3 * 4 * (36 + heads * 4) * 4  # layers, rank, A and B
    assert main(line) == 0
    assert capsys.readouterr().out.startswith("llama with style, float32, cache in")


def test_what_does_not_fit_is_shown_and_refused(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-m", str(tiny_llama), "-n", "2", "--memory", "1G,0.01M", "--json"]) == 2
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert [rank["fits"] for rank in said["ranks"]] == [True, False]
    assert said["refused"].startswith("rank 1 needs")
    assert captured.err == f"ringlm: ConfigError: {said['refused']}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--world-size 12", "world size 12 needs at least 12 query heads"),
        ("--world-size 0", "must be 1 or more"),
        ("--world-size 2 --split 1", "1 weights for world size 2"),
        ("--world-size 2 --memory 1G,2G,3G", "3 sizes for world size 2"),
        ("--memory lots", "'lots'; write sizes such as 16G"),
        ("--context 5000", "more than the 4096 positions"),
        ("--quant int5", "choose none, int8 or int4"),
        ("--device tpu", "choose cpu, cuda or mps"),
        ("gguf", "say 'plain' or leave it out"),
    ],
)
def test_mistakes(tiny_llama: Path, arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-m", str(tiny_llama), *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_it_works_without_torch(tiny_llama: Path) -> None:
    code = (
        f"from ringlm.frontend.cli import main; import sys\nassert not main(['plan', '-m', {str(tiny_llama)!r}])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
